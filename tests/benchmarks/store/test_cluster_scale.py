"""The calculation of what a cluster saves."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data.datasets import Arrival
from benchmarks.harness.result import write
from benchmarks.store import cluster_scale
from tests.benchmarks.results import result


def trace(*blocks: tuple[int, ...]) -> list[Arrival]:
    return [Arrival(0.0, 512 * len(some), 1, some) for some in blocks]


def test_hits_of_a_trace_are_prefixes() -> None:
    arrivals = trace((1, 2), (1, 3), (1, 2, 4), (5, 2))
    shared = cluster_scale.prefix_hits(arrivals, [0, 0, 0, 0])
    assert shared == 3 / 9  # 1; 1 and 2; a 2 after an unknown block is no hit
    assert cluster_scale.prefix_hits(arrivals, [0, 1, 0, 1]) == 2 / 9
    assert cluster_scale.predicted_hits(trace((1,), (1,), (1,)), 2) == pytest.approx(
        (0 + 0.5 + 0.75) / 3
    )


def test_what_a_cluster_saves(tmp_path: Path) -> None:
    arrivals = trace(*([(1, 2)] * 50))
    used = cluster_scale.rates(tmp_path)
    line = cluster_scale.line_of(arrivals, 1, used, 0)
    assert line.own == line.shared == line.own_predicted == 0.98
    many = cluster_scale.line_of(arrivals, 1024, used, 0)
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
    used = cluster_scale.rates(tmp_path)
    assert used.edited.value == pytest.approx(0.25)
    assert used.lookup.value == 3.0


def test_a_remote_slower_than_computing_saves_nothing(tmp_path: Path) -> None:
    used = cluster_scale.rates(tmp_path)
    assert used.saved(0.1, 0.5, used.break_even / 2) == (0.1, 0.1)
    by_prefix, edited = used.saved(0.1, 0.5, used.break_even * 2)
    assert by_prefix == pytest.approx(0.1 + 0.4 / 2)
    assert edited == pytest.approx(by_prefix + 0.5 * used.edited.value / 2)
    line = cluster_scale.Line(8, 0.1, 0.1, 0.5, 0.1, 0.4, 0.45, 1.0)
    path = tmp_path / "tiers.json"
    assert "`tiers` was not measured" in cluster_scale.at_measured_rates(path, line, used)
    slow = ["redis", 0.2, "", used.break_even / 2e9]
    write(result("tiers", rows=[slow, ["disk", 1.0, "", 9.0]]), None, tmp_path)
    said = cluster_scale.at_measured_rates(path, line, used)
    assert "redis (0.29 GB/s) 10%;" in said
    assert "disk" not in said
