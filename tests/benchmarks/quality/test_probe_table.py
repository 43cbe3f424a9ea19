"""Edit probes: which ones count, shares with their intervals, targets."""

from __future__ import annotations

import pytest

from benchmarks.quality.probe_prompts import Probe
from benchmarks.quality.probe_table import (
    AGGRESSIVE,
    BF16,
    CELLS,
    ENOUGH,
    FAITHFUL,
    Probed,
    Seen,
    Summary,
    counted,
    said_new,
    targets_of,
    wilson,
)


def probed(cell: tuple[str, str], oracle: float, *, greedy: bool, method: float = 0.0) -> Probed:
    """A probe whose stale margin is -1."""
    probe = Probe("city", *cell, True, (1, 2), (1, 3), 2, 3)
    one = Probed(probe, Seen(oracle, greedy, 0.0), Seen(-1.0, False, 0.0), said_old=greedy)
    one.arms = {"full": one.oracle, "m": Seen(method, method > 0, 0.5)}
    return one


def test_greedy_answers_count_where_full_compute_can_answer_enough():
    found = [probed(cell, 1.0, greedy=True) for cell in CELLS for _ in range(ENOUGH)]
    found.append(probed(CELLS[0], 1.0, greedy=False))
    able, says_new, _ = counted(found)
    assert len(able) == ENOUGH * len(CELLS)
    assert says_new is said_new


def test_with_too_few_answers_likelihoods_count_where_they_tell_the_values_apart():
    found = [probed(cell, 1.0, greedy=False) for cell in CELLS]
    found.append(probed(CELLS[0], -0.5, greedy=False))
    able, says_new, how = counted(found)
    assert len(able) == len(CELLS)
    assert says_new is not said_new
    assert "likelier" in how


def test_margin_recovered_is_none_for_the_donors_answer_and_all_for_full_compute():
    found = [probed(CELLS[0], 3.0, greedy=True, method=m) for m in (-1.0, 1.0)]
    assert Summary.of(found, "full", said_new).recovered == 1
    ours = Summary.of(found, "m", said_new)
    assert ours.recovered == pytest.approx(0.25)
    assert (ours.n, ours.new, ours.reused) == (2, 0.5, 0.5)


def test_the_interval_of_a_share():
    assert wilson(0.5, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    low, high = wilson(1.0, 10)
    assert all(wilson(1.0, n)[1] == 1.0 for n in range(1, 200))
    assert high == 1.0
    assert low == pytest.approx(0.722, abs=1e-3)


@pytest.mark.parametrize(
    ("share", "n", "reached"), [(1.0, 10, True), (1.0, 9, False), (0.4, 10, False)]
)
def test_a_target_is_reached_within_noise_and_never_by_few_probes(share, n, reached):
    arms = {FAITHFUL: share, BF16: 1.0, AGGRESSIVE: 0.1}
    series = {
        arm: {"direct near": [1.0, 1.0, n], "derived far": [new, 0.9, n]}
        for arm, new in arms.items()
    }
    [(what, measured, verdict)] = targets_of(series)
    assert "derived probes, far" in what
    assert "placeholders only: 0.10" in measured
    assert verdict is reached
    assert ("too few" in measured) == (n < ENOUGH)
