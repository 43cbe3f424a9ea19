"""Which positions are recomputed beside a window, and what full compute teaches of them."""

from __future__ import annotations

import numpy as np
import pytest
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.methods.base import donor_of
from benchmarks.methods.chosen import (
    COMMON,
    Chosen,
    dependants,
    highest,
    of_donor,
    passage_starts,
    until,
)
from benchmarks.methods.dependence import computed_and_attended, dependence, learned
from benchmarks.methods.full import Full
from benchmarks.methods.kvshare import kvshare
from kvshare_store.lookup.policy import PRESETS
from tests.transformers.tiny import prompt_of

DONOR = prompt_of(64)
PROMPT = [*DONOR[:20], 7, 8, 9, *DONOR[22:]]
ALL = PRESETS["aggressive"]
RARE = COMMON + 1


def at(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def test_the_highest_share_of_what_is_kept() -> None:
    weights = np.array([9, 5, 0, 1, 7, 0, 0, 0, 0, 0], np.float32)
    kept = np.ones(10, np.bool_)
    kept[0] = False
    assert at(highest(weights, kept, 0.22)) == [1, 4]
    assert at(highest(weights, kept, 0.9)) == [1, 3, 4]  # nothing that never was off


def test_blocks_are_chosen_whole() -> None:
    weights = np.array([0, 0, 0, 8, 3, 3, 3, 0, 9], np.float32)
    kept = np.ones(9, np.bool_)
    assert at(highest(weights, kept, 0.44, block=4)) == [4, 5, 6, 7]


def test_as_few_as_leave_a_given_rest() -> None:
    weights = np.array([5, 4, 0, 3, 2, 1], np.float32)
    kept = np.arange(6) > 0
    assert at(until(weights, kept, 10)) == []
    assert at(until(weights, kept, 9.9)) == [1]
    assert at(until(weights, kept, 3)) == [1, 3]
    assert at(until(weights, kept, 0)) == [1, 3, 4, 5]


def test_weights_move_with_the_donors_rows() -> None:
    weights = np.array([1, 2, 3, 4], np.float32)
    assert of_donor(weights, np.array([0, -1, -1, 3, 2])).tolist() == [1, 0, 0, 4, 3]


def test_dependants_recur_behind_the_edit_and_are_rare() -> None:
    donor = [1, RARE, 2, RARE + 1, 3, RARE, 4, 5, RARE + 2, 6]
    prompt = [1, RARE + 2, 2, RARE + 1, 3, RARE, 4, 5, RARE + 2, 6]
    source = np.array([0, -1, 2, 3, 4, 5, 6, 7, 8, 9])
    kept = source >= 0
    # the old value recurs at 5, the new one at 8
    assert at(dependants(prompt, donor, source, kept, 1)) == [5, 8]
    assert at(dependants(prompt, donor, source, kept, 2)) == [5, 6, 8, 9]
    common = [token % COMMON for token in prompt]
    assert at(dependants(common, [token % COMMON for token in donor], source, kept, 2)) == []


def test_what_stands_before_the_edit_depends_on_nothing() -> None:
    donor = [RARE, 1, 2, 3, RARE, 4]
    prompt = [RARE, 1, 2, 3, 4]  # the second one was taken out
    source = np.array([0, 1, 2, 3, 5])
    assert at(dependants(prompt, donor, source, source >= 0, 2)) == []


def test_passages_begin_behind_an_empty_line() -> None:
    newline = 9
    prompt = [1, newline, newline, 2, 3, 4, newline, 5, newline, newline, 6, 7, 8]
    same = np.arange(13)
    kept = np.ones(13, np.bool_)
    assert at(passage_starts(prompt, newline, same, kept, 2)) == []
    edited = np.where(same == 0, -1, same)
    assert at(passage_starts(prompt, newline, edited, kept, 2)) == [3, 4, 10, 11]
    late = np.where(same == 5, -1, same)
    assert at(passage_starts(prompt, newline, late, kept, 9)) == [10, 11, 12]


def test_nothing_is_off_before_the_edit_and_something_behind_it(llama: RowEngine) -> None:
    donor = donor_of(llama, DONOR)
    found, source = dependence(llama, PROMPT, donor, *computed_and_attended(llama, PROMPT))
    assert at(source < 0) == [20, 21, 22, len(PROMPT) - 1]
    for weights in found:
        assert weights[:20].max() < 1e-5
        assert weights[source < 0].max() == 0
        assert weights[23:-1].min() > 1e-5


def test_attention_is_noted_and_changes_nothing(llama: RowEngine) -> None:
    full, attention = computed_and_attended(llama, PROMPT)
    assert full.logits.tolist() == pytest.approx(
        Full().prefill(llama, PROMPT, []).logits.tolist(), abs=1e-5
    )
    assert attention.sum(1).tolist() == pytest.approx([1.0] * len(attention), abs=1e-4)


def test_what_is_learned_is_a_mean_by_position_of_the_donor(llama: RowEngine) -> None:
    donor = donor_of(llama, DONOR)
    other = [*DONOR[:40], 5, *DONOR[41:]]
    one, source = dependence(llama, PROMPT, donor, *computed_and_attended(llama, PROMPT))
    two, _ = dependence(llama, other, donor, *computed_and_attended(llama, other))
    found = learned(llama, donor, [PROMPT, other])
    position = int(np.flatnonzero(source == 50)[0])
    assert found.attended[50] == pytest.approx((one.attended[position] + two.attended[50]) / 2)
    assert found.deviation[21] == two.deviation[21] < 1e-5  # the first prompt does not have it
    assert found.deviation[30] == pytest.approx(one.deviation[31] / 2, rel=0.01)


def test_choosing_all_is_full_compute_and_nothing_is_the_policy(llama: RowEngine) -> None:
    donor = donor_of(llama, DONOR)
    everything = Chosen("all", ALL, lambda source, kept: kept).prefill(llama, PROMPT, [donor])
    nothing = Chosen("none", ALL, lambda source, kept: kept & False).prefill(llama, PROMPT, [donor])
    truth = Full().prefill(llama, PROMPT, [])
    policy = kvshare("aggressive").prefill(llama, PROMPT, [donor])
    assert everything.reused == 0
    assert everything.logits.tolist() == pytest.approx(truth.logits.tolist(), abs=1e-4)
    assert nothing.reused == policy.reused
    assert nothing.logits.tolist() == policy.logits.tolist()
    assert nothing.logits.tolist() != pytest.approx(truth.logits.tolist(), abs=1e-4)
