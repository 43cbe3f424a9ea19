"""Parts of the documents that are made from the code.

Each stands between two comments; the first says which part it is and how it is made anew:

    <!-- messages: made by python -m tests.support.protocol_page -->
    …
    <!-- end of messages -->

What is outside of them is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

Parts = dict[str, str]
"""Markdown by the name of the part."""
_PART = re.compile(
    r"(?P<begin><!-- (?P<name>[^:\n]+): made by [^\n]+ -->\n)\n(?P<text>.*?)"
    r"(?P<end>\n<!-- end of (?P=name) -->)",
    re.DOTALL,
)


def parts_in(page: Path) -> Parts:
    """The parts as they stand in a page."""
    return {found["name"]: found["text"].rstrip("\n") for found in _PART.finditer(page.read_text())}


def remake(page: Path, parts: Parts) -> None:
    """Write the parts of a page anew; it must have places for exactly these."""
    assert parts_in(page).keys() == parts.keys(), f"{page.name}: the marks name other parts"

    def made(found: re.Match[str]) -> str:
        return f"{found['begin']}\n{parts[found['name']]}\n{found['end']}"

    page.write_text(_PART.sub(made, page.read_text()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([_row(head), "|" + "---|" * len(head), *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def code(text: str) -> str:
    """Source, in a cell of a table."""
    return cell(f"`{text}`")


def cell(text: str) -> str:
    """Text of several lines, in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def listed(cells: Iterable[str]) -> str:
    """Several things in a cell, one below the other."""
    return "<br>".join(cells) or "–"  # noqa: RUF001
