"""Packages for comparison that may be missing."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers.environment import (
    ENVIRONMENT,
    PeerMissingError,
    make_importable,
    python_with,
)


def test_a_missing_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.peers.environment.ENVIRONMENT", tmp_path)
    assert python_with("json") == sys.executable
    with pytest.raises(PeerMissingError, match="make bench-setup"):
        make_importable("a_package_nobody_has")


def test_the_environment_is_where_make_puts_it() -> None:
    assert f"{ENVIRONMENT.name}/packages.stamp" in (ENVIRONMENT.parent / "Makefile").read_text()
