"""`kvshare show NODE`: one stored prompt, its edits against its parent, and where its rows lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    Indented,
    JsonOption,
    NodeArgument,
    add_numbers,
    answering,
    configured,
    console,
    plain_table,
    print_json,
)
from kvshare_store.errors.wording import short
from kvshare_store.readable import (
    age,
    as_one_name,
    many,
    printable,
    provenance,
    shortened,
    verdict_lines,
)

Node = Mapping[str, Any]

_KEPT_CHARS = 120
_TEXT_CHARS = 400

BlocksOption = Annotated[bool, typer.Option("--blocks", help="List its blocks too.")]
TextOption = Annotated[bool, typer.Option("--text", help="Print the whole prompt and no more.")]


def command(
    node: NodeArgument,
    home: HomeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    text: TextOption = False,
    blocks: BlocksOption = False,
) -> None:
    """Show one stored prompt: provenance, edits against its parent, where its rows lie."""
    from kvshare_store.daemon.protocol import ShowNode  # noqa: PLC0415 - seconds, not for --help

    with answering(configured(home, config)) as ask:
        found = ask(ShowNode(node))
    if json:
        print_json(found)
        return
    out = console()
    if text:
        typer.echo(printable(found["text"]) if out.is_terminal else found["text"])
        return
    if not found["id"].startswith(node):
        out.print(f"{short(node)} was replaced by this node", style="dim")
    for part in parts(found, marked=out.color_system is None, blocks=blocks):
        out.print(part)


def parts(node: Node, *, marked: bool = False, blocks: bool = False) -> Iterable[RenderableType]:
    """All about a node, from top to bottom. `marked`: signs replace colours. `blocks`: a line for
    each of them."""
    yield summary_table(node)
    if node["edits"]:
        yield Text(f"\nedits against {short(node['parent'])}", style="bold")
        yield Indented(edits_text(node["edits"], marked=marked))
    else:
        yield Text("\ntext", style="bold")
        yield Indented(Text(shortened(printable(node["text"]), _TEXT_CHARS)))
    yield Text("\npath from the root", style="bold")
    yield path_tree(node)
    yield Text()
    yield blocks_table(node["blocks"]) if blocks else blocks_line(node["blocks"])


def summary_table(node: Node) -> Table:
    """Facts about the node."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    edited = node["generation"] > 0
    table.add_row("node", Text(node["id"], style="cyan"))
    pool = f", pool {as_one_name(node['pool'])}" if node.get("pool") else ""
    table.add_row("model", f"{as_one_name(node['model'])} (namespace {node['namespace']}{pool})")
    table.add_row("tokens", _rows_by_kind(node))
    if answer := node.get("answer_tokens", 0):  # a daemon of the release before does not say
        table.add_row("answer", f"the last {answer:,} tokens; those before are the prompt")
    table.add_row(
        "provenance", Text(provenance(node["generation"]), style="yellow" if edited else "green")
    )
    if node["policy"]:
        table.add_row("served under", f"{node['policy']}, or stricter")
    for at, context in enumerate(node.get("contexts", ())):
        table.add_row("" if at else "approximate", _approximate(context))
    table.add_row("parent", _parent(node))
    if sources := node.get("sources"):
        table.add_row("sent by", many(sources, "source"))
    pinned = ", pinned" if node.get("pinned") else ""
    table.add_row("stored", f"{age(node['created'])} ago{pinned}")
    for at, line in enumerate(verdict_lines(node.get("verdict"))):
        table.add_row("" if at else "second look", line)
    return table


def _approximate(context: Mapping[str, Any]) -> str:
    return (
        f"from token {context['start']:,} on: computed behind rows that were edited, up to token "
        f"{context['stop']:,}"
    )


def _rows_by_kind(node: Node) -> str:
    continued = node.get("continued_rows", 0)  # a daemon of the release before does not say
    more = f", {continued:,} continued from the parent" if continued else ""
    return f"{node['tokens']:,}, of which {node['exact_rows']:,} exact from the start{more}"


def _parent(node: Node) -> str:
    parent: str = node["parent"] or "none"
    return parent if parent in ("none", *node["path"]) else f"{parent} (no longer stored)"


def edits_text(edits: Sequence[Mapping[str, Any]], *, marked: bool = False) -> Text:
    """The edits in one running text: deleted text red and struck through, inserted text green, kept
    text dim and shortened."""
    text = Text()
    for index, edit in enumerate(edits):
        if edit["kind"] == "keep":
            first, last = index == 0, index == len(edits) - 1
            kept = shortened(printable(edit["removed"]), _KEPT_CHARS, head=not first, tail=not last)
            text.append(kept, style="dim")
            continue
        if edit["removed"]:
            text.append(_changed(edit["removed"], "[-", "-]", marked), style="red strike")
        if edit["added"]:
            text.append(_changed(edit["added"], "{+", "+}", marked), style="green")
    return text


def _changed(words: str, left: str, right: str, marked: bool) -> str:
    """Changed text in full; changed line ends must be visible too."""
    shown = printable(words).replace("\n", "↵\n")
    return f"{left}{shown}{right}" if marked else shown


def path_tree(node: Node) -> Tree:
    """The path from the oldest ancestor to the node, and its children: the edits, and what each
    node stores."""
    lineage = node.get("lineage", {})
    labels = [_place(name, lineage.get(name), name == node["id"]) for name in node["path"]]
    tree = at = Tree(labels[0], guide_style="dim")
    for label in labels[1:]:
        at = at.add(label)
    for child in node["children"]:
        at.add(_place(child, lineage.get(child), False))
    return tree


def _place(name: str, facts: Mapping[str, Any] | None, here: bool) -> Text:
    text = Text(short(name), style="bold cyan" if here else "cyan")
    if here:
        text.append(" (this node)", style="dim")
    if facts is not None:
        text.append(f"  {_cost(facts)}, ", style="default")
        text.append(_stored(facts), style="dim")
    return text


def _cost(facts: Mapping[str, Any]) -> str:
    """A summary of the edits against the parent."""
    if not (facts["added"] or facts["removed"]):
        return f"{facts['tokens']:,} tokens"
    return f"+{facts['added']:,} -{facts['removed']:,} tokens"


def _stored(facts: Mapping[str, Any]) -> str:
    """What the node stores itself."""
    marks = "".join(f", {mark}" for mark in ("merged", "pinned") if facts[mark])
    return f"stores {many(facts['own_rows'], 'row')} in {many(facts['own_blocks'], 'block')}{marks}"


def blocks_line(blocks: Sequence[Mapping[str, Any]]) -> str:
    """How many blocks a node has, and where."""
    tiers = Counter(block["tier"] for block in blocks)
    where = ", ".join(f"{count:,} in {tier}" for tier, count in tiers.items())
    shared = sum(block["users"] > 1 for block in blocks)
    return (
        f"{many(len(blocks), 'block')}: {where or 'none here'}; {shared:,} shared with other nodes "
        "(--blocks lists them)"
    )


def blocks_table(blocks: Sequence[Mapping[str, Any]]) -> Table:
    """Blocks in the order of the node, and which other nodes use them."""
    table = plain_table()
    table.add_column("block", style="cyan", no_wrap=True)
    table.add_column("tier")
    add_numbers(table, "rows of this node", "shared with")
    for block in blocks:
        table.add_row(
            short(block["name"]), block["tier"], str(block["rows"]), _users(block["users"])
        )
    return table


def _users(count: int) -> str:
    """`count` includes the node itself."""
    return many(count - 1, "other") if count > 1 else "no other"
