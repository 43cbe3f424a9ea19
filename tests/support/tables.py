"""The tables of Markdown documents."""

from __future__ import annotations

import re
from collections.abc import Iterator

Table = list[list[str]]
"""Rows of cells, the header first."""


def tables(text: str) -> Iterator[Table]:
    """Every table of a document."""
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
            for line in block.splitlines()
        )
        yield [head, *rows]


def quoted(cell: str) -> list[str]:
    """What stands between backquotes."""
    return re.findall(r"`([^`]+)`", cell)
