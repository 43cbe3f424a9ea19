"""`kvshare quality`: what scored answers say of each class of traffic."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    Indented,
    JsonOption,
    NamespaceOption,
    answering,
    configured,
    console,
    place,
    print_json,
)
from kvshare_store.cli.fitting import Columns, fitted, table_of
from kvshare_store.errors import ConfigError
from kvshare_store.errors.wording import short
from kvshare_store.readable import as_one_name, bounds, limits, many, percent, printable, too_few

if TYPE_CHECKING:
    from kvshare_store.http.classes import Line

Found = Mapping[str, Any]
Row = tuple[str, str, str, str]

_HEADS = ("policy", "scored", "extra divergence", "mean regret")
_NONE = ("-", "-", "-")
"""Of a policy without scores."""

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


_LEAST = {"policy": 20, "extra divergence": 12}
"""Columns that are broken at blanks in a narrow terminal, and the cells that they have at least;
what room is left goes to them in this order."""
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


def classes_table(found: Found, width: int, *, parts: bool) -> RenderableType:
    """For each class its name, which traffic that is, its policies with what they are to it, and
    its floor; `parts`: and the parts of the policies. In `width` cells."""
    now = time.time()
    said = [line for one in found["classes"] for line in _lines(one, found, now, parts=parts)]
    rows = [line for line in said if isinstance(line, tuple)]
    widths = fitted(_columns(rows), width, _LEAST, ())
    shown: list[RenderableType] = [table_of(_columns([]), widths, _look)]
    for line in said:
        if isinstance(line, tuple):
            line = table_of(_columns([line]), widths, _look, show_header=False)
        shown.append(line)
    return Group(*shown, Text("kvshare show NODE shows a prompt", "dim"))


def _lines(one: Found, answer: Found, now: float, *, parts: bool) -> Iterator[Row | RenderableType]:
    """A class: rows of the table, and text that goes over all of its columns."""
    from kvshare_store.http.classes import described, lines  # noqa: PLC0415 - numpy, not for --help

    yield Text(_name(one))
    words, node = described(one)
    yield Text(f"  {printable(words)} {short(node)}".rstrip(), "dim")
    floor = one["known"]["floor"]
    for line in lines(one, answer, now, small=True):
        numbers = _numbers(line.known, floor["greedy"]) if line.known else _NONE
        yield (f"  {line.policy}", *numbers)
        if notes := _notes(line):
            yield Indented(Text(notes, "dim"), 4)
        for label, part in _parts(line.known) if parts and line.known else ():
            yield (f"    {label}", *_numbers(part, floor["greedy"]))
    yield _floor(floor)


def _columns(rows: Sequence[Row]) -> Columns:
    return {name: [Text(row[at]) for row in rows] for at, name in enumerate(_HEADS)}


def _look(name: str) -> dict[str, Any]:
    return {"justify": "left" if name == _HEADS[0] else "right", "overflow": "fold"}


def _name(one: Found) -> str:
    space = one["space"]
    tenant = f", tenant {as_one_name(space['tenant'])}" if space["tenant"] else ""
    silent = ", silent: what was learned counts no more" if one["silent"] else ""
    return f"{printable(one['known']['traffic'])} of {short(space['digest'])}{tenant}{silent}"


def _floor(known: Found) -> Row:
    """Controls of the namespace, which all of its classes are compared with."""
    if not known["greedy"]:
        return "  floor: no control yet, taken as 0", *_NONE
    numbers = f"{known['greedy']:,}", limits(known["diverged"]), f"{known['regret'][0]:.4f}"
    return f"  floor ({many(known['greedy'], 'control')}), diverged", *numbers


def _notes(line: Line) -> str:
    """What a policy is to its class, and what is still to come."""
    standing = {"": "", "not known": "not known yet"}.get(
        line.standing, f"{line.standing} the bound"
    )
    notes = ", ".join(filter(None, (line.role, standing)))
    return f"{notes}: scored {line.progress}" if line.progress else notes


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
