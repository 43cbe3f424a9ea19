"""Trends: what was known when, in few numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvshare_store.quality import trend
from kvshare_store.quality.confidence import Interval
from kvshare_store.quality.report import Wanted
from kvshare_store.quality.trend import Moment, Trends
from tests.quality.streams import quality, score

DAY = 86_400.0


def moment(at: float) -> Moment:
    return Moment(at, int(at), Interval(0.0, 0.0, 1.0))


def times(trends: Trends, now: float, policy: str = "faithful") -> list[float]:
    return [one.at for one in trends.of("n", "t", policy, now)]


def trends_of(*moments: float) -> Trends:
    made = Trends()
    for at in moments:
        made.add("n", "t", "faithful", moment(at))
    return made


def test_few_moments_are_all_kept() -> None:
    assert times(trends_of(0, 10, 20), 30) == [0, 10, 20]
    assert times(trends_of(), 30) == []


@pytest.mark.parametrize("step", [0.001, 0.7, 60.0, 7_000.0])
def test_many_are_as_few_and_reach_as_far_back_as_a_day(step: float) -> None:
    count = 20_000
    found = times(trends_of(*(at * step for at in range(count))), count * step)
    assert found[-1] == (count - 1) * step, "the newest always stays"
    assert 2 <= len(found) <= 48
    reaches = min(count * step, DAY)
    assert found[0] <= count * step - 0.9 * reaches
    gaps = [b - a for a, b in pairwise(found)]
    assert max(gaps) <= max(0.15 * reaches, step), "none of it is left out"


def test_what_was_true_when_the_day_began_is_a_part_of_it() -> None:
    made = trends_of(0.0, 3 * DAY)
    assert times(made, 3.5 * DAY) == [0.0, 3 * DAY]
    assert times(made, 9 * DAY) == [3 * DAY]


def test_a_clock_that_is_set_back_does_no_harm() -> None:
    assert times(trends_of(100.0, 50.0, 50.5, 51.0), 60) == [100.0, 50.0, 51.0]


def test_those_that_are_scored_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trend, "_SERIES", 3)
    made = trends_of(1.0)
    for at in range(10):
        made.add("n", f"t{at}", "faithful", moment(at))
        made.add("n", "t", "faithful", moment(2.0 + at))
    assert times(made, 20)[-1] == 11.0
    assert made.of("n", "t9", "faithful", 20)
    assert not made.of("n", "t5", "faithful", 20)


def test_a_class_tells_its_trend_if_that_is_asked_for() -> None:
    now = 1e9
    judge = quality(clock=lambda: now)
    for at in range(30):
        now += 60.0
        judge.observe(score(diverged=at % 10 == 0))
        judge.observe(score(greedy=False))
    (known,) = judge.report(Wanted(trends=True))
    (faithful,) = known.policies
    assert [one.greedy for one in faithful.trend] == list(range(1, 31))
    assert faithful.trend[-1] == (now, 30, faithful.extra)
    assert judge.report()[0].policies[0].trend == ()
    judge.forget("n")
    judge.observe(score())
    (known,) = judge.report(Wanted(trends=True))
    assert len(known.policies[0].trend) == 1, "a purge forgets it"
