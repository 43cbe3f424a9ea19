"""`kvshare clear`: forget every node of a home."""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_store.cli.common import ConfigOption, HomeOption, configured, connected

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def command(home: HomeOption = None, config: ConfigOption = None, yes: YesOption = False) -> None:
    """Forget every stored prompt and remove its rows."""
    chosen = configured(home, config)
    with connected(chosen) as daemon:
        nodes = daemon.stats()["nodes"]
        if nodes and not yes:
            typer.confirm(f"Remove all {nodes:,} nodes of {chosen.home_path}?", abort=True)
        removed = daemon.clear()
    typer.echo(f"{removed:,} nodes removed.")
