"""Reads tables and commands in documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("**/*.md")])
Table = list[list[str]]
"""Rows of cells, the header first."""


PROGRAMS = (
    "kvshare", "openssl", "head", "curl", "vllm", "lmcache", "make", "python3?", "pip", "useradd",
    "cp", "systemctl", "docker", "kubectl",
)  # fmt: skip
BEFORE = r"(?:\w+=\S+ )*(?:/\S+/)?"
"""What may stand before a program: variables, and where it is."""
SHOWN = re.compile(rf"{BEFORE}(?:{'|'.join(PROGRAMS)}) ")
"""How a line begins that is a command."""


def commands_of(page: Path) -> Iterator[str]:
    """Commands in the blocks of a page, each on one line."""
    text = re.sub(r"[ ]*\\\n\s*", " ", page.read_text())
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        lines = iter(block.splitlines())
        for line in lines:
            if SHOWN.match(f"{line.strip()} "):
                yield _whole(line, lines)


def _whole(line: str, following: Iterator[str]) -> str:
    """A command without its comment, and with the lines that its quotation marks go on to."""
    command = re.sub(r"\s+# .*", "", line.strip())
    while command.count("'") % 2:
        command = f"{command} {next(following).strip()}"
    return command


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
