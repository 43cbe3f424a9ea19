"""What this release says on the wire, for the tests of the next one: `make release` runs
`python -m tests.support.protocol_recording VERSION` once the release is made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvshare_store.daemon import protocol
from kvshare_store.observability.version import version
from tests.daemon.test_protocol import MESSAGES, REPLIES

RECORDING = Path(__file__).parents[1] / "data" / "protocol_before.json"


def recorded(release: str = "") -> dict[str, object]:
    """Each message and some answers, in hexadecimal digits, by the names of their types. `release`:
    its version; none: the installed one."""
    replies = {type(one).__name__: protocol.Reply(result=one) for one in REPLIES}
    return {
        "release": release or version(),
        "requests": {type(one).__name__: protocol.encode(one).hex() for one in MESSAGES},
        "replies": {name: protocol.encode(reply).hex() for name, reply in replies.items()},
    }


if __name__ == "__main__":
    RECORDING.write_text(json.dumps(recorded(*sys.argv[1:]), indent=1) + "\n")
