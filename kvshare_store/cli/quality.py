"""`kvshare quality`: what scored answers say of each class of traffic."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    NamespaceOption,
    answering,
    configured,
    console,
    place,
    plain_table,
    print_json,
)
from kvshare_store.readable import bounds, limits, percent, printable, short

if TYPE_CHECKING:
    from kvshare_store.http.classes import Line

Found = Mapping[str, Any]

TrafficOption = Annotated[str, typer.Option("--class", metavar="NAME", help="Only this class.")]
PartsOption = Annotated[
    bool,
    typer.Option(
        "--parts",
        help="Show classes apart: by share recomputed, by how far the answer is from an edit.",
    ),
]
LimitOption = Annotated[
    int,
    typer.Option("--limit", "-n", min=1, max=200, metavar="N", help="At most so many classes."),
]


PARTS = {"computed": "{} % recomputed", "distance": "{} tokens behind an edit"}
"""What the parts of a policy are called."""


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    namespace: NamespaceOption = "",
    traffic: TrafficOption = "",
    parts: PartsOption = False,
    limit: LimitOption = 25,
    json: JsonOption = False,
) -> None:
    """Show for each class of traffic its policy, and how good the answers were.

    Classes with the most scored answers come first. Rates have their limits in brackets.
    A class has a prompt below its name: kvshare show says which.
    """
    from kvshare_store.daemon.protocol import Quality  # noqa: PLC0415 - seconds, not for --help

    chosen = configured(home, config)
    with answering(chosen) as ask:
        found = ask(Quality(namespace, traffic, limit=limit))
    if json:
        print_json(found)
        return
    out = console()
    out.print(headline(place(chosen), found), soft_wrap=True)
    if found["classes"]:
        out.print()
        out.print(classes_table(found, parts=parts))


def headline(home: str, found: Found) -> str:
    """One line about the bound, and how many classes there are."""
    shown = len(found["classes"])
    some = f", these are {shown:,} of them" if shown < found["total"] else ""
    bound = (
        f"bound {percent(found['bound'])}, confidence {percent(found['confidence'])}"
        if found["bound"]
        else "no bound (quality_bound), so scores are only reported"
    )
    none = "" if found["total"] else "; engines with second_look score answers while they are idle"
    return (
        f"{home}: {bound}, policy {found['policy']}; classes with scored answers: "
        f"{found['total']:,}{some}{none}"
    )


def classes_table(found: Found, *, parts: bool) -> Table:
    """Two lines for each class, its name and which traffic that is, and one for each of its
    policies; `parts`: and for each part of these."""
    from kvshare_store.http.classes import described, lines  # noqa: PLC0415 - numpy, not for --help

    table = plain_table(header_style="bold")
    table.add_column("class, policy", overflow="fold")
    for head in ("scored", "extra divergence", "mean regret"):
        table.add_column(head, justify="right", overflow="fold")
    now = time.time()
    for one in found["classes"]:
        table.add_row(_name(one), "", "", "")
        words, node = described(one)
        table.add_row(f"  {printable(words)} {short(node)}".rstrip(), "", "", "", style="dim")
        for line in lines(one, found, now, small=True):
            _add_policy(table, line)
            for label, part in _parts(line.known) if parts and line.known else ():
                table.add_row(f"    {label}", *_numbers(part))
    table.caption, table.caption_justify = "kvshare show NODE shows a prompt", "left"
    return table


def _name(one: Found) -> str:
    space = one["space"]
    tenant = f", tenant {printable(space['tenant'])}" if space["tenant"] else ""
    silent = ", silent: what was learned counts no more" if one["silent"] else ""
    return f"{printable(one['known']['traffic'])} of {short(space['digest'])}{tenant}{silent}"


def _add_policy(table: Table, line: Line) -> None:
    standing = {"": "", "not known": "not known yet"}.get(
        line.standing, f"{line.standing} the bound"
    )
    notes = ", ".join(filter(None, (line.role, standing)))
    label = f"  {line.policy}" + (f" ({notes})" if notes else "")
    table.add_row(label, *(_numbers(line.known) if line.known else ("-", "-", "-")))


def _parts(known: Found) -> Iterator[tuple[str, Found]]:
    for name, words in PARTS.items():
        found: Sequence[Found] = known.get(name, ())  # a daemon of the release before has none
        for part in found:
            yield words.format(bounds(part["start"], part["stop"])), part


def _numbers(known: Found) -> tuple[str, str, str]:
    """Those of greedy answers, or of sampled ones where there are no others."""
    if not known["greedy"]:
        return f"{known['sampled']:,} sampled", "-", f"{known['sampled_regret'][0]:.4f}"
    return f"{known['greedy']:,}", limits(known["extra"]), f"{known['regret'][0]:.4f}"
