"""`kvshare log`: the last requests, how they ended and how long they took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from kvshare_store.readable import KIND_COLOURS, age, milliseconds, printable, short

Request = Mapping[str, Any]

COLOURS = {**KIND_COLOURS, "miss": "yellow"}

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

    The daemon keeps the last 1,000 in memory, without their text.
    """
    from kvshare_store.daemon.protocol import ListRequests  # noqa: PLC0415 - not for --help

    chosen = configured(home, config)
    with answering(chosen) as ask:
        found = ask(ListRequests(limit, declined, slow))
    if json:
        print_json(found)
    elif not found:
        kind = "declined requests" if declined else "requests"
        typer.echo(f"No {kind} of {place(chosen)} since its daemon started, or none runs.")
    else:
        console().print(requests_table(found))


def requests_table(requests: Sequence[Request]) -> Table:
    """A line for each request."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("id", style="cyan", overflow="ellipsis", max_width=20)
    table.add_column("ago", justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold", min_width=9)
    table.add_column("tokens", justify="right", no_wrap=True)
    for kind in ("exact", "continued", "edited"):
        table.add_column(kind, justify="right", style=COLOURS[kind], no_wrap=True)
    table.add_column("computed", justify="right", no_wrap=True)
    table.add_column("lookup", justify="right", no_wrap=True)
    table.add_column("load", justify="right", no_wrap=True)
    whose = any(request["tenant"] for request in requests)
    if whose:
        table.add_column("tenant", overflow="ellipsis", max_width=16)
    for request in requests:
        cells: tuple[str | Text, ...] = (
            _name(request),
            age(request["at"]),
            _outcome(request),
            f"{request['tokens']:,}",
            *(_some(request[kind]) for kind in ("exact", "continued", "edited")),
            f"{request['recomputed']:,}",
            _time(request["lookup"]),
            _time(request["load"]),
        )
        tenant = [Text(printable(request["tenant"]))] if whose else []
        table.add_row(*cells, *tenant)
    return table


def request_lines(request: Request) -> Iterable[str]:
    """One request in full."""
    whose = f", tenant {printable(request['tenant'])}" if request["tenant"] else ""
    yield (
        f"request {_name(request)}, {age(request['at'])} ago: {request['tokens']:,} tokens, policy "
        f"{request['policy'] or 'none'}, {printable(request['model'] or 'no namespace')}{whose}"
    )
    yield (
        f"{_outcome(request)}: {request['exact']:,} exact, {request['continued']:,} continued, "
        f"{request['edited']:,} edited, {request['recomputed']:,} computed, "
        f"{request['cached']:,} from the engine's prefix cache"
    )
    yield (
        f"lookup {_time(request['lookup'])}, load {_time(request['load'])}, "
        f"{_time(request['held'])} from question to end; the plan was expected to save "
        f"{request['saving_ms']:,.1f} ms"
    )
    if request["donors"]:
        yield "donors: " + ", ".join(short(donor) for donor in request["donors"])
    if request["spans"]:
        yield "planned: " + ", ".join(f"{a}…{b - 1} {kind}" for a, b, kind in request["spans"])


def _name(request: Request) -> str:
    return printable(request["request"]) or str(request["number"])


def _outcome(request: Request) -> Text:
    reason = f": {printable(request['reason'])}" if request["reason"] else ""
    return Text(f"{request['outcome']}{reason}", COLOURS[request["outcome"]])


def _some(count: int) -> str:
    return f"{count:,}" if count else "-"


def _time(seconds: float) -> str:
    return milliseconds(seconds) if seconds else "-"
