"""`kvshare stop`: end the daemon of a home."""

from __future__ import annotations

import typer

from kvshare_store.cli.common import ConfigOption, HomeOption, configured, connected
from kvshare_store.errors import DeadlineError

_PATIENCE_S = 60.0


def command(home: HomeOption = None, config: ConfigOption = None) -> None:
    """Stop the daemon of a home. Everything it has stored stays on disk."""
    chosen = configured(home, config)
    with connected(chosen) as daemon:
        pid = daemon.stop()
        if not daemon.gone(_PATIENCE_S):
            raise DeadlineError(
                f"the daemon of {chosen.home_path} (process {pid}) is still writing after "
                f"{_PATIENCE_S:.0f} s; it stops when it is done"
            )
    typer.echo(f"The daemon of {chosen.home_path} (process {pid}) has stopped.")
