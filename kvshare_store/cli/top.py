"""`kvshare top`: watch a store at work."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvshare_store.cli.common import ConfigOption, HomeOption, configured, console, place
from kvshare_store.cli.log import requests_table
from kvshare_store.cli.stats import headline, tiers_table
from kvshare_store.readable import milliseconds, share, size

Counts = Mapping[str, Any]

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
) -> None:
    """Watch lookups, reuse, tiers and the last requests until Ctrl-C.

    Without a terminal it prints plain lines.
    """
    from kvshare_store.daemon.client import Client  # noqa: PLC0415 - seconds, not for --help
    from kvshare_store.daemon.network import place_of  # noqa: PLC0415
    from kvshare_store.daemon.protocol import ListRequests, Stats  # noqa: PLC0415

    chosen = configured(home, config)
    out = console()
    with Client(place_of(chosen)) as client:  # opening an idle home each time would only lock it
        ask = client.call
        before, at = ask(Stats()), time.monotonic()
        with _screen(out) as live:
            seen = 0
            while not count or seen < count:
                try:
                    time.sleep(interval)
                except KeyboardInterrupt:
                    return
                now, then = ask(Stats()), time.monotonic()
                rates = per_second(before, now, then - at)
                if out.is_terminal:
                    last = ask(ListRequests(max(3, out.height - 16)))
                    live.update(view(place(chosen), now, rates, last, out.width), refresh=True)
                else:
                    out.print(line(now, rates), soft_wrap=True)
                before, at, seen = now, then, seen + 1


def _screen(out: Console) -> Live:
    """A screen of its own on a terminal; where there is none it shows nothing."""
    return Live(Text(), console=out, screen=out.is_terminal, auto_refresh=False, transient=True)


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
        Text(headline(home, now), "bold"),
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
            )
        ),
        Text(),
        tiers_table(now["tiers"]),
        Text(),
    ]
    parts.append(requests_table(last, width) if last else Text("no requests yet", "dim"))
    return Group(*parts)
