"""`kvshare export` and `kvshare import`: stored prompts as one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    TenantOption,
    YesOption,
    answering,
    configured,
    print_json,
)
from kvshare_store.config import StoreConfig
from kvshare_store.errors.wording import short
from kvshare_store.readable import many, size

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The archive.")]
NodesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NODE]...", help="Ids, or unique beginnings of them; else all."),
]
PlainOption = Annotated[
    bool, typer.Option("--plain", help="Also of an encrypted store: an archive is not encrypted.")
]


def export(
    file: FileArgument,
    nodes: NodesArgument = None,
    tenant: TenantOption = None,
    home: HomeOption = None,
    config: ConfigOption = None,
    plain: PlainOption = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> int:
    """Write stored prompts with their rows into a file that another store can import.

    The exit code is 1 if a prompt was left out because its rows could not be read.
    """
    from kvshare_store.daemon.protocol import Export  # noqa: PLC0415 - seconds, not for --help

    if os.path.isfile(file) and not yes:  # nothing else is replaced; others are refused below
        typer.confirm(f"Replace {file}?", abort=True, err=True)
    chosen = configured(home, config)
    with answering(chosen) as ask:
        found = ask(Export(str(file.absolute()), tuple(nodes or ()), tenant, plain))
    if json:
        print_json(found)
    else:
        typer.echo(
            f"{many(found['nodes'], 'node')} and {many(found['blocks'], 'block')} are in "
            f"{_there(file, chosen)} ({size(found['nbytes'])})."
        )
        for node in found["skipped"]:
            typer.echo(f"{short(node)}: its rows could not be read", err=True)
    return int(bool(found["skipped"]))


def _there(file: Path, config: StoreConfig) -> str:
    """The path of an archive, which the daemon writes, and whose it is if that is elsewhere."""
    path = file.absolute()
    return f"{path} on the machine of {config.connect}" if config.connect else str(path)


def import_(
    file: FileArgument,
    home: HomeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Take in the prompts of an archive that `kvshare export` has written.

    All of it is verified before anything is taken. A home without a store gets one. The exit code
    is 1 if some were not taken.
    """
    from kvshare_store.cli.upkeep import has_store  # noqa: PLC0415 - seconds, not for --help
    from kvshare_store.daemon.protocol import Import  # noqa: PLC0415
    from kvshare_store.maintenance.moving import check_archive  # noqa: PLC0415

    chosen = configured(home, config)
    new = not has_store(chosen)
    if new:
        check_archive(file)  # one that is damaged leaves no store behind
    with answering(chosen, new=new) as ask:
        found = ask(Import(str(file.absolute())))
    if json:
        print_json(found)
    else:
        if new:
            typer.echo(f"{chosen.home_path} had no store: one was made.", err=True)
        typer.echo(f"{many(len(found['nodes']), 'new node')}, {found['known']:,} were here.")
        for node in found["skipped"]:
            typer.echo(f"{short(node)}: there was no room for its rows", err=True)
        if purged := found.get("purged"):  # a daemon of the release before does not say
            what = "their tenant or namespace was purged meanwhile"
            typer.echo(f"{many(len(purged), 'node')} not taken: {what}", err=True)
    return int(bool(found["skipped"] or found.get("purged")))
