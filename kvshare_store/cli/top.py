"""`kvshare top`: watch a store at work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    configured,
    console,
    place,
    print_json_line,
)
from kvshare_store.cli.log import requests_table
from kvshare_store.cli.stats import holding, tiers_table
from kvshare_store.errors import UnavailableError
from kvshare_store.readable import milliseconds, share, size

if TYPE_CHECKING:
    from kvshare_store.cli.upkeep import Ask
    from kvshare_store.daemon.client import Client

Counts = Mapping[str, Any]
Look = tuple[Counts, dict[str, float]]
"""Counters, and their rates since the look before."""

_REUSED = ("tokens_reused_exact", "tokens_reused_continued", "tokens_reused_edited")
_RATES = ("lookups", "misses", "tokens_requested", *_REUSED, "bytes_loaded", "bytes_stored")

IntervalOption = Annotated[
    float,
    typer.Option(
        "--interval", "-i", min=0.1, max=86400, metavar="SECONDS", help="Between two looks."
    ),
]
CountOption = Annotated[
    int, typer.Option("--count", "-c", min=0, metavar="N", help="Look so often, then end; 0: on.")
]


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    interval: IntervalOption = 2.0,
    count: CountOption = 0,
    json: JsonOption = False,
) -> None:
    """Watch lookups, reuse, tiers and the last requests until Ctrl-C.

    Without a terminal it prints plain lines; with --json each is an object.
    """
    from kvshare_store.daemon.client import Client  # noqa: PLC0415 - seconds, not for --help
    from kvshare_store.daemon.network import place_of  # noqa: PLC0415

    chosen = configured(home, config)
    out = console()
    # opening an idle home each time would only lock it; Ctrl-C is how watching ends
    with Client(place_of(chosen)) as client, contextlib.suppress(KeyboardInterrupt):
        _need_daemon(client)
        looks = _looks(client.call, interval, count)
        if out.is_terminal and not json:
            _watch(looks, client.call, place(chosen), out)
            return
        for now, rates in looks:
            if json:
                print_json_line({"time": time.time(), "per_second": rates, "stats": now})
            else:
                out.print(line(now, rates), soft_wrap=True)


def _need_daemon(client: Client) -> None:
    """`UnavailableError` that says how to start one here, if none runs."""
    try:
        client.greet()
    except UnavailableError as error:
        if client.remote:
            raise
        raise UnavailableError(f"{error}; start one: kvshare serve --home {client.home}") from error


def _looks(ask: Ask, interval: float, count: int) -> Iterator[Look]:
    """Look at intervals, so often or for ever."""
    from kvshare_store.daemon.protocol import Stats  # noqa: PLC0415 - seconds, not for --help

    before, at = ask(Stats()), time.monotonic()
    seen = 0
    while not count or seen < count:
        time.sleep(interval)
        now, then = ask(Stats()), time.monotonic()
        yield now, per_second(before, now, then - at)
        before, at, seen = now, then, seen + 1


def _watch(looks: Iterable[Look], ask: Ask, home: str, out: Console) -> None:
    """Show each look on a screen of its own."""
    from kvshare_store.daemon.protocol import ListRequests  # noqa: PLC0415 - see `_looks`

    with Live(Text(), console=out, screen=True, auto_refresh=False, transient=True) as live:
        for now, rates in looks:
            last = ask(ListRequests(max(3, out.height - 16)))
            live.update(view(home, now, rates, last, out.width), refresh=True)


def per_second(before: Counts, now: Counts, seconds: float) -> dict[str, float]:
    """The rate of each counter; the counters of a restarted daemon begin at zero."""
    began_anew = before.get("since") != now.get("since") or before["pid"] != now["pid"]
    return {
        name: (now[name] - (0 if began_anew else before[name])) / max(seconds, 1e-9)
        for name in _RATES
    }


def line(now: Counts, rates: Mapping[str, float]) -> str:
    """One look in one line."""
    host = now["tiers"].get("host", {"bytes": 0})["bytes"]
    return (
        f"{time.strftime('%H:%M:%S')} lookups {rates['lookups']:.1f}/s "
        f"misses {rates['misses']:.1f}/s tokens {rates['tokens_requested']:,.0f}/s "
        f"reused {_reused(rates)} loaded {size(round(rates['bytes_loaded']))}/s "
        f"stored {size(round(rates['bytes_stored']))}/s nodes {now['nodes']:,} "
        f"leases {now['leases']:,} host {size(host)} "
        f"lookup p99 {milliseconds(now['seconds']['lookup']['p99'])}"
    )


def _reused(rates: Mapping[str, float]) -> str:
    reused = sum(rates[name] for name in _REUSED)
    return share(round(1000 * reused), round(1000 * rates["tokens_requested"]))


def view(
    home: str, now: Counts, rates: Mapping[str, float], last: Sequence[Counts], width: int
) -> RenderableType:
    """One look for a terminal of `width` cells."""
    seconds = now["seconds"]
    parts: list[RenderableType] = [
        Text(holding(home, now), "bold"),
        Text(
            f"{rates['lookups']:.1f} lookups/s, {rates['misses']:.1f} misses/s, "
            f"{rates['tokens_requested']:,.0f} tokens/s of which {_reused(rates)} reused; "
            f"{size(round(rates['bytes_loaded']))}/s loaded, "
            f"{size(round(rates['bytes_stored']))}/s stored"
        ),
        Text(
            ", ".join(
                f"{name} p50 {milliseconds(times['p50'])} p99 {milliseconds(times['p99'])}"
                for name, times in seconds.items()
                if times["p99"]
            )
        ),
        Text(),
        tiers_table(now["tiers"]),
        Text(),
    ]
    parts.append(requests_table(last, width) if last else Text("no requests yet", "dim"))
    return Group(*parts)
