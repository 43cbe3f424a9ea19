"""`kvshare stats`: what a store holds, and what its daemon has counted since its start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    add_numbers,
    answering,
    configured,
    console,
    place,
    plain_table,
    print_json,
)
from kvshare_store.readable import age, bar, many, percent, printable, share, size, took

Counts = Mapping[str, Any]


def command(home: HomeOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    """Show lookups, reused tokens, tiers, errors and times.

    Counters start with the daemon. If none runs, only the contents of the store are shown.
    """
    from kvshare_store.daemon.protocol import Stats  # noqa: PLC0415 - seconds, not for --help

    chosen = configured(home, config)
    with answering(chosen) as ask:
        stats = ask(Stats())
    if json:
        print_json(stats)
        return
    served = stats["pid"] is not None
    out = console()
    out.print(headline(place(chosen), stats), soft_wrap=True)
    out.print(serving(stats) if served else NOBODY, soft_wrap=True)
    for table in tables(stats) if served else (tiers_table(stats["tiers"]),):
        out.print()
        out.print(table)


NOBODY = "no daemon runs: nothing is counted"


def serving(stats: Counts) -> str:
    """One line about the daemon and when its counters started."""
    since = datetime.fromtimestamp(stats["since"]).astimezone()
    return (
        f"policy {stats['policy']}, version {stats['version']}, daemon pid {stats['pid']}; "
        f"counted since it started {age(stats['since'])} ago ({since:%Y-%m-%d %H:%M:%S %z})"
    )


def holding(home: str, stats: Counts) -> str:
    """What is there now."""
    return (
        f"{home}: {many(stats['nodes'], 'node')}, {many(stats['blocks'], 'block')}, "
        f"{many(stats['leases'], 'lease')}"
    )


def headline(home: str, stats: Counts) -> str:
    """One line about the contents."""
    return (
        f"{holding(home, stats)}; "
        f"{size(stats['bytes_loaded'])} loaded, {size(stats['bytes_stored'])} stored, "
        f"{many(stats['answers_stored'], 'answer')} of "
        f"{many(stats['tokens_answers_stored'], 'token')}" + settled(stats)
    )


def settled(stats: Counts) -> str:
    """How many edited prompts became exact, if any was stored."""
    edited, exact = stats.get("edited_stored", 0), stats.get("settled", 0)
    return (
        f"; {exact:,} of {edited:,} edited prompts settled ({share(exact, edited)})"
        if edited
        else ""
    )


def tables(stats: Counts) -> Iterable[Table]:
    """All tables that are not empty."""
    yield lookups_table(stats)
    yield tokens_table(stats)
    yield tiers_table(stats["tiers"])
    yield times_table(stats["seconds"])
    if stats.get("scores"):
        yield scores_table(stats["scores"])
    if _known(stats.get("quality")):
        yield quality_table(stats["quality"])
    if stats["declined"]:
        yield counts_table("why lookups ended without reuse", stats["declined"], "yellow")
    if stats["errors"]:
        yield counts_table("errors", stats["errors"], "red")
    if stats["health"]["failures"]:
        yield health_table(stats["health"])


def lookups_table(stats: Counts) -> Table:
    """How lookups ended."""
    rows = {
        "exact prefix": ("hits_exact", "green"),
        "continued": ("hits_continued", "magenta"),
        "edited": ("hits_edited", "cyan"),
        "miss": ("misses", "yellow"),
    }
    return _shares_table("lookups", stats["lookups"], stats, rows)


def tokens_table(stats: Counts) -> Table:
    """What became of the requested tokens."""
    rows = {
        "reused, exact prefix": ("tokens_reused_exact", "green"),
        "reused, continued": ("tokens_reused_continued", "magenta"),
        "reused, edited": ("tokens_reused_edited", "cyan"),
        "engine's prefix cache": ("tokens_engine_cached", "blue"),
        "recomputed": ("tokens_recomputed", "yellow"),
    }
    whole = stats["tokens_requested"]
    waiting = whole - sum(stats.get(name, 0) for name, _ in rows.values())
    if waiting > 0:
        rows["not finished"] = ("waiting", "dim")
    return _shares_table("tokens requested", whole, {**stats, "waiting": waiting}, rows)


def tiers_table(tiers: Mapping[str, Mapping[str, int]]) -> Table:
    """Bytes of each tier beside its budget."""
    table = _table("tiers", 8)
    add_numbers(table, "blocks", "used", "budget", "share")
    table.add_column("")
    for name, use in tiers.items():
        used, budget = use["bytes"], use["budget"]
        cells = (f"{use['blocks']:,}", size(used), size(budget), share(used, budget))
        table.add_row(name, *cells, _bar(used, budget, "red" if used > 0.95 * budget else "blue"))
    return table


def times_table(seconds: Mapping[str, Mapping[str, float]]) -> Table:
    """Median and 99th percentile of the times of the daemon's work."""
    table = _table("times")
    add_numbers(table, "p50", "p99")
    for name, values in seconds.items():
        table.add_row(name, took(values["p50"]), took(values["p99"]))
    return table


def scores_table(scores: Mapping[str, Mapping[str, Counts]]) -> Table:
    """What second looks have said of answers, by policy; `control`: of those served in full."""
    table = _table("answers scored, by policy")
    add_numbers(table, "answers", "regret/token", "diverged")
    for policy, sums in sorted(scores.items()):
        for chosen, one in sorted(sums.items()):
            diverged = share(one["diverged"], one["answers"]) if chosen == "greedy" else "-"
            regret = f"{one['regret'] / one['tokens']:.4f}"
            table.add_row(f"{policy}, {chosen}", f"{one['answers']:,}", regret, diverged)
    return table


def _known(quality: Counts | None) -> bool:
    """Whether there is a bound or a class; daemons before scores say nothing."""
    return bool(quality and (quality["bound"] or any(quality["classes"].values())))


def quality_table(quality: Counts) -> Table:
    """How many classes of traffic get each policy, and the limits of the extra rate of divergence
    of the class where they are highest."""
    bound = (
        f"bound {percent(quality['bound'])}, confidence {percent(quality['confidence'])}"
        if quality["bound"]
        else "no bound"
    )
    table = _table(f"quality: {bound}")
    add_numbers(table, "classes", "highest extra divergence")
    for policy, count in quality["classes"].items():
        known = quality.get("shown", quality["extra"]).get(policy)  # the release before: all
        few = "too few scores" if policy in quality["extra"] else "-"
        highest = f"{percent(known['lower'])} to {percent(known['upper'])}" if known else few
        table.add_row(policy, f"{count:,}", highest)
    for name in ("doubted", "silent"):
        if quality.get(name):  # a daemon of the release before counts no doubt
            table.add_row(DOUBTS[name], f"{quality[name]:,}", "")
    return table


DOUBTS = {
    "doubted": "in doubt: more diverge lately",
    "silent": "silent: not scored for long",
}
"""Classes whose policies do not stand, whatever the mean so far."""


def counts_table(title: str, counts: Mapping[str, int], style: str) -> Table:
    """Labelled counters, the largest first."""
    table = _table(title)
    table.add_column("", justify="right", style=style)
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(name, f"{count:,}")
    return table


def health_table(health: Counts) -> Table:
    """How often each part of the daemon has failed, and the error of those that fail now."""
    table = _table(f"health: {health['state']}")
    table.add_column("failures", justify="right", style="red")
    table.add_column("error now", overflow="fold")
    for part, count in sorted(health["failures"].items()):
        table.add_row(part, f"{count:,}", printable(health["reasons"].get(part, "")))
    return table


def _shares_table(
    title: str, whole: int, stats: Counts, rows: Mapping[str, tuple[str, str]]
) -> Table:
    table = _table(f"{title}: {whole:,}")
    add_numbers(table, "", "")
    table.add_column()
    for label, (name, style) in rows.items():
        count = stats.get(name, 0)  # an older daemon does not count all
        table.add_row(label, f"{count:,}", share(count, whole), _bar(count, whole, style))
    return table


def _table(title: str, width: int = 22) -> Table:
    """A table titled by the head of its first column; with a bar it fits into 80 columns."""
    table = plain_table(header_style="bold")
    table.add_column(title, min_width=width, no_wrap=True)
    return table


def _bar(part: int, whole: int, style: str) -> Text:
    return Text(bar(part, whole), style=style)
