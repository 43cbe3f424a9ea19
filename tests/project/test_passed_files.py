"""The files that a serve and a save pass are those that the note on the architecture lists."""

from __future__ import annotations

from pathlib import Path

from tests.support.made_parts import parts_in
from tests.support.passed import NOTE, parts, passed


def test_the_files_of_a_serve_and_a_save_are_listed(tmp_path: Path) -> None:
    """`python -m tests.support.passed` makes the table anew."""
    assert parts_in(NOTE) == parts(passed(tmp_path / "home"))
