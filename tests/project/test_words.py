"""One word for each thing: no second name of the glossary's words is used anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documents import quoted, tables

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "design" / "glossary.md"
SEARCHED = [
    "kvshare_store", "connectors", "benchmarks", "examples", "tests", "docs", ".ci",
    "README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml",
]  # fmt: skip
TEXT = {".md", ".py", ".toml", ".yaml", ""}
OTHERS = (
    "docs/design/glossary.md", "examples/prompts/", "tests/data/", "tests/project/test_words.py",
    "tests/upstream/",
)  # fmt: skip
"""Where the names are listed, and what others wrote."""


def words() -> dict[str, list[str]]:
    """The glossary's words and what else nobody calls them."""
    found = [row for table in tables(GLOSSARY.read_text()) for row in table[1:]]
    assert len({word for word, *_ in found}) == len(found), "a line for each, once"
    return {word: quoted(never) for word, _, never in found}


def spaced(text: str) -> str:
    """Lower case, with identifiers cut into their words: `dropBlock_of` is `drop block of`."""
    return re.sub(r"[\s_-]+", " ", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)).lower()


def second_names(text: str) -> Iterator[str]:
    """The names in a text that the glossary forbids, alone or in the plural."""
    names = [name for never in words().values() for name in never]
    yield from re.findall(rf"\b({'|'.join(map(re.escape, names))})(?:s|es)?\b", spaced(text))


def searched() -> Iterator[Path]:
    """Every text of the project that people read."""
    for top in map(ROOT.joinpath, SEARCHED):
        for path in [top] if top.is_file() else top.rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and path.suffix in TEXT and not name.startswith(OTHERS):
                yield path


def test_no_word_has_a_second_name() -> None:
    paths = list(searched())
    assert len(paths) > 500
    found = {path: sorted(set(second_names(path.read_text()))) for path in paths}
    assert {
        path.relative_to(ROOT).as_posix(): names for path, names in found.items() if names
    } == {}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("def remove_orphans() -> None:", "orphan"),
        ("class DataDirectory:", "data directory"),
        ("a dangling\nblock", "dangling block"),
        ("`ORPHAN`", "orphan"),
    ],
)
def test_second_names_are_found(text: str, name: str) -> None:
    assert list(second_names(text)) == [name]


def test_no_second_name_is_itself_a_word() -> None:
    named = words()
    never = [name for names in named.values() for name in names]
    assert len(never) == len(set(never)) > 50
    assert set(never).isdisjoint(named)
    assert list(second_names("the donor's garbage in its home")) == []
