"""`kvshare stop`: stop the daemon of a home."""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_store.cli.common import ConfigOption, HomeOption, configured, place
from kvshare_store.errors import DeadlineError, UnavailableError

_PATIENCE_S = 60.0
_NOBODY = (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)
"""The errors of the socket if no daemon runs, as opposed to one that hangs."""


DrainOption = Annotated[
    bool,
    typer.Option("--drain", help="First let requests load what they were promised."),
]


def command(
    home: HomeOption = None, config: ConfigOption = None, drain: DrainOption = False
) -> None:
    """Stop the daemon of a home, if one runs. Everything it has stored stays on disk."""
    from kvshare_store.cli import remote, upkeep  # noqa: PLC0415 - seconds, not for --help
    from kvshare_store.daemon.protocol import Stop  # noqa: PLC0415

    chosen = configured(home, config)
    which = place(chosen)
    try:
        with remote.connected(chosen) as client:
            draining = remote.settings(client)["drain_seconds"] if drain else 0.0
            patience, pid = _PATIENCE_S + draining, client.greet().pid
            client.call(Stop(drain))
            if not remote.gone(client, patience):
                raise DeadlineError(
                    f"the daemon of {which} (process {pid}) is still writing after "
                    f"{patience:.0f} s; it stops when it is done"
                )
    except UnavailableError as error:
        if chosen.connect or not isinstance(error.__cause__, _NOBODY):
            raise
        upkeep.refuse_without_store(chosen)
        typer.echo(f"No daemon runs for {which}: nothing to stop.")
        return
    typer.echo(f"The daemon of {which} (process {pid}) has stopped.")
