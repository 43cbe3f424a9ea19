"""What `kvshare explain` shows: the plan, what becomes of each token, candidates, the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvshare_store.cli.common import Indented, add_numbers, plain_table
from kvshare_store.cli.fitting import Columns, fitted, longest_word, no_room_for, table_of
from kvshare_store.cli.log import request_lines
from kvshare_store.errors.wording import short
from kvshare_store.readable import (
    KIND_COLOURS,
    REASONS,
    as_one_name,
    assumed_text,
    miss_text,
    no_tokens_text,
    printable,
    share,
    shortened,
    source_text,
    steering_text,
    then_text,
)

Found = Mapping[str, Any]

COLOURS = {**KIND_COLOURS, "recomputed": "yellow"}
_REASON_CHARS = 22
"""Width of a column of reasons, at least: longer ones take several lines."""
_WORDS = ("why", "source", "found by")
"""Columns of candidates that are broken at blanks where they are narrow."""
_DROPPED = ("found by", "score", "prefix")
"""Columns of candidates that a narrow terminal does without, the first one first."""


def parts(found: Found, width: int, *, marked: bool, limit: int) -> Iterable[RenderableType]:
    """From top to bottom, in `width` cells. `marked`: words stand in for colours; `limit`:
    characters of a part that are shown, 0: all."""
    request, explained = found["request"], found["explanation"]
    if request is not None:
        yield from request_lines(request)
        if explained is None:
            yield no_tokens_text(request)
            yield "A stored prompt can be planned all the same: kvshare explain --node NODE"
            return
        yield then_text(request, found.get("differs", "")) + "\n"  # the release before has none
    yield from headline(explained, again=request is not None)
    yield Text()
    yield fates_table(explained)
    if explained["candidates"]:
        yield Text()
        yield candidates_table(explained["candidates"], width)
    if explained["divergence"] is not None:
        yield Text("\nfirst difference", style="bold")
        yield Indented(divergence_text(explained))
    yield Text("\nprompt", style="bold").append_text(legend(marked))
    yield Indented(prompt_text(explained["parts"], marked=marked, limit=limit))
    if any(part["donor"] for part in explained["parts"]):
        yield Text()
        yield spans_table(explained["parts"])


def headline(explained: Found, *, again: bool = False) -> Iterable[str]:
    """What the plan is, and what it is expected to save. `again`: of a request that was served, so
    what a bound says now is another thing than what it said then."""
    tenant = f", tenant {as_one_name(explained['tenant'])}" if explained["tenant"] else ""
    answer = explained.get("answer_tokens", 0)  # a daemon of the release before does not say
    ending = f" ({answer:,} of them, at the end, are its answer)" if answer else ""
    yield (
        f"{explained['tokens']:,} tokens{ending}, policy {explained['policy']}, "
        f"{as_one_name(explained['model'])} (namespace {explained['namespace']}{tenant})"
    )
    if explained.get("steering"):
        yield ("now " if again else "") + steering_text(explained["steering"])
    if declined := explained["declined"]:
        yield ": ".join(filter(None, ("no plan", declined, miss_text(declined))))
    else:
        reused = explained["tokens"] - explained["by_kind"].get("recomputed", 0)
        made = explained["generation"]
        yield (
            f"plan: {reused:,} tokens reused, {explained['tokens'] - reused:,} recomputed; "
            + (f"the prompt's rows are then of generation {made}" if made else "exact")
        )
    expected = explained["expected"]
    if expected is not None:
        assumed = assumed_text(expected.get("assumed_speed", 0))  # the release before does not say
        now = " now" if again else ""
        speeds = f"{now}, by the speeds measured since" if again and not assumed else now
        yield (
            f"expected{speeds}: {expected['without']:,.1f} ms without; compute "
            f"{expected['compute']:,.1f} + load {expected['load']:,.1f} + seams "
            f"{expected['seams']:,.1f} ms with it: saves {expected['saving']:,.1f} ms"
            + (f" ({assumed})" if assumed else "")
        )


def fates_table(explained: Found) -> Table:
    """Tokens by kind of reuse, and by the rule that recomputes them."""
    table = _table("tokens")
    add_numbers(table, "", "")
    table.add_column(overflow="fold", style="dim")
    whole = explained["tokens"]
    for kind, style in COLOURS.items():
        count = explained["by_kind"].get(kind, 0)
        if kind != "recomputed":
            table.add_row(Text(kind, style), f"{count:,}", share(count, whole), "")
    by_reason = explained["by_reason"].items()
    for reason, count in sorted(by_reason, key=lambda item: -item[1]):
        label = Text(f"recomputed: {reason}", COLOURS["recomputed"])
        table.add_row(label, f"{count:,}", share(count, whole), REASONS.get(reason, ""))
    return table


def candidates_table(candidates: Sequence[Found], width: int) -> Table:
    """A line for each stored prompt that was nominated, in `width` cells."""
    columns = _candidates(candidates)
    least = {name: longest_word(columns[name]) for name in _WORDS if name in columns}
    widths = fitted(columns, width, least | {"why": _REASON_CHARS}, _DROPPED)
    missing = no_room_for(columns, widths)
    return table_of(columns, widths, _look, caption=missing, caption_justify="left")


def _candidates(candidates: Sequence[Found]) -> Columns:
    columns = {
        "candidate": [Text(short(one["node"])) for one in candidates],
        "score": [Text(f"{one['score']:.3f}") for one in candidates],
    }
    for name in ("prefix", "shared", "kept"):
        columns[name] = [Text(f"{one[name]:,}") for one in candidates]
    columns["found by"] = [Text(", ".join(one["found_by"])) for one in candidates]
    if any(map(source_text, candidates)):
        columns["source"] = [Text(source_text(one)) for one in candidates]
    columns["why"] = [Text(one["why"], "green" if one["taken"] else "") for one in candidates]
    return columns


def _look(name: str) -> dict[str, Any]:
    return {
        "style": "cyan" if name == "candidate" else "",
        "justify": "left" if name in ("candidate", *_WORDS) else "right",
        "overflow": "fold",
        "no_wrap": name not in _WORDS,
    }


def divergence_text(explained: Found) -> Text:
    """Where the prompt leaves the stored one with the longest common beginning."""
    divergence = explained["divergence"]
    at, name = divergence["position"], short(divergence["node"])
    if at == explained["tokens"]:
        return Text(
            f"none: {name} begins with the whole prompt (`kvshare explain --node {name}` plans it "
            "without itself)"
        )
    donors = [one["node"] for one in explained["candidates"] if one["taken"]]
    longest = "" if divergence["node"] in donors else " (not taken; its beginning fits best)"
    text = Text(f"at token {at:,}, from {name}{longest}\n")
    for label, side in (("prompt", "request"), ("stored", "donor")):
        words = printable(divergence[f"{side}_text"]).replace("\n", "↵")
        text.append(f"{label}  ", style="dim").append(f"{words or '(its end)'}\n")
    text.right_crop(1)
    return text


def legend(marked: bool) -> Text:
    """What the colours mean."""
    if marked:
        return Text("  [kind: text], recomputed tokens with the rule", style="dim")
    text = Text("  ")
    for kind, style in COLOURS.items():
        text.append(f"{kind} ", style=style)
    return text


def prompt_text(pieces: Sequence[Found], *, marked: bool, limit: int) -> Text:
    """The whole prompt in one running text, each part in the colour of its kind."""
    text = Text()
    for piece in pieces:
        words = printable(piece["text"])
        words = shortened(words, limit) if limit else words
        if marked:
            words = f"[{piece['reason'] or piece['kind']}: {words}]"
        text.append(words, style=COLOURS[piece["kind"]])
        if not marked and words.isdigit():
            text.append(" ")
    return text


def spans_table(pieces: Sequence[Found]) -> Table:
    """Where each run of reused rows comes from, and the placeholders between them."""
    table = _table("positions")
    table.add_column("tokens", justify="right")
    table.add_column("kind", no_wrap=True)
    table.add_column("from", style="cyan", no_wrap=True)
    table.add_column("at", justify="right")
    for piece in pieces:
        kind = piece["kind"] if piece["donor"] else f"recomputed: {piece['reason']}"
        source = str(piece["source"]) if piece["donor"] else ""
        table.add_row(
            f"{piece['start']}…{piece['stop'] - 1}",
            f"{piece['stop'] - piece['start']:,}",
            Text(kind, COLOURS[piece["kind"]]),
            short(piece["donor"]),
            source,
        )
    return table


def _table(title: str) -> Table:
    table = plain_table()
    table.add_column(title, no_wrap=True)
    return table
