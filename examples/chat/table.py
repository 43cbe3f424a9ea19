"""The measured turns as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from examples.chat.measured import ARMS, Row, Turn, rows

_COLUMNS = (
    "prompt\ntokens", "recomputed\nplain", "\nKVShare", "ms\nplain", "\nKVShare", "\ntimes",
    "same\nanswer",
)  # fmt: skip
LEGEND = (
    "plain: vLLM with its prefix caching alone. KVShare: under policy balanced. recomputed: tokens "
    "of the prompt that the engine computed. ms: time to the first word. times: KVShare's, as a "
    "multiple of plain vLLM's. "
    "Medians over the conversations; 2+: turns 2 and later of all of them."
)


def table(turns: Sequence[Turn]) -> Table:
    """A block for each kind of history: a line for each turn, and one for turns 2 and later."""
    made = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    made.add_column("\nhistory", no_wrap=True)
    for name in _COLUMNS:
        made.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for row in rows(turns):
        if row.history != previous:
            made.add_row(row.history)
        later = row.turn == "2+"
        made.add_row(f"  turn {row.turn}", *_cells(row), style="bold" * later, end_section=later)
        previous = row.history
    return made


def _cells(row: Row) -> list[str]:
    return [
        f"{row.tokens:,.0f}",
        *(f"{row.computed[arm]:,.0f}" for arm in ARMS),
        *(f"{row.seconds[arm] * 1e3:,.0f}" for arm in ARMS),
        f"{row.ratio:.2f}",
        f"{row.same} of {row.n}",
    ]
