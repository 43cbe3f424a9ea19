"""`kvshare clear`: forget every node of a home."""

from __future__ import annotations

import typer

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    YesOption,
    answering,
    configured,
    place,
    print_json,
)
from kvshare_store.readable import many


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Forget every stored prompt and remove its rows."""
    from kvshare_store.daemon import protocol  # noqa: PLC0415 - seconds, not for --help

    chosen = configured(home, config)
    with answering(chosen) as ask:
        nodes = ask(protocol.Stats())["nodes"]
        if nodes and not yes:
            typer.confirm(f"Remove all nodes of {place(chosen)} ({nodes:,})?", abort=True, err=True)
        removed = ask(protocol.Clear())
    if json:
        print_json({"removed": removed})
    else:
        typer.echo(f"{many(removed, 'node')} removed.")
