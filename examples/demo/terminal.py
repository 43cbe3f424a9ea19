"""The report in the terminal: a table, a summary, and one answer side by side."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from examples.demo.report import LIGHT, LONG, POLICY, FollowerResult, Results

FOOTNOTES = (
    "Reuse and recomputed are tokens, together those of the prompt. Shown are the prompts that "
    "resemble an earlier one; the others that were served are those, and a few that resemble none.",
    "ROUGE-L compares an answer with that of full prefill, prefix L that of prefix caching: two "
    "computations of one prompt differ in bf16, so both may be far below 1.",
    "Times are noisy on a busy machine: prefix caching computes no more than full prefill, so "
    "where it takes longer, something else ran.",
)
ENOUGH_MISSES = 8
"""Prompts that resemble none, from which on their cost is more than noise."""
NEXT = "Next: docs/start.md, With your vLLM 0.32. The commands are in .venv/bin."


def show(report: dict[str, Any], results: Results, console: Console) -> None:
    """The table, the summary, and one answer side by side."""
    console.rule(f"Time to first token, KVShare under policy {POLICY}")
    console.print(follower_table(report["followers"]))
    console.print(summary_panel(report["summary"]))
    for note in FOOTNOTES:
        console.print(note, style="dim")
    if results.followers:
        console.print(side_by_side(pick_example(results.followers)))
    console.print(NEXT, highlight=False)


def follower_table(rows: Iterable[dict[str, Any]]) -> Table:
    """One row for each follower."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    table.add_column("\nfamily", no_wrap=True)
    for name in ("exact\nreuse", "edited\nreuse", "recom-\nputed"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("full\nms", "prefix\nms", "KVShare\nms", "speed\nup"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first\ntoken", no_wrap=True)
    for name in ("ROUGE\nL", "prefix\nL"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, row["family"]):
            table.add_section()
        table.add_row(row["family"] if row["family"] != previous else "", *cells(row))
        previous = row["family"]
    return table


def cells(row: dict[str, Any]) -> list[str]:
    """A table row without its first cell."""
    counts = [row[name] for name in ("reused_exact", "reused_edited", "recomputed")]
    times = [row[f"ttft_{arm}_s"] for arm in ("full", "prefix", "kvshare")]
    return [
        *(f"{count:,}" for count in counts),
        *(f"{seconds * 1e3:,.0f}" for seconds in times),
        f"[bold]{times[0] / times[2]:.1f}×[/]",  # noqa: RUF001
        "[green]same[/]" if row["first_token_same"] else "[yellow]other[/]",
        *(f"{row[name]:.2f}" for name in ("rougeL_vs_full", "rougeL_prefix_vs_full")),
    ]


def summary_panel(summary: dict[str, Any]) -> Panel:
    """The summary in words."""
    grid = Table.grid(padding=(0, 2))
    for label, value in summary_lines(summary):
        grid.add_row(label, value)
    return Panel(grid, title="Summary", title_align="left", expand=False)


def summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of the summary; prompts that were not sent have no line."""
    light, long, floor = (
        summary[key] for key in ("speedup_1k_10pct", "speedup_1k_balanced", "noise_floor")
    )
    full, prefix = summary["median_speedup_vs_full"], summary["median_speedup_vs_prefix"]
    again = summary["identical_again_speedup"]
    return [
        ("Speedup over full prefill", times_text(full)),
        (f"  of prompts of {LONG:,} tokens and more", n_text(long)),
        (f"  of those, at most {LIGHT:.0%} recomputed", n_text(light)),
        ("Speedup over prefix caching", times_text(prefix)),
        *([("Speedup of an identical prompt", times_text(again))] if again is not None else []),
        ("Tokens reused", percent(summary["share_reused"])),
        *([("Cost of a miss", miss_text(summary))] if summary["misses"] >= ENOUGH_MISSES else []),
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


def miss_text(summary: dict[str, Any]) -> str:
    """What a miss costs, and of how many that is the median."""
    return f"{percent(summary['miss_overhead'])} (n={summary['misses']})"


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
    """The two readers of the paper's figure if they were measured; the outcome plays no part."""
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
