"""The bound on recorded streams: of each real request it is known under which policies its answer
diverges from full compute. `python -m benchmarks run bound` recorded them (its `recorded`)."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from benchmarks.quality.bound_replay import LADDER, Outcome, from_text, halves, replay
from kvshare_store.quality.ladder import Terms

RECORDED = Path(__file__).parents[1] / "data" / "recorded_streams.txt"
STREAMS = {
    name: [one for one in every if one.edited[-1]]
    for name, every in from_text(RECORDED.read_text()).items()
}
BOUND, ERROR = 0.05, 0.05
REPLAYS, REQUESTS = 10, 2000
"""As many that what a shift costs until it is scored, some 30 answers, is a small part of them."""


@pytest.mark.parametrize("order", ["at random", "harmless half first"])
@pytest.mark.parametrize("name", STREAMS)
def test_the_bound_holds_on_recorded_streams(name: str, order: str) -> None:
    pool = STREAMS[name]
    pools = [pool] if order == "at random" else halves(pool)
    terms = Terms(BOUND, ERROR)
    made = [replay(pools, terms, REQUESTS, seed, scored=1.0) for seed in range(REPLAYS)]
    assert [one.most for one in made if one.most > BOUND] == []
    assert mean(one.counted for one in made) <= BOUND


def laxest(pool: list[Outcome]) -> float:
    return mean(one.extra(len(LADDER) - 1) for one in pool)


def test_without_a_bound_most_of_them_would_be_beyond_it() -> None:
    assert sum(laxest(pool) > BOUND for pool in STREAMS.values()) >= 4


def test_changed_facts_stay_exact_and_a_harmless_class_loosens() -> None:
    """Answers follow the edits of the one under `aggressive`, and hardly see those of the other."""
    last = {
        name: {replay([STREAMS[name]], Terms(BOUND, ERROR), REQUESTS, seed, scored=1.0).last
               for seed in range(4)}
        for name in ("changed facts", "dated conversations")
    }  # fmt: skip
    assert last == {"changed facts": {"exact"}, "dated conversations": {"balanced"}}
