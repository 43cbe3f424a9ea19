"""`kvshare stop`: stop the daemon of a home."""

from __future__ import annotations

import typer

from kvshare_store.cli.common import ConfigOption, HomeOption, configured
from kvshare_store.errors import DeadlineError, UnavailableError

_PATIENCE_S = 60.0
_NOBODY = (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)
"""The errors of the socket if no daemon runs, as opposed to one that hangs."""


def command(home: HomeOption = None, config: ConfigOption = None) -> None:
    """Stop the daemon of a home, if one runs. Everything it has stored stays on disk."""
    from kvshare_store.cli import remote, upkeep  # noqa: PLC0415 - seconds, not for --help

    chosen = configured(home, config)
    try:
        with remote.connected(chosen) as daemon:
            pid = daemon.stop()
            if not daemon.gone(_PATIENCE_S):
                raise DeadlineError(
                    f"the daemon of {chosen.home_path} (process {pid}) is still writing after "
                    f"{_PATIENCE_S:.0f} s; it stops when it is done"
                )
    except UnavailableError as error:
        if not isinstance(error.__cause__, _NOBODY):
            raise
        upkeep.refuse_without_store(chosen)
        typer.echo(f"No daemon runs for {chosen.home_path}: nothing to stop.")
        return
    typer.echo(f"The daemon of {chosen.home_path} (process {pid}) has stopped.")
