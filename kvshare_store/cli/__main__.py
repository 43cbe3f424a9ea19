"""`kvshare`, also as `python -m kvshare_store.cli`: what must hold while the commands are loaded,
which takes a good part of a second."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run one command. Ctrl-C ends it without a traceback; a SIGHUP waits until the daemon can read
    its settings again, and does not end it."""
    if sys.argv[1:2] == ["serve"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        from kvshare_store.cli.main import main as run  # noqa: PLC0415 - what takes so long

        run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
