"""From measurements to demo-report.json, a table, and a verdict."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from examples.engines.engine import Answer

LONG = 1000
"""Tokens from which a prompt counts as long."""
LIGHT = 0.10
"""Share of a prompt's tokens up to which recomputing it counts as light."""


Times = dict[str, list[float]]
"""Seconds to first token, by what served the prompt; one value a repetition."""


@dataclass(frozen=True)
class Reuse:
    """Where a prompt's KV came from; the three numbers add up to its tokens."""

    exact: int
    edited: int
    recomputed: int


@dataclass
class FollowerResult:
    """One follower, measured by every arm in every repetition."""

    family: str
    ttfts: Times = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    reuses: list[Reuse] = field(default_factory=list)

    def add(self, arm: str, answer: Answer) -> None:
        """Keep every time, and the first repetition's answer."""
        self.ttfts.setdefault(arm, []).append(answer.ttft_s)
        self.answers.setdefault(arm, answer)

    def ttft(self, arm: str) -> float:
        """Median over the repetitions, seconds."""
        return statistics.median(self.ttfts[arm])

    @property
    def answered(self) -> bool:
        """Whether every arm gave at least one token."""
        return all(answer.token_ids for answer in self.answers.values())

    @property
    def reuse(self) -> Reuse:
        """The repetition with the median number of recomputed tokens."""
        ranked = sorted(self.reuses, key=lambda reuse: reuse.recomputed)
        return ranked[(len(ranked) - 1) // 2]


@dataclass
class Results:
    """Everything one run measured."""

    followers: list[FollowerResult] = field(default_factory=list)
    misses: list[Times] = field(default_factory=list)
    """For each prompt that resembles no other: what `full` and `kvshare` took."""
    repeated: list[Times] = field(default_factory=list)
    """For each prompt sent twice: what `full` and `again`, the second time, took."""
    errors: dict[str, int] = field(default_factory=dict)
    """What the store counted as failures."""


# --- the report -----------------------------------------------------------------------------------


def build_report(engine: str, model: str, results: Results) -> dict[str, Any]:
    """The content of demo-report.json."""
    rows = [follower_row(follower) for follower in results.followers]
    return {
        "engine": engine,
        "model": model,
        "machine": machine(),
        "followers": rows,
        "summary": summarise(rows, results),
    }


def follower_row(follower: FollowerResult) -> dict[str, Any]:
    """One follower as it stands in the report."""
    full, ours = follower.answers["full"], follower.answers["kvshare"]
    return {
        "family": follower.family,
        "tokens": full.tokens,
        "reused_exact": follower.reuse.exact,
        "reused_edited": follower.reuse.edited,
        "recomputed": follower.reuse.recomputed,
        "ttft_full_s": round(follower.ttft("full"), 5),
        "ttft_prefix_s": round(follower.ttft("prefix"), 5),
        "ttft_kvshare_s": round(follower.ttft("kvshare"), 5),
        "first_token_same": full.token_ids[:1] == ours.token_ids[:1],
        "rougeL_vs_full": round(rouge_l(full.text, ours.text), 4),
    }


def summarise(rows: Sequence[dict[str, Any]], results: Results) -> dict[str, Any]:
    """The numbers one would quote, each as a ratio of two measurements of this run."""
    long = [row for row in rows if row["tokens"] >= LONG]
    light = [row for row in long if row["recomputed"] <= LIGHT * row["tokens"]]
    tokens = sum(row["tokens"] for row in rows)
    reused = sum(row["reused_exact"] + row["reused_edited"] for row in rows)
    return {
        "median_speedup_vs_full": median(speedups(rows, "full")),
        "median_speedup_vs_prefix": median(speedups(rows, "prefix")),
        "share_reused": rounded(reused / tokens) if tokens else None,
        "first_token_agreement": mean([row["first_token_same"] for row in rows]),
        "miss_overhead": median([ratio(times, "kvshare", "full") - 1 for times in results.misses]),
        "misses": len(results.misses),
        "mean_rougeL_vs_full": mean([row["rougeL_vs_full"] for row in rows]),
        "speedup_1k_10pct": {"median": median(speedups(light, "full")), "n": len(light)},
        "speedup_1k_balanced": {"median": median(speedups(long, "full")), "n": len(long)},
        "identical_again_speedup": median(
            [ratio(times, "full", "again") for times in results.repeated]
        ),
        "noise_floor": noise_floor(results.followers),
        "store_errors": results.errors,
    }


def noise_floor(followers: Sequence[FollowerResult]) -> dict[str, Any]:
    """How far two ways of computing the same thing exactly differ on this machine.

    With a cached prefix the engine computes the very same KV in batches of other sizes, so only the
    rounding differs. Reuse of edited KV cannot be asked to agree with full prefill more than this.
    """
    pairs = [(follower.answers["full"], follower.answers["prefix"]) for follower in followers]
    return {
        "first_token_agreement": mean([a.token_ids[:1] == b.token_ids[:1] for a, b in pairs]),
        "mean_rougeL_vs_full": mean([rouge_l(a.text, b.text) for a, b in pairs]),
    }


def speedups(rows: Iterable[dict[str, Any]], arm: str) -> list[float]:
    """How many times sooner KVShare's first token came than that arm's."""
    return [row[f"ttft_{arm}_s"] / row["ttft_kvshare_s"] for row in rows]


def ratio(times: Times, over: str, under: str) -> float:
    """How many times as long one way took as the other, by their medians."""
    return statistics.median(times[over]) / statistics.median(times[under])


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return rounded(statistics.median(values)) if values else None


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return rounded(statistics.fmean(values)) if values else None


def rounded(value: float) -> float:
    """Four digits: more would be noise."""
    return round(value, 4)


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L F-measure of two texts; equal texts score 1 even when they have no words."""
    if reference == answer:
        return 1.0
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = cpu_info()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "amx": "amx_tile" in cpu.get("flags", "").split(),
    }


def cpu_info(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What Linux says about the first CPU; nothing elsewhere."""
    try:
        first = path.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


# --- the verdict ----------------------------------------------------------------------------------


def problems(results: Results) -> list[str]:
    """Why the job did not work, a line each; empty if it did."""
    silent = [f.family for f in results.followers if not f.answered]
    found = []
    if not results.followers or silent:
        found.append(f"not every follower was answered: {', '.join(silent) or 'none was sent'}")
    if not any(follower.reuse.edited for follower in results.followers):
        found.append("no follower reused edited KV")
    if errors := {kind: count for kind, count in results.errors.items() if count}:
        found.append(f"the store counted errors: {errors}")
    return found


# --- the terminal ---------------------------------------------------------------------------------


def show(report: dict[str, Any], results: Results, console: Console) -> None:
    """The table, the summary, and one answer side by side."""
    console.rule("Time to first token")
    console.print(follower_table(report["followers"]))
    console.print(summary_panel(report["summary"]))
    if results.followers:
        console.print(side_by_side(pick_example(results.followers)))


def follower_table(rows: Iterable[dict[str, Any]]) -> Table:
    """One row for each follower."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    table.add_column("\nfamily", no_wrap=True)
    for name in ("\ntokens", "exact\nreuse", "edited\nreuse", "com-\nputed"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("full\nms", "prefix\nms", "KVShare\nms", "\nfaster"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first\ntoken", no_wrap=True)
    table.add_column("ROUGE\nL", justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, row["family"]):
            table.add_section()
        table.add_row(row["family"] if row["family"] != previous else "", *cells(row))
        previous = row["family"]
    return table


def cells(row: dict[str, Any]) -> list[str]:
    """A table row without its first cell."""
    counts = [row[name] for name in ("tokens", "reused_exact", "reused_edited", "recomputed")]
    times = [row[f"ttft_{arm}_s"] for arm in ("full", "prefix", "kvshare")]
    return [
        *(f"{count:,}" for count in counts),
        *(f"{seconds * 1e3:,.0f}" for seconds in times),
        f"[bold]{times[0] / times[2]:.1f}×[/]",  # noqa: RUF001
        "[green]same[/]" if row["first_token_same"] else "[yellow]other[/]",
        f"{row['rougeL_vs_full']:.2f}",
    ]


def summary_panel(summary: dict[str, Any]) -> Panel:
    """The summary in words."""
    grid = Table.grid(padding=(0, 2))
    for label, value in summary_lines(summary):
        grid.add_row(label, value)
    return Panel(grid, title="Summary", title_align="left", expand=False)


def summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the summary says, as pairs of a label and a value; nothing of what was not sent."""
    light, long, floor = (
        summary[key] for key in ("speedup_1k_10pct", "speedup_1k_balanced", "noise_floor")
    )
    full, prefix = summary["median_speedup_vs_full"], summary["median_speedup_vs_prefix"]
    again = summary["identical_again_speedup"]
    return [
        ("First token sooner than full prefill's", times_text(full)),
        ("First token sooner than prefix caching's", times_text(prefix)),
        (f"  than full, {LONG:,} tokens and more", n_text(long)),
        (f"  than full, of these at most {LIGHT:.0%} computed", n_text(light)),
        *([("Identical prompt again", times_text(again))] if again is not None else []),
        ("Tokens reused", percent(summary["share_reused"])),
        ("Cost of a miss", f"{percent(summary['miss_overhead'])} (n={summary['misses']})"),
        (
            "First token same as full prefill's",
            f"{percent(summary['first_token_agreement'])} "
            f"(prefix caching: {percent(floor['first_token_agreement'])})",
        ),
        (
            "ROUGE-L with full prefill's answer",
            f"{number(summary['mean_rougeL_vs_full'])} "
            f"(prefix caching: {number(floor['mean_rougeL_vs_full'])})",
        ),
    ]


def n_text(part: dict[str, Any]) -> str:
    """A speedup and of how many followers it is the median."""
    return f"{times_text(part['median'])} (n={part['n']})"


def times_text(value: float | None) -> str:
    """A speedup."""
    return "–" if value is None else f"{value:.1f}×"  # noqa: RUF001


def percent(value: float | None) -> str:
    """A share."""
    return "–" if value is None else f"{value:.1%}"  # noqa: RUF001


def number(value: float | None) -> str:
    """A plain number."""
    return "–" if value is None else f"{value:.2f}"  # noqa: RUF001


def pick_example(followers: Sequence[FollowerResult]) -> FollowerResult:
    """The two readers of the seed paper's figure if they were measured; never by its outcome."""
    return next((f for f in followers if f.family == "book_character"), followers[0])


def side_by_side(follower: FollowerResult) -> Columns:
    """The beginnings of one answer, computed in full and with reuse."""
    titles = {"full": "computed in full", "kvshare": "with KVShare"}
    return Columns(
        [
            Panel(
                Text(follower.answers[arm].text.strip()),
                title=f"{follower.family}, {title}",
            )
            for arm, title in titles.items()
        ],
        equal=True,
        expand=True,
    )
