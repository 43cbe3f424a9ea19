"""All classes together: as each of them is seen by itself."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare_store.observability.metrics import Metrics
from kvshare_store.quality.ladder import STALE, Terms
from kvshare_store.quality.overview import Limits, Overview
from kvshare_store.quality.quality import Quality
from tests.quality.streams import LADDER, quality, score


def taught(judge: Quality, seed: int, *, namespaces: int = 3, classes: int = 4) -> Quality:
    """Classes of every sort: good and bad ones, much and little known, begun anew, silent."""
    random = np.random.default_rng(seed)
    for space in map(str, range(namespaces)):
        for _ in range(random.integers(0, 400)):
            judge.observe(score(diverged=random.random() < 0.1, control=True, namespace=space))
        for traffic in map(str, range(classes)):
            for policy in LADDER[1 : random.integers(2, len(LADDER) + 1)]:
                rate = random.choice([0.0, 0.02, 0.5])
                for _ in range(random.choice([1, 30, 900])):
                    diverged = random.random() < rate
                    judge.observe(score(policy, diverged, namespace=space, traffic=traffic))
    for _ in range(STALE):
        judge.rung("0", "0", LADDER[-1])
    return judge


@pytest.mark.parametrize("bound", [0.0, 0.05])
def test_it_counts_what_each_class_gets(bound: float) -> None:
    seen: set[str] = set()
    for seed in range(3):
        judge = taught(quality(bound), seed)
        found, alone = judge.overview(), judge.report()
        assert sum(found.classes.values()) == len(alone) == 12
        assert tuple(found.classes) == LADDER
        wanted = [one.rung or LADDER[-1] for one in alone]
        assert found.classes == {rung: wanted.count(rung) for rung in LADDER}
        assert (found.bound, found.confidence) == (bound, 0.95)
        loud = [one for one in alone if bound == 0 or one.unscored < STALE]
        for policy, limits in found.extra.items():
            shown = [each.extra for one in loud for each in one.policies if each.policy == policy]
            assert limits.upper == pytest.approx(max(0.0, *(extra.high for extra in shown)))
            assert limits.lower == pytest.approx(max(0.0, *(extra.low for extra in shown)))
        for one in alone if bound else ():
            within = [each.policy for each in one.policies if each.extra.high <= bound]
            assert one.rung == max(within, key=LADDER.index, default="exact")
        seen.update(wanted)
    assert len(seen) >= (3 if bound else 1), seen


def test_the_limits_are_those_of_the_worst_class() -> None:
    """A class with many scores is known well; one with few may be anything."""
    judge = quality(0.0)  # without a bound nothing is doubted
    for at in range(900):
        judge.observe(score(traffic="good"))
        judge.observe(score("balanced", at % 2 == 0, traffic="bad"))
        judge.observe(score(control=True))
    judge.reload(Terms(0.02, 0.05))
    sure = judge.overview()
    assert sure.classes == {"exact": 1, "faithful": 1, "balanced": 0, "aggressive": 0}
    assert set(sure.extra) == {"faithful", "balanced"}
    assert sure.extra["faithful"].lower == 0
    assert sure.extra["faithful"].upper <= 0.02
    assert 0.3 < sure.extra["balanced"].lower < 0.5 < sure.extra["balanced"].upper < 0.7
    judge.observe(score(traffic="new"))
    judge.observe(score(traffic="new", greedy=False))
    unsure = judge.overview()
    assert unsure.extra["faithful"] == Limits(0, 1)
    assert unsure.shown == sure.shown == sure.extra, "one score is too few to show a rate of"
    assert unsure.extra["balanced"] == sure.extra["balanced"]
    judge.reload(Terms(0.9, 0.05))
    assert judge.overview().classes["balanced"] == 1


def test_a_silent_class_is_counted_and_vouches_for_nothing() -> None:
    judge = quality(0.02)
    for _ in range(900):
        judge.observe(score())
    assert judge.overview().silent == 0
    for _ in range(STALE):
        judge.rung("n", "t", LADDER[-1])
    silent = judge.overview()
    assert (silent.silent, silent.classes["exact"], silent.extra) == (1, 1, {})
    judge.observe(score())
    assert judge.overview().silent == 0


def in_doubt() -> Quality:
    """More of what is only tried diverges than is allowed, and lately much more: it is doubted,
    with a mean that is known to be within 0.75."""
    judge = quality(0.02)
    for diverged in (*[False, True] * 100, *[True] * 10):
        judge.observe(score("balanced", diverged))
    return judge


def test_what_is_doubted_has_no_upper_limit_wherever_it_is_shown() -> None:
    judge = in_doubt()
    (known,) = judge.report()
    (shown,) = known.policies
    assert shown.diverged.high < 0.75, "as measured"
    assert shown.extra.high == 1.0
    assert judge.overview().extra["balanced"].upper == 1.0
    assert judge.overview().doubted == 1
    judge.reload(Terms(0.0, 0.05))
    (known,) = judge.report()
    assert known.policies[0].extra.high < 0.75, "without a bound nothing is doubted"
    assert judge.overview().doubted == 0


def test_what_is_shown_of_a_silent_class_is_what_the_ladder_goes_by() -> None:
    judge = quality(0.02)
    for _ in range(900):
        judge.observe(score())
    for _ in range(STALE):
        judge.rung("n", "t", LADDER[-1])
    (known,) = judge.report()
    assert (known.rung, known.policies[0].extra.high) == ("exact", 1.0)


def test_a_class_that_becomes_stricter_is_counted() -> None:
    metrics = Metrics()
    judge = quality(0.02, metrics=metrics)
    for at in range(1_000):
        judge.observe(score(diverged=at > 900))
    assert metrics.counts(["quality_tightened"]) == {"quality_tightened": 1}
    assert judge.overview().classes["exact"] == 1


def test_of_nothing_there_is_nothing() -> None:
    assert quality(0.0).overview() == Overview(0.0, 0.95, dict.fromkeys(LADDER, 0), 0, {})
    without_rungs = Quality((), Terms(0.02, 0.05), Metrics())  # policy `off`
    without_rungs.observe(score(control=True))
    assert without_rungs.overview() == Overview(0.02, 0.95, {}, 0, {})
