"""The page of measurements, the calculation for clusters, and the links of documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import figure2, figure4, misses_store, scale, steady
from benchmarks.data import Arrival
from benchmarks.links import broken
from benchmarks.report import ReportError, report
from benchmarks.result import Options, Result, presets, read, run, write


def result(name: str, **more: Any) -> Result:
    given: dict[str, Any] = {
        "title": f"Title of {name}", "n": {"prompts": 1200}, "seed": 3, "model": "tiny",
        "noise_floor": "half a point", "columns": ["method", "share"], "rows": [["a|b", 0.12345]],
        "command": f"python -m benchmarks run {name}", "machine": "two cores", "date": "2026-01-02",
        "seconds": 61.0,
    }  # fmt: skip
    return Result(name=name, **given | more)


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


def trace(*blocks: tuple[int, ...]) -> list[Arrival]:
    return [Arrival(0.0, 512 * len(some), 1, some) for some in blocks]


def test_hits_of_a_trace_are_prefixes() -> None:
    arrivals = trace((1, 2), (1, 3), (1, 2, 4), (5, 2))
    shared = scale.prefix_hits(arrivals, [0, 0, 0, 0])
    assert shared == 3 / 9  # 1; 1 and 2; a 2 after an unknown block is no hit
    assert scale.prefix_hits(arrivals, [0, 1, 0, 1]) == 2 / 9
    assert scale.predicted_hits(trace((1,), (1,), (1,)), 2) == pytest.approx((0 + 0.5 + 0.75) / 3)


def test_what_a_cluster_saves(tmp_path: Path) -> None:
    arrivals = trace(*([(1, 2)] * 50))
    used = scale.rates(tmp_path)
    line = scale.line_of(arrivals, 1, used, 0)
    assert line.own == line.shared == line.own_predicted == 0.98
    many = scale.line_of(arrivals, 1024, used, 0)
    assert many.own < many.saved_shared < many.shared
    assert many.saved_edited > many.saved_shared
    assert many.lookup_cores == pytest.approx(1024 * 5e-3)


def test_scale_takes_what_was_measured(tmp_path: Path) -> None:
    rows = [
        ["prefix caching", "all turns", 0.0, 0.2], ["KVShare: balanced", "all turns", 0.0, 0.4],
    ]  # fmt: skip
    write(result("figure4", rows=rows), None, tmp_path)
    lookups = [
        ["lexical", 0, 1.0, 1.0],
        ["lexical", 9, 2.0, 3.0],
        ["lexical, then text", 9, 7.0, 8.0],
    ]
    write(result("misses_store", rows=lookups), None, tmp_path)
    used = scale.rates(tmp_path)
    assert used.edited.value == pytest.approx(0.25)
    assert used.lookup.value == 3.0


def test_a_remote_slower_than_computing_saves_nothing(tmp_path: Path) -> None:
    used = scale.rates(tmp_path)
    assert used.saved(0.1, 0.5, used.break_even / 2) == (0.1, 0.1)
    by_prefix, edited = used.saved(0.1, 0.5, used.break_even * 2)
    assert by_prefix == pytest.approx(0.1 + 0.4 / 2)
    assert edited == pytest.approx(by_prefix + 0.5 * used.edited.value / 2)
    line = scale.Line(8, 0.1, 0.1, 0.5, 0.1, 0.4, 0.45, 1.0)
    path = tmp_path / "tiers.json"
    assert "`tiers` was not measured" in scale._at_measured_rates(path, line, used)
    slow = ["redis", 0.2, "", used.break_even / 2e9]
    write(result("tiers", rows=[slow, ["disk", 1.0, "", 9.0]]), None, tmp_path)
    said = scale._at_measured_rates(path, line, used)
    assert "redis (0.29 GB/s) 10%;" in said
    assert "disk" not in said


def test_a_stream_of_edited_repeats_has_seen_every_text_once() -> None:
    texts = [np.full(200, at, np.int32) for at in range(5)]
    stream = steady.edited_repeats(texts, 20, seed=0)
    assert len(stream.prompts) == 20
    assert [int(np.bincount(p).argmax()) for p in stream.prompts[:5]] == [0, 1, 2, 3, 4]
    assert all(len(prompt) == 208 for prompt in stream.prompts)
    assert stream.working_set > 20 * 208 * steady.NAMESPACE.layout.row_bytes


def test_a_bounded_prefix_cache_forgets() -> None:
    texts = [np.arange(64 * at, 64 * at + 64, dtype=np.int32) for at in range(3)]
    stream = steady.Stream("s", [texts[0], texts[1], texts[0], texts[2], texts[1]])
    row = steady.NAMESPACE.layout.row_bytes
    assert steady.prefix_lru(stream, 1024 * row) == [0, 0, 0.75, 0, 0.75]
    assert steady.prefix_lru(stream, 128 * row) == [0, 0, 0.75, 0, 0]


def test_a_store_serves_a_stream(tmp_path: Path) -> None:
    texts = [np.random.default_rng(at).integers(0, 9000, 256).astype(np.int32) for at in range(4)]
    stream = steady.edited_repeats(texts, 12, seed=0)
    shares = steady.serve(stream, tmp_path / "home", 1 << 22, disk=False, name="all").shares
    assert shares[:4] == [0, 0, 0, 0]
    assert min(shares[4:]) > 0.5


@pytest.mark.parametrize(
    ("module", "made"),
    [
        (figure2, {"rows": [["first turns", 9, 0.1, 0.1, 0.2, 0.3, 0.2]]}),
        (figure4, {"series": {"m": {"all prompts": [0.9, 0.1]}}}),
        (steady, {"rows": [["s", "x"], ["t", "x"]], "series": {"s: x": [0.1], "t: x": [0.2]}}),
        (scale, {"rows": [[8, 0.1, 0.1, 0.4, 0.1, 0.3, 0.4, 0.1, 2.0]]}),
        (misses_store, {"series": {"0 nodes": [0.1, 0.2], "9 nodes": [0.3]}}),
    ],
)
def test_plots_are_drawn(module: Any, made: dict[str, Any], tmp_path: Path) -> None:
    write(result("p", **made), module.draw, tmp_path)
    assert (tmp_path / "p.png").stat().st_size > 5_000


def test_a_result_made_of_an_older_one_keeps_the_presets_of_that_one(tmp_path: Path) -> None:
    old = dict.fromkeys(presets(), "as it was")
    options = Options(data=tmp_path, out=tmp_path)
    assert run(lambda _: result("new"), None, options, "command").policies == presets()
    recounted = run(lambda _: result("recounted", policies=old), None, options, "command")
    assert recounted.policies == old


def test_a_short_result_does_not_take_the_place_of_a_full_one(tmp_path: Path) -> None:
    def measured(options: Options) -> Result:
        return result("a", n={"prompts": 2 if options.short else 100})

    for short, kept in ((True, 2), (True, 2), (False, 100), (True, 100)):
        options = Options(data=tmp_path, out=tmp_path, short=short)
        assert run(measured, None, options, "command").n == {"prompts": 2 if short else 100}
        assert read(tmp_path / "a.json").n == {"prompts": kept}


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
