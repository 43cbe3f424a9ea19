"""What second looks may cost requests: what is within two percent, and what is not."""

from __future__ import annotations

import pytest

from benchmarks.harness.engines import Replayed
from benchmarks.latency.second_look import targets

OFF = Replayed([0.1] * 150 + [0.5] * 50, 100.0)


@pytest.mark.parametrize(
    ("ttfts", "seconds", "reached"),
    [
        (OFF.ttfts, 100.0, [True, True, True]),
        ([0.101] * 150 + [0.509] * 50, 101.9, [True, True, True]),
        ([0.103] * 150 + [0.5] * 50, 100.0, [False, True, True]),
        ([0.1] * 150 + [0.52] * 50, 100.0, [True, False, True]),
        (OFF.ttfts, 103.0, [True, True, False]),
    ],
    ids=["the same", "within", "median", "slowest", "rate"],
)
def test_each_is_held_to_the_engine_without(
    ttfts: list[float], seconds: float, reached: list[bool]
) -> None:
    found = list(targets(0.8, {"off": OFF, "idle": Replayed(ttfts, seconds)}))
    assert [verdict for _, _, verdict in found] == reached
    assert all("80%" in what for what, _, _ in found)
