"""The files that a serve and a save pass are those that the note on the architecture lists."""

from __future__ import annotations

from pathlib import Path

from tests.support.documents import DOCS
from tests.support.passed import passed, table


def test_the_files_of_a_serve_and_a_save_are_listed(tmp_path: Path) -> None:
    """`python -m tests.support.passed` prints the table anew."""
    note = (DOCS / "design" / "architecture.md").read_text()
    assert table(passed(tmp_path / "home")) in note
