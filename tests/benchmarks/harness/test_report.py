"""The page of measurements."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks.__main__ import MEASUREMENTS
from benchmarks.harness.report import ReportError, report
from benchmarks.harness.result import presets, write
from tests.benchmarks.results import result


def test_the_page_has_all_that_is_needed_to_judge_a_number(tmp_path: Path) -> None:
    targets = [("share ≥ 0.1", "0.12", True), ("share ≥ 0.5", "0.12", False)]
    first = result("b", paper="they say 0.6.", notes=["ours is smaller"], targets=targets)
    write(first, lambda _: Figure(), tmp_path)
    write(result("a", short=True), None, tmp_path)
    page = report(tmp_path, ["b", "a", "c", "a-presets"]).read_text()
    assert page.index("## b") < page.index("## a")
    for text in (
        "1 reached, 1 missed", "| share ≥ 0.5 | 0.12 | **missed** | [b](#b) |",
        "The paper: they say 0.6.", "- ours is smaller", "| a\\|b | 0.123 |",
        "![Title of b](b.png)",
        "n: 1,200 prompts. Seed 3. Model: tiny. Noise floor: half a point. Machine: two cores.",
        "python -m benchmarks run b\n", "Not measured yet: `c`.", "*Short form",
    ):  # fmt: skip
        assert text in page
    assert "a.png" not in page
    assert page == report(tmp_path, ["b", "a", "c"]).read_text()


def test_without_results_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no results"):
        report(tmp_path, ["a"])
    assert not list(tmp_path.iterdir())


def test_results_of_other_presets_and_sample_sizes_say_so(tmp_path: Path) -> None:
    old = presets() | {"balanced": "ReusePolicy(of another day)"}
    for name, policies in (("ttft", old), ("misses", presets()), ("rag", {}), ("scale", {})):
        made = result(
            name, policies=policies, command=f"python -m benchmarks run {name} --n 5",
            targets=[(f"soon in {name}", "it is", True)],
        )  # fmt: skip
        write(made, None, tmp_path)
    page = report(tmp_path, ["ttft", "misses", "rag", "scale"]).read_text()
    sections = dict(part.split("\n", 1) for part in page.split("\n## ") if "\n" in part)
    assert "other settings of `balanced` than today's" in sections["ttft"]
    assert "before the presets were written down" in sections["rag"]
    verdicts = sections["Targets"]
    for name in ("misses", "scale"):
        assert "settings of" not in sections[name]
        assert f"| soon in {name} | it is | reached | [{name}](#{name}) |" in verdicts
    assert "| soon in ttft | it is | reached | [ttft](#ttft) (*other settings*) |" in verdicts
    assert all("*The sample size was given" in sections[name] for name in ("ttft", "scale"))


def test_how_many_edits_may_build_on_one_another_is_no_matter_where_none_do(tmp_path: Path) -> None:
    balanced = re.sub(r"max_generation=\d+", "max_generation=99", presets()["balanced"])
    for name in ("rag", "ttft"):
        made = result(name, policies=presets() | {"balanced": balanced})
        write(made, None, tmp_path)
    page = report(tmp_path, ["ttft", "rag"]).read_text()
    ttft, rag = page.split("\n## ")[-2:]
    assert "other settings of `balanced`" in ttft
    assert "other settings" not in rag


RECORDED = Path(__file__).parents[3] / "docs" / "benchmarks"


def test_the_recorded_page_is_made_of_the_recorded_results(tmp_path: Path) -> None:
    for path in (*RECORDED.glob("*.json"), *RECORDED.glob("*.png")):
        (tmp_path / path.name).symlink_to(path)
    assert report(tmp_path, list(MEASUREMENTS)).read_text() == (RECORDED / "index.md").read_text()


def test_what_is_recorded_weighs_little() -> None:
    """Raw samples are not in git, and no plot is larger than 100 kB."""
    for path in RECORDED.glob("*.json"):
        assert '"series"' not in path.read_text(), path.name
    sizes = {path.name: path.stat().st_size for path in RECORDED.glob("*.png")}
    assert [name for name, size in sizes.items() if size > 100_000] == []
