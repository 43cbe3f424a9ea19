"""What this release says on the wire, for the tests of the next one: `make release` runs
`python -m tests.support.protocol_recording` once the release is made."""

from __future__ import annotations

import json
from pathlib import Path

from kvshare_store.daemon import protocol
from kvshare_store.observability.version import version
from tests.daemon.test_protocol import MESSAGES, REPLIES

RECORDING = Path(__file__).parents[1] / "data" / "protocol_before.json"


def recorded() -> dict[str, object]:
    """Each message and some answers, in hexadecimal digits, by the names of their types."""
    replies = {type(one).__name__: protocol.Reply(result=one) for one in REPLIES}
    return {
        "release": version(),
        "requests": {type(one).__name__: protocol.encode(one).hex() for one in MESSAGES},
        "replies": {name: protocol.encode(reply).hex() for name, reply in replies.items()},
    }


if __name__ == "__main__":
    RECORDING.write_text(json.dumps(recorded(), indent=1) + "\n")
