"""`kvshare pin NODE` and `kvshare unpin NODE`."""

from __future__ import annotations

import typer

from kvshare_store.cli.common import ConfigOption, HomeOption, NodeArgument, answering, configured
from kvshare_store.errors.wording import short


def pin(node: NodeArgument, home: HomeOption = None, config: ConfigOption = None) -> None:
    """Keep a stored prompt, however much room is needed, until it is unpinned or purged."""
    typer.echo(f"{short(_set(node, home, config, pinned=True))} is pinned.")


def unpin(node: NodeArgument, home: HomeOption = None, config: ConfigOption = None) -> None:
    """Make a pinned prompt an ordinary one again."""
    typer.echo(f"{short(_set(node, home, config, pinned=False))} is not pinned.")


def _set(node: str, home: HomeOption, config: ConfigOption, *, pinned: bool) -> str:
    from kvshare_store.daemon.protocol import Pin  # noqa: PLC0415 - seconds, not for --help

    with answering(configured(home, config)) as ask:
        return str(ask(Pin(node, pinned)))
