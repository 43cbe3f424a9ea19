"""Reads tables in documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("**/*.md")])
Table = list[list[str]]
"""Rows of cells, the header first."""


def tables(text: str) -> Iterator[Table]:
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
            for line in block.splitlines()
        )
        yield [head, *rows]


def tables_of(path: Path, *head: str) -> list[Table]:
    """The tables of a document whose header starts with these cells (or, for one name, ends with
    it)."""
    found = [
        table
        for table in tables(path.read_text())
        if tuple(table[0][: len(head)]) == head or table[0][-len(head) :] == list(head)
    ]
    assert found, f"{path.name} has no table with {head}"
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)
