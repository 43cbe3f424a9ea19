"""Links of documents that lead nowhere."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.dead_links import broken


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "# A `title`, of sorts\n[a](docs/x.md) [b](docs/gone.md) [c](https://example.org/gone)\n"
        "[d](#a-title-of-sorts) [e](#other)\n```\n[f](gone)\n```\n"
    )
    (tmp_path / "docs" / "x.md").write_text("[up](../README.md#a-title-of-sorts) [y](deep/y.md#no)")
    (tmp_path / "docs" / "deep" / "y.md").write_text("# Yes\n")
    assert list(broken(tmp_path)) == [
        "README.md: docs/gone.md", "README.md: #other", "docs/x.md: deep/y.md#no",
    ]  # fmt: skip
