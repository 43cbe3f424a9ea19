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

FOOTNOTE = (
    "reuse, recomputed: tokens. ROUGE-L compares answers: two computations of one prompt differ in "
    "bf16, so prefix caching is below 1 too. Few requests miss here, so their cost is mostly noise."
)
NEXT = "Next: docs/start.md, With your vLLM 0.32. The commands are in .venv/bin."


def show(report: dict[str, Any], results: Results, console: Console) -> None:
    """The table, the summary, and one answer side by side."""
    console.rule(f"Time to first token, KVShare under policy {POLICY}")
    console.print(follower_table(report["followers"]))
    console.print(summary_panel(report["summary"]))
    console.print(FOOTNOTE, style="dim")
    if results.followers:
        console.print(side_by_side(pick_example(results.followers)))
    console.print(NEXT, highlight=False)


def follower_table(rows: Iterable[dict[str, Any]]) -> Table:
    """One row for each follower."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    table.add_column("\nfamily", no_wrap=True)
    for name in ("\ntokens", "exact\nreuse", "edited\nreuse", "recom-\nputed"):
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
    """Labels and values of the summary; prompts that were not sent have no line."""
    light, long, floor = (
        summary[key] for key in ("speedup_1k_10pct", "speedup_1k_balanced", "noise_floor")
    )
    full, prefix = summary["median_speedup_vs_full"], summary["median_speedup_vs_prefix"]
    again = summary["identical_again_speedup"]
    return [
        ("First token sooner than full prefill's", times_text(full)),
        ("First token sooner than prefix caching's", times_text(prefix)),
        (f"  than full, {LONG:,} tokens and more", n_text(long)),
        (f"  the same, at most {LIGHT:.0%} recomputed", n_text(light)),
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
