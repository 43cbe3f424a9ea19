"""What becomes of classes under a bound: harmless ones loosen, dangerous ones end at `exact`, and
the realised rate stays within the bound whatever the traffic does."""

from __future__ import annotations

from statistics import mean

import pytest

from kvshare_store.quality.evidence import Evidence, Learned
from kvshare_store.quality.ladder import (
    EXACT,
    STALE,
    Decision,
    Terms,
    decide,
    requests_needed,
    scores_needed,
)
from tests.quality.streams import LADDER, Rates, quality, run, score

TERMS = Terms(0.05, 0.05)
NOTHING = Evidence()


def evidence(policy: str, good: int, bad: int = 0) -> Evidence:
    found = Evidence()
    for at in range(good + bad):
        found.add(score(policy, diverged=at % (good + bad) >= good))
    return found


def learned(**known: tuple[int, int]) -> Learned:
    return Learned({policy: evidence(policy, *counts) for policy, counts in known.items()})


def test_without_evidence_the_next_rung_gets_no_more_than_the_bound() -> None:
    assert decide(Learned(), NOTHING, LADDER, TERMS) == Decision(EXACT, 1, TERMS.bound)


def test_each_share_is_within_the_bound_whatever_is_true_within_the_limits() -> None:
    for good in (0, 3, 10, 30, 100, 1000):
        known = learned(faithful=(good, good // 50))
        made = decide(known, NOTHING, LADDER, TERMS)
        limit = known.of("faithful").diverged.interval(TERMS.each()).high
        limits = [0.0, limit, 1.0]
        spent = (1 - made.share) * limits[made.rung] + made.share * limits[made.tried]
        assert spent == pytest.approx(TERMS.bound)


@pytest.mark.parametrize("epoch", [1, 3])
def test_so_many_good_scores_are_needed_as_is_said(epoch: int) -> None:
    needed = scores_needed(TERMS, epoch)
    for good, rung in ((needed - 1, EXACT), (needed, 1)):
        known = learned(faithful=(good, 0))
        known.epoch = epoch
        assert decide(known, NOTHING, LADDER, TERMS).rung == rung
    assert scores_needed(Terms(0.0, 0.05)) == 0


@pytest.mark.parametrize("scores", [0, 40])
def test_so_many_requests_are_needed_as_is_said(scores: int) -> None:
    """One by one: the share of the requests that are tried grows with each good score."""
    shares = [
        decide(learned(faithful=(good, 0)), NOTHING, LADDER, TERMS).share
        for good in range(scores, scores_needed(TERMS))
    ]
    taken = sum(1 / share for share in shares)
    assert requests_needed(TERMS, scores) == pytest.approx(taken, abs=1)
    assert requests_needed(TERMS, scores_needed(TERMS)) == 0
    assert requests_needed(Terms(0.0, 0.05), 0) == 0


def test_more_good_scores_never_make_it_stricter() -> None:
    made = [
        decide(learned(faithful=(good, 0)), NOTHING, LADDER, TERMS) for good in range(0, 200, 10)
    ]
    assert sorted(made, key=lambda one: (one.rung, one.share)) == made
    assert made[-1].rung == 1


def test_a_rung_needs_evidence_of_its_own_and_not_of_those_below() -> None:
    assert decide(learned(balanced=(200, 0)), NOTHING, LADDER, TERMS).rung == 2
    assert decide(learned(faithful=(5000, 0)), NOTHING, LADDER, TERMS).rung == 1


def test_what_is_known_to_be_beyond_the_bound_is_not_tried_any_more() -> None:
    controls, bad = evidence("off", 400), learned(faithful=(20, 20))
    assert decide(bad, controls, LADDER, TERMS) == Decision(EXACT, EXACT)
    assert decide(bad, NOTHING, LADDER, TERMS).tried == 1  # full compute may be as bad
    known = learned(faithful=(5000, 0), balanced=(20, 20))
    assert decide(known, controls, LADDER, TERMS) == Decision(1, 1)


def test_divergence_of_full_compute_is_no_extra() -> None:
    known = learned(faithful=(19_000, 1000))
    assert decide(known, NOTHING, LADDER, TERMS).rung == EXACT
    assert decide(known, evidence("off", 1900, 100), LADDER, TERMS).rung == 1


def test_what_is_doubted_is_tried_as_seldom_as_what_nothing_is_known_of() -> None:
    known = learned(faithful=(50, 0))
    assert decide(known, NOTHING, LADDER, TERMS).share > 2 * TERMS.bound
    for _ in range(5):
        known.of("faithful").add(score("faithful", diverged=True), TERMS.bound)
    assert decide(known, NOTHING, LADDER, TERMS) == Decision(EXACT, 1, TERMS.bound)


def test_evidence_that_no_score_confirms_counts_no_more() -> None:
    known = learned(faithful=(5000, 0))
    known.unscored = STALE
    assert decide(known, NOTHING, LADDER, TERMS) == decide(Learned(), NOTHING, LADDER, TERMS)


def test_each_new_beginning_needs_more_evidence() -> None:
    first, later = learned(faithful=(120, 0)), learned(faithful=(120, 0))
    later.epoch = 10
    shares = [decide(one, NOTHING, LADDER, TERMS).share for one in (first, later)]
    assert shares == sorted(shares, reverse=True)
    assert sum(TERMS.each(epoch) for epoch in range(1, 10_000)) < TERMS.error / 4


def always(*rates: float) -> Rates:
    return lambda _: (rates[0], rates[1], rates[2])


def from_(request: int, before: float, after: float) -> Rates:
    return lambda at: (before if at < request else after,) * 3


def test_a_harmless_class_loosens() -> None:
    served = run(quality(0.05), always(0.0, 0.0, 0.0), 6000).served
    assert served[:50].count(EXACT) > 40
    assert served[-1000:].count(3) > 900


def test_a_class_whose_facts_depend_on_edits_ends_at_exact() -> None:
    found = run(quality(0.05), always(0.4, 0.6, 0.9), 6000)
    assert set(found.served[-1000:]) == {EXACT}
    assert found.extra < 0.02


def test_a_class_that_windows_cover_stays_where_they_do() -> None:
    found = run(quality(0.05), always(0.0, 0.0, 0.6), 12_000)
    assert set(found.served[-1000:]) == {2}
    assert found.most < 0.05


def test_divergence_of_full_compute_does_not_stop_a_class() -> None:
    found = run(quality(0.1), always(0.0, 0.0, 0.0), 6000, floor=0.08, controls=0.5)
    assert found.served[-500:].count(EXACT) == 0


def test_a_shift_makes_it_exact_at_once() -> None:
    judge = quality(0.05)
    found = run(judge, from_(6000, 0.0, 0.6), 8000)
    after = found.served[6000:]
    assert found.served[5999] > EXACT
    assert sum(rung > EXACT for rung in after[:100]) < 20
    assert sum(rung > EXACT for rung in after[100:]) < 0.1 * len(after)
    assert found.diverged < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_a_shift_of_a_class_that_has_just_loosened_makes_it_exact_at_once(seed: int) -> None:
    """Two divergences take its rung away. How often it is tried then must not be said by what was
    learned before the shift."""
    found = run(quality(0.05, seed=seed), from_(600, 0.0, 0.8), 1100, seed=seed)
    assert found.served[599] > EXACT
    assert sum(rung > EXACT for rung in found.served[600:]) < 60
    assert found.most < 0.05


def test_without_scores_it_spends_no_more_than_the_bound() -> None:
    found = run(quality(0.05), always(1.0, 1.0, 1.0), 6000, scored=0.0)
    assert found.extra < 0.065


def test_a_class_that_is_not_scored_any_more_goes_back() -> None:
    judge = quality(0.05)
    run(judge, always(0.0, 0.0, 0.0), 3000)
    served = run(judge, always(1.0, 1.0, 1.0), 2 * STALE, scored=0.0).served
    assert sum(rung > EXACT for rung in served[STALE:]) < 0.1 * STALE


STREAMS, REQUESTS = 200, 600
SHIFTING: tuple[Rates, ...] = (
    always(0.12, 0.15, 0.3),  # just beyond
    always(0.05, 0.11, 0.5),
    from_(300, 0.0, 0.5),
    from_(300, 0.5, 0.0),
    lambda at: (min(0.6, at / 1500),) * 3,
    lambda at: (0.3 * ((at // 150) % 2),) * 3,
)


def test_the_bound_holds_on_streams_that_shift() -> None:
    assert min(mean(rates(at)[2] for at in range(REQUESTS)) for rates in SHIFTING) > 0.12
    beyond = [
        seed
        for seed in range(STREAMS)
        if run(quality(0.1, seed=seed), SHIFTING[seed % len(SHIFTING)], REQUESTS, seed=seed).most
        > 0.1
    ]
    assert len(beyond) <= 0.05 * STREAMS
