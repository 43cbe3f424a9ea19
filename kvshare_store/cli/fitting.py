"""Tables that fit a terminal: which columns stay, and how wide those are that may be cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from kvshare_store.cli.common import plain_table

Columns = dict[str, list[Text]]
"""Cells by the head of their column."""

GAP = 2
"""Blanks between two columns: the padding of `table_of` and its divider."""


def fitted(
    columns: Columns, width: int, least: Mapping[str, int], drop: Sequence[str]
) -> dict[str, int]:
    """The widths of the columns that fit into `width` cells, in order.

    `least`: columns that may be cut, and how far; what room is left goes to them in this order.
    `drop`: columns that are left out where that is not enough, the first one first.
    """
    whole = {name: _width(name, cells) for name, cells in columns.items()}
    widths = {name: min(wide, least.get(name, wide)) for name, wide in whole.items()}
    for name in drop:
        if _total(widths) <= width:
            break
        widths.pop(name, None)
    room = max(0, width - _total(widths))
    for name in (name for name in least if name in widths):
        more = min(room, whole[name] - widths[name])
        widths[name] += more
        room -= more
    return widths


def table_of(
    columns: Columns,
    widths: Mapping[str, int],
    look: Callable[[str], Mapping[str, Any]],
    **more: Any,
) -> Table:
    """The columns that have a width, a line for each row; `look`: how a column is shown, `more`:
    what else rich's `Table` takes."""
    table = plain_table(padding=(0, 1, 0, 0), **more)
    for name, wide in widths.items():
        table.add_column(name, width=wide, **look(name))
    for row in zip(*(columns[name] for name in widths), strict=True):
        table.add_row(*row)
    return table


def no_room_for(columns: Columns, widths: Mapping[str, int]) -> str | None:
    """Names what is left out, for the line below a table; None if nothing is."""
    missing = ", ".join(name for name in columns if name not in widths)
    return f"no room for: {missing}" if missing else None


def unique_length(names: Collection[str]) -> int:
    """How many characters of names tell them apart."""
    different = set(names)
    longest = max(map(len, different), default=0)
    lengths = range(1, longest + 1)
    return next((n for n in lengths if len({x[:n] for x in different}) == len(different)), longest)


def longest_word(cells: Sequence[Text]) -> int:
    """Where a column can be broken at blanks, its least width."""
    return max((len(word) for cell in cells for word in cell.plain.split()), default=0)


def _width(name: str, cells: Sequence[Text]) -> int:
    head = (Text(line).cell_len for line in name.splitlines())
    return max(*head, *(cell.cell_len for cell in cells), 0)


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)
