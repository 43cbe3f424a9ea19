"""`kvshare ls`: the stored prompts of a home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    answering,
    configured,
    console,
    place,
    print_json,
)
from kvshare_store.readable import age, one_line, printable, short

LimitOption = Annotated[
    int, typer.Option("--limit", "-n", min=1, metavar="N", help="Show at most so many nodes.")
]


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    limit: LimitOption = 50,
    json: JsonOption = False,
) -> None:
    """List the stored prompts, the most recently used first."""
    from kvshare_store.daemon import protocol  # noqa: PLC0415 - seconds, not for --help

    chosen = configured(home, config)
    with answering(chosen) as ask:
        nodes = ask(protocol.ListNodes(limit))
        total = ask(protocol.Stats())["nodes"]
    if json:
        print_json(nodes)
    elif not nodes:
        typer.echo(f"No nodes in {place(chosen)} yet.")
    else:
        out = console()
        out.print(nodes_table(nodes))
        if total > len(nodes):
            out.print(f"{len(nodes):,} of {total:,} nodes; --limit {total} shows all", style="dim")


def nodes_table(nodes: Sequence[dict[str, Any]]) -> Table:
    """One line for each node: leading exact rows, generation, beginning of the prompt. Pinned nodes
    have a flag."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("node", style="cyan", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("exact", justify="right", no_wrap=True)
    table.add_column("provenance", no_wrap=True)
    table.add_column("parent", style="cyan", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    whose = any(node["tenant"] for node in nodes)
    if whose:
        table.add_column("tenant", overflow="ellipsis", max_width=16)
    table.add_column("preview")  # this column shrinks when the terminal is narrow
    for node in nodes:
        generation = node["generation"]
        table.add_row(
            Text(f"{short(node['id'])}{' ⚑' if node['pinned'] else ''}"),
            f"{node['tokens']:,}",
            f"{node['exact_rows']:,}",
            Text(f"edited ({generation})", style="yellow")
            if generation
            else Text("exact", "green"),
            short(node["parent"] or "-"),
            age(node["created"]),
            *((Text(printable(node["tenant"])),) if whose else ()),
            Text(one_line(node["preview"]), no_wrap=True, overflow="ellipsis"),
        )
    return table
