"""`kvshare log`: the last requests, how they ended and how long they took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
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
from kvshare_store.cli.fitting import (
    Columns,
    fitted,
    longest_word,
    no_room_for,
    table_of,
    unique_length,
)
from kvshare_store.errors.wording import short
from kvshare_store.readable import (
    KIND_COLOURS,
    age,
    as_one_name,
    assumed_text,
    miss_text,
    one_line,
    outcome_text,
    regret_cell,
    steering_text,
    took,
    verdict_lines,
)

Request = Mapping[str, Any]

COLOURS = {**KIND_COLOURS, "miss": "yellow"}

_DROPPED = ("continued", "lookup", "load", "ago", "recomputed", "exact", "edited", "regret")
"""Columns that a narrow terminal does without, the first one first."""
_TENANT = 16
"""Cells that a tenant has at least."""
_MORE = 4
"""Characters of an id beyond those that tell the ids shown apart: the log has others."""

LimitOption = Annotated[
    int, typer.Option("--limit", "-n", min=1, metavar="N", help="Show at most so many requests.")
]
DeclinedOption = Annotated[bool, typer.Option("--declined", help="Only those without reuse.")]
SlowOption = Annotated[bool, typer.Option("--slow", help="The slowest first, not the newest.")]


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    limit: LimitOption = 30,
    declined: DeclinedOption = False,
    slow: SlowOption = False,
    json: JsonOption = False,
) -> None:
    """Show the last requests: outcome, reason, tokens by kind, times.

    The daemon keeps the last 1,000 in memory, and their text only with the setting log_prompts.
    """
    from kvshare_store.daemon.protocol import ListRequests  # noqa: PLC0415 - not for --help

    chosen = configured(home, config)
    with answering(chosen) as ask:
        found = ask(ListRequests(limit, declined, slow))
    if json:
        print_json(found)
    elif not found:
        kind = "declined requests" if declined else "requests"
        unserved = "" if chosen.connect else ", or none runs"
        typer.echo(f"No {kind} of {place(chosen)} since its daemon started{unserved}.")
    else:
        out = console()
        out.print(requests_table(found, out.width))


def requests_table(requests: Sequence[Request], width: int) -> Table:
    """A line for each request, in `width` cells: what does not fit is left out, and named below."""
    columns = _columns(requests)
    names = [cell.plain for cell in columns["id"]]
    least = {
        "outcome": max(len("outcome"), longest_word(columns["outcome"])),
        "tenant": _TENANT,
        "id": max(unique_length(names), 1 + max(map(_kind_ends, names))) + _MORE,
    }
    widths = fitted(columns, width, least, _DROPPED)
    return table_of(
        columns,
        widths,
        lambda name: _look(name, words=name in least),
        caption=no_room_for(columns, widths),
        caption_justify="left",
    )


def _kind_ends(name: str) -> int:
    """Ids begin with `cmpl-` or `chatcmpl-`, which says nothing."""
    return name.find("-") + 1


def _look(name: str, *, words: bool) -> dict[str, Any]:
    return {
        "style": COLOURS.get(name, "cyan" if name == "id" else ""),
        "justify": "left" if words else "right",
        "overflow": "ellipsis" if name in ("id", "tenant") else "fold",
        "no_wrap": name != "outcome",
    }


def _columns(requests: Sequence[Request]) -> Columns:
    """All that there is to show, column by column."""
    columns = {
        "id": [Text(_name(request)) for request in requests],
        "ago": [Text(age(request["at"])) for request in requests],
        "outcome": [_outcome(request) for request in requests],
        "tokens": [Text(f"{request['tokens']:,}") for request in requests],
    }
    for kind in ("exact", "continued", "edited"):
        columns[kind] = [Text(_some(request[kind])) for request in requests]
    # never left out: without it the others do not add up to the tokens
    columns["cached"] = [Text(_some(request["cached"])) for request in requests]
    columns["recomputed"] = [Text(f"{request['recomputed']:,}") for request in requests]
    for step in ("lookup", "load"):
        columns[step] = [Text(took(request[step])) for request in requests]
    verdicts = [request.get("verdict") for request in requests]
    if any(verdicts):
        columns["regret"] = [Text(regret_cell(verdict)) for verdict in verdicts]
    if any(request["tenant"] for request in requests):
        columns["tenant"] = [Text(one_line(request["tenant"])) for request in requests]
    return columns


def request_lines(request: Request) -> Iterable[str]:
    """One request in full."""
    whose = f", tenant {as_one_name(request['tenant'])}" if request["tenant"] else ""
    yield (
        f"request {_name(request)}, {age(request['at'])} ago: {request['tokens']:,} tokens, policy "
        f"{request['policy'] or 'none'}, {as_one_name(request['model'] or 'no namespace')}{whose}"
    )
    yield (
        f"{_outcome(request)}: {request['exact']:,} exact, {request['continued']:,} continued, "
        f"{request['edited']:,} edited, {request['recomputed']:,} recomputed, "
        f"{request['cached']:,} from the engine's prefix cache"
    )
    if meaning := miss_text(request["reason"]):
        yield f"{request['reason']}: {meaning}"
    if times := ", ".join(_times(request)):
        yield times
    if request.get("steering"):  # a daemon of the release before does not say it
        yield steering_text(request["steering"])
    if request["donors"]:
        yield "donors: " + ", ".join(short(donor) for donor in request["donors"])
    if request["spans"]:
        yield "planned: " + ", ".join(f"{a}…{b - 1} {kind}" for a, b, kind in request["spans"])
    yield from verdict_lines(request.get("verdict"))


def _times(request: Request) -> Iterable[str]:
    """What took time, and what the plan was expected to save; nothing of what there was not."""
    for step in ("lookup", "load"):
        if request[step]:
            yield f"{step} {took(request[step])}"
    if request["held"]:
        yield f"{took(request['held'])} from question to end"
    if prefill := request.get("prefill"):
        yield f"{took(prefill)} from plan to first token"
    if request["saving_ms"]:
        assumed = assumed_text(request.get("assumed_speed", 0))  # the release before does not say
        rests = f" ({assumed})" if assumed else ""
        yield f"the plan was expected to save {request['saving_ms']:,.1f} ms{rests}"


def _name(request: Request) -> str:
    return as_one_name(request["request"]) or str(request["number"])


def _outcome(request: Request) -> Text:
    return Text(outcome_text(request), COLOURS[request["outcome"]])


def _some(count: int) -> str:
    return f"{count:,}" if count else "-"
