"""`kvshare diff A B`: the edits between two stored prompts."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from kvshare_store.cli.common import (
    NODE_HELP,
    ConfigOption,
    HomeOption,
    Indented,
    JsonOption,
    answering,
    configured,
    console,
    print_json,
)
from kvshare_store.cli.show import edits_text
from kvshare_store.errors.wording import short
from kvshare_store.readable import provenance, share

FirstArgument = Annotated[str, typer.Argument(metavar="A", help=NODE_HELP)]
SecondArgument = Annotated[str, typer.Argument(metavar="B", help=NODE_HELP)]


def command(
    first: FirstArgument,
    second: SecondArgument,
    home: HomeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Show what turns prompt A into prompt B: removed text red, added text green.

    The exit code is 0 if the prompts are equal, and 1 if they are not.
    """
    from kvshare_store.daemon.protocol import Diff  # noqa: PLC0415 - seconds, not for --help

    with answering(configured(home, config)) as ask:
        found = ask(Diff(first, second))
    changed = found["removed"] + found["added"]
    if json:
        print_json(found)
        return int(changed > 0)
    out = console()
    for sign, side in (("-", "first"), ("+", "second")):
        node = found[side]
        line = f"{sign} {short(node['id'])}  {node['tokens']:,} tokens, "
        out.print(line + provenance(node["generation"]), soft_wrap=True)
    kept = share(found["kept"], found["second"]["tokens"])
    out.print(
        f"{found['kept']:,} tokens in common ({kept} of the second), {found['removed']:,} removed, "
        f"{found['added']:,} added\n",
        soft_wrap=True,
    )
    text = Text("no edits", "dim")
    if changed:
        text = edits_text(found["edits"], marked=out.color_system is None)
    out.print(Indented(text))
    return int(changed > 0)
