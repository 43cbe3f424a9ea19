"""From the samples of `misses` to rows."""

from pathlib import Path

from benchmarks.harness.result import Options
from benchmarks.latency import misses


def test_misses_that_were_hits_are_left_out() -> None:
    def triple(ours: float, hit: bool) -> misses.Triple:
        seconds = {"plain": 1.0, "plain again": 1.0, "kvshare": ours}
        parts = dict.fromkeys(("lookup", "plan", "snapshot"), 0.001)
        return misses.Triple(200, seconds, parts, hit, 0.1)

    triples = [triple(1.01, False), triple(1.03, False), triple(1.05, False), triple(0.1, True)]
    made = misses.result_of(triples, Options(data=Path()), "model")
    assert made.n == {"misses": 3, "hits left out": 1}
    assert made.targets == [("miss overhead ≤ 2 %, median", "+3.0%, n = 3", False)]
    misses.draw(made)
