"""Plots are drawn from a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.result import write
from benchmarks.latency import metrics_cost
from benchmarks.paper import figure2, figure4
from benchmarks.store import agents, cluster_scale, lookup_misses, page, steady_state
from tests.benchmarks.results import result


@pytest.mark.parametrize(
    ("module", "made"),
    [
        (figure2, {"rows": [["first turns", 9, 0.1, 0.1, 0.2, 0.3, 0.2]]}),
        (figure4, {"series": {"m": {"all prompts": [0.9, 0.1]}}}),
        (
            steady_state,
            {"rows": [["s", "x"], ["t", "x"]], "series": {"s: x": [0.1], "t: x": [0.2]}},
        ),
        (cluster_scale, {"rows": [[8, 0.1, 0.1, 0.4, 0.1, 0.3, 0.4, 0.1, 2.0]]}),
        (
            agents,
            {
                "rows": [
                    [name, trace, memory, 9, 0.1, 0.1, 0.1, 0.9]
                    for name in ("exact", "balanced")
                    for trace in ("chat", "tau")
                    for memory in ("all", "1")
                ]
            },
        ),
        (metrics_cost, {"series": {"shares": {"new": [0.001, 0.002], "edited": [0.004]}}}),
        (
            page,
            {
                "series": {
                    "painted": {
                        "warm": {
                            name: [9.0, 10.0]
                            for name in (
                                page.FIRST,
                                "namespace",
                                "prompt beside its parent",
                                page.FLOOR,
                            )
                        }
                    }
                }
            },
        ),
        (lookup_misses, {"series": {"0 nodes": [0.1, 0.2], "9 nodes": [0.3]}}),
    ],
)
def test_plots_are_drawn(module: Any, made: dict[str, Any], tmp_path: Path) -> None:
    write(result("p", **made), module.draw, tmp_path)
    assert 1_000 < (tmp_path / "p.png").stat().st_size < 100_000
