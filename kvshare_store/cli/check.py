"""`kvshare check`: whether every stored prompt can be served as it was saved."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvshare_store.bounded import pieces
from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    answering,
    configured,
    console,
    print_json,
)
from kvshare_store.cli.progress import progress
from kvshare_store.errors.wording import short
from kvshare_store.readable import many, printable, size

if TYPE_CHECKING:
    from kvshare_store.cli.upkeep import Ask

_AT_ONCE = 32
"""Blocks in one message: a daemon can stop only between messages."""

RepairOption = Annotated[
    bool,
    typer.Option(
        "--repair", help="Remove what is wrong and garbage; write bad copies of good blocks again."
    ),
]
SampleOption = Annotated[
    int | None,
    typer.Option(
        "--sample", min=0, metavar="N", help="Read N blocks, chosen by chance, instead of all."
    ),
]


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    repair: RepairOption = False,
    sample: SampleOption = None,
    json: JsonOption = False,
) -> int:
    """Check the tree, the catalogue and every block.

    The exit code is 1 if a problem remains. Works through the daemon, or opens the home itself if
    none runs. A damaged block goes to quarantine when it is read, and its prompts are offered no
    more.
    """

    with answering(configured(home, config)) as ask:
        found = examine(ask, repair=repair, sample=sample, quiet=json)
    if json:
        print_json(found)
    else:
        report(found)
    return int(not all(problem["repaired"] for problem in found["problems"]))


def examine(ask: Ask, *, repair: bool, sample: int | None, quiet: bool) -> dict[str, Any]:
    """All findings, in plain types."""
    from kvshare_store.daemon import protocol  # noqa: PLC0415 - seconds, not for --help

    tree = ask(protocol.CheckTree(repair))
    problems, nbytes = list(tree["problems"]), 0
    names = tree["blocks"]
    if sample is not None:
        names = random.sample(names, min(sample, len(names)))
    with progress(quiet=quiet) as shown:
        task = shown.add_task("reading blocks", total=len(names))
        for some in pieces(names, _AT_ONCE):
            blocks = ask(protocol.CheckBlocks(tuple(some), repair))
            problems += blocks["problems"]
            nbytes += blocks["read"]
            shown.advance(task, len(some))
    if repair:
        ask(protocol.Collect())
    return {
        "nodes": tree["nodes"],
        "blocks": len(tree["blocks"]),
        "blocks_read": len(names),
        "bytes_read": nbytes,
        "garbage": tree["garbage"],
        "problems": problems,
    }


def report(found: dict[str, Any]) -> None:
    """One line for each problem, then one about what was checked."""
    out = console()
    for problem in found["problems"]:
        state = " (repaired)" if problem["repaired"] else ""
        text = f"{problem['kind']} {short(problem['about'])}: {printable(problem['text'])}{state}"
        out.print(text, style="yellow" if state else "red", soft_wrap=True)
    count = len(found["problems"])
    out.print(
        f"{many(found['nodes'], 'node')}, {many(found['blocks'], 'block')}, "
        f"{found['blocks_read']:,} of them read ({size(found['bytes_read'])}), "
        f"{many(found['garbage'], 'block')} of garbage: "
        f"{count or 'no'} {'problem' if count == 1 else 'problems'}",
        soft_wrap=True,
    )
