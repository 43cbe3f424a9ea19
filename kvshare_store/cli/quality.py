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
from kvshare_store.errors import ConfigError
from kvshare_store.errors.wording import short
from kvshare_store.readable import as_one_name, bounds, limits, many, percent, printable, too_few

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


_NUMBERS = 64
"""Cells that the numbers of a line take where there is room."""
_LABEL = 64
"""Cells that what stands before them takes at most: more only for the name of a class, which is
not cut."""
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
        if traffic and not found["classes"]:
            raise ConfigError(_no_class(traffic, ask(Quality(namespace))))
    if json:
        print_json(found)
        return
    out = console()
    out.print(headline(place(chosen), found), soft_wrap=True)
    if found["classes"]:
        out.print()
        out.print(classes_table(found, out.width, parts=parts))


def _no_class(name: str, found: Found) -> str:
    names = [printable(one["known"]["traffic"]) for one in found["classes"]]
    more = f" and {found['total'] - len(names):,} more" if found["total"] > len(names) else ""
    return f"no class is named {name!r}; there are: {', '.join(names) or 'none yet'}{more}"


def headline(home: str, found: Found) -> str:
    """One line about the bound, and how many classes there are."""
    shown = len(found["classes"])
    some = f", these are {shown:,} of them" if shown < found["total"] else ""
    bound = (
        f"bound {percent(found['bound'])}, confidence {percent(found['confidence'])}"
        if found["bound"]
        else "no bound (quality_bound), so scores are only reported"
    )
    scored = found.get("scored", found["total"])  # the release before lists no others
    none = "" if scored else "; engines with second_look score answers while they are idle"
    return (
        f"{home}: {bound}, policy {found['policy']}; classes: {found['total']:,}{some}; with "
        f"scored answers: {scored:,}{none}"
    )


def classes_table(found: Found, width: int, *, parts: bool) -> Table:
    """Two lines for each class, its name and which traffic that is, one for each of its policies,
    and one for the floor; `parts`: and for each part of the policies. In `width` cells."""
    from kvshare_store.http.classes import described, lines  # noqa: PLC0415 - numpy, not for --help

    table = plain_table(header_style="bold")
    names = [_name(one) for one in found["classes"]]
    longest = max(len(word) for name in names for word in name.split())
    cells = max(longest, min(width - _NUMBERS, _LABEL))
    table.add_column("class, policy", overflow="fold", width=cells)
    for head in ("scored", "extra divergence", "mean regret"):
        table.add_column(head, justify="right", overflow="fold")
    now = time.time()
    for one, name in zip(found["classes"], names, strict=True):
        table.add_row(name, "", "", "")
        words, node = described(one)
        table.add_row(f"  {printable(words)} {short(node)}".rstrip(), "", "", "", style="dim")
        floor = one["known"]["floor"]
        for line in lines(one, found, now, small=True):
            _add_policy(table, line, floor["greedy"])
            for label, part in _parts(line.known) if parts and line.known else ():
                table.add_row(f"    {label}", *_numbers(part, floor["greedy"]))
        table.add_row(*_floor(floor), style="dim")
    table.caption, table.caption_justify = "kvshare show NODE shows a prompt", "left"
    return table


def _name(one: Found) -> str:
    space = one["space"]
    tenant = f", tenant {as_one_name(space['tenant'])}" if space["tenant"] else ""
    silent = ", silent: what was learned counts no more" if one["silent"] else ""
    return f"{printable(one['known']['traffic'])} of {short(space['digest'])}{tenant}{silent}"


def _floor(known: Found) -> tuple[str, str, str, str]:
    """Controls of the namespace, which all of its classes are compared with."""
    if not known["greedy"]:
        return "  floor: no control yet, taken as 0", "-", "-", "-"
    numbers = f"{known['greedy']:,}", limits(known["diverged"]), f"{known['regret'][0]:.4f}"
    return f"  floor ({many(known['greedy'], 'control')}), diverged", *numbers


def _add_policy(table: Table, line: Line, controls: int) -> None:
    standing = {"": "", "not known": "not known yet"}.get(
        line.standing, f"{line.standing} the bound"
    )
    notes = ", ".join(filter(None, (line.role, standing)))
    label = f"  {line.policy}" + (f" ({notes})" if notes else "")
    scored, *others = _numbers(line.known, controls) if line.known else ("-", "-", "-")
    table.add_row(label, line.progress or scored, *others)


def _parts(known: Found) -> Iterator[tuple[str, Found]]:
    for name, words in PARTS.items():
        found: Sequence[Found] = known.get(name, ())  # a daemon of the release before has none
        for part in found:
            yield words.format(bounds(part["start"], part["stop"])), part


def _numbers(known: Found, controls: int) -> tuple[str, str, str]:
    """Those of greedy answers, or of sampled ones where there are no others."""
    if not known["greedy"]:
        return f"{known['sampled']:,} sampled", "-", f"{known['sampled_regret'][0]:.4f}"
    extra = too_few(known["greedy"], controls) or limits(known["extra"])
    return f"{known['greedy']:,}", extra, f"{known['regret'][0]:.4f}"
