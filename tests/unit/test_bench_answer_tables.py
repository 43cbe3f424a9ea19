"""What is made of answers: blocks of prompts, counted probes, shares with their intervals."""

from __future__ import annotations

import pytest

from benchmarks import table1
from benchmarks.__main__ import MEASUREMENTS, _all
from benchmarks.chats import Item, Task
from benchmarks.peers import PeerMissingError
from benchmarks.probe_items import Probe
from benchmarks.probe_table import (
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
from benchmarks.scores import rouge_l
from benchmarks.table1 import BLOCK, _blocks


@pytest.mark.parametrize("size", [1, 2, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 2])
def test_blocks_hold_every_prompt_once_by_length_and_no_prompt_alone(size):
    prompts = [[0] * ((7 * i) % 11 + 1) for i in range(size)]
    blocks = list(_blocks(prompts))
    order = [index for block in blocks for index in block]
    assert sorted(order) == list(range(size))
    lengths = [len(prompts[index]) for index in order]
    assert lengths == sorted(lengths)
    assert size == 1 or min(map(len, blocks)) > 1


def test_a_missing_gptcache_leaves_no_arm_that_other_tasks_lack(monkeypatch):
    def missing(*_):
        raise PeerMissingError("gptcache is not installed")

    monkeypatch.setattr(table1, "GptCacheBaseline", missing)
    task = Task("task", "Do: {}", (Item("a", ("b",)), Item("c", ("d",))))
    asked = table1.Asked(task, rouge_l(), [(1, 2), (3, 4)], ["Do: e", "Do: f"])
    asked.arm(table1.FULL, "")
    with pytest.raises(PeerMissingError):
        table1._answer_from_gptcache(asked)
    assert list(asked.arms) == [(table1.FULL, "")]


def test_the_short_form_leaves_out_what_is_a_part_of_another_measurement():
    assert _all(short=False) == list(MEASUREMENTS)
    left_out = set(MEASUREMENTS) - set(_all(short=True))
    assert left_out == {"table1-presets", "agreement-presets"}


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
