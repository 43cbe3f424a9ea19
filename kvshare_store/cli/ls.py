"""`kvshare ls`: the stored prompts of a home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    TenantOption,
    answering,
    configured,
    console,
    place,
    print_json,
)
from kvshare_store.cli.fitting import Columns, fitted, table_of
from kvshare_store.errors.wording import short
from kvshare_store.readable import age, many, one_line

LimitOption = Annotated[
    int, typer.Option("--limit", "-n", min=1, metavar="N", help="Show at most so many nodes.")
]
PoolOption = Annotated[
    str, typer.Option("--pool", metavar="NAME", help="Only the templates of this pool.")
]

_TENANT = 12
"""Cells that a tenant, or a pool, has at least."""
_PREVIEW = 8
"""Cells that the beginning of a prompt has at least."""
_DROPPED = ("exact", "age", "preview")
"""Columns that a narrow terminal does without, the first one first."""


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    limit: LimitOption = 50,
    pool: PoolOption = "",
    tenant: TenantOption = None,
    json: JsonOption = False,
) -> None:
    """List the stored prompts, the most recently used first."""
    from kvshare_store.daemon import protocol  # noqa: PLC0415 - seconds, not for --help

    chosen = configured(home, config)
    with answering(chosen) as ask:
        nodes = ask(protocol.ListNodes(limit, pool, tenant))
        total = ask(protocol.Stats())["nodes"]
    if tenant is not None:  # a daemon of the release before lists those of all
        nodes = [node for node in nodes if node["tenant"] == tenant and not node.get("pool")]
    if json:
        print_json(nodes)
    elif not nodes:
        of = f" of pool {pool}" if pool else "" if tenant is None else " of that tenant"
        typer.echo(f"No nodes{of} in {place(chosen)} yet.")
    else:
        out = console()
        out.print(nodes_table(nodes, out.width))
        if total > len(nodes) and not pool and tenant is None:
            out.print(
                f"{len(nodes):,} of {many(total, 'node')}; --limit {total} shows all", style="dim"
            )


def nodes_table(nodes: Sequence[dict[str, Any]], width: int) -> Table:
    """One line for each node: leading exact rows, generation, beginning of the prompt. Pinned nodes
    have a flag. In `width` cells: what does not fit is left out."""
    columns = _columns(nodes)
    # the preview shrinks first where the terminal is narrow
    least = {"tenant": _TENANT, "pool": _TENANT, "preview": _PREVIEW}
    widths = fitted(columns, width, least, _DROPPED)
    return table_of(columns, widths, _look)


def _look(name: str) -> dict[str, Any]:
    return {
        "style": "cyan" if name in ("node", "parent") else "",
        "justify": "right" if name in ("tokens", "exact", "age") else "left",
        "overflow": "ellipsis",
        "no_wrap": True,
    }


def _columns(nodes: Sequence[dict[str, Any]]) -> Columns:
    columns = {
        "node": [Text(f"{short(node['id'])}{' ⚑' if node['pinned'] else ''}") for node in nodes],
        "tokens": [Text(f"{node['tokens']:,}") for node in nodes],
        "exact": [Text(f"{node['exact_rows']:,}") for node in nodes],
        "provenance": [_provenance(node["generation"]) for node in nodes],
        "parent": [_parent(node) for node in nodes],
        "age": [Text(age(node["created"])) for node in nodes],
    }
    for whose in ("tenant", "pool"):  # a daemon of the release before knows no pools
        if any(node.get(whose) for node in nodes):
            columns[whose] = [Text(one_line(node.get(whose, ""))) for node in nodes]
    columns["preview"] = [Text(one_line(node["preview"])) for node in nodes]
    return columns


def _provenance(generation: int) -> Text:
    return Text(f"edited ({generation})", "yellow") if generation else Text("exact", "green")


def _parent(node: dict[str, Any]) -> Text:
    parent = Text(short(node["parent"] or "-"))
    if not node.get("parent_stored", True):  # a daemon of the release before does not say it
        parent.append(" gone", "dim")
    return parent
