"""Baselines: at their extremes they equal full prefill, or compute placeholders only; in between
they choose."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.methods.base import Donor, Method, Prefilled, donor_of
from benchmarks.methods.cacheblend import (
    Selective,
    attended_deviation,
    blended,
    cacheblend,
    deviation,
    dhd,
)
from benchmarks.methods.epic import Epic, chunks
from benchmarks.methods.full import Full
from benchmarks.methods.kvshare import kvshare, prefix
from benchmarks.methods.narrowing import Narrowing, Seen
from benchmarks.methods.reuse import place, plan
from kvshare_store.lookup.policy import PRESETS, ReusePolicy
from kvshare_store.plan.spans import Span
from tests.transformers.tiny import prompt_of

DONOR = prompt_of(64)
PROMPT = [*DONOR[:20], 7, 8, 9, *DONOR[22:]]
LENGTH = len(PROMPT)
EDIT = [20, 21, 22]
CLOSE = 1e-4


@pytest.fixture
def donor(llama: RowEngine) -> Donor:
    return donor_of(llama, DONOR)


@pytest.fixture
def full(llama: RowEngine) -> Prefilled:
    return Full().prefill(llama, PROMPT, [])


@pytest.fixture
def naive(llama: RowEngine, donor: Donor) -> Prefilled:
    return kvshare("aggressive").prefill(llama, PROMPT, [donor])


def close(one: Prefilled, other: Prefilled) -> bool:
    """The same rows and the same logits, up to rounding."""
    rows = torch.allclose(one.cache.rows, other.cache.rows, atol=CLOSE, rtol=0)
    return rows and torch.allclose(one.logits, other.logits, atol=CLOSE, rtol=0)


EVERYTHING: list[Method] = [
    cacheblend(1.0),
    dhd(1.0),
    Epic(k=LENGTH),
    kvshare("aggressive", edit_window=LENGTH),
    blended(PRESETS["balanced"], "balanced", 1.0),
]
NOTHING: list[Method] = [
    cacheblend(0.0),
    dhd(0.0),
    Epic(k=0, tail=1),
    kvshare("aggressive", edit_window=0),
    blended(PRESETS["aggressive"], "aggressive", 0.0),
]


@pytest.mark.parametrize("method", EVERYTHING, ids=lambda method: method.name)
def test_recomputing_everything_is_full_prefill(
    llama: RowEngine, donor: Donor, full: Prefilled, naive: Prefilled, method: Method
) -> None:
    assert not close(naive, full)  # otherwise the test could not fail
    assert close(method.prefill(llama, PROMPT, [donor]), full)


@pytest.mark.parametrize("method", NOTHING, ids=lambda method: method.name)
def test_recomputing_nothing_is_placeholders_only(
    llama: RowEngine, donor: Donor, naive: Prefilled, method: Method
) -> None:
    found = method.prefill(llama, PROMPT, [donor])
    assert close(found, naive)
    assert naive.computed == len(EDIT) + 1
    assert naive.reused + naive.computed == LENGTH
    assert found.reused + found.computed == LENGTH


def test_without_donors_everything_is_computed(llama: RowEngine, full: Prefilled) -> None:
    for method in (*EVERYTHING, prefix()):
        found = method.prefill(llama, PROMPT, [])
        assert (found.reused, found.computed, found.declined) == (0, LENGTH, "empty_store")
        assert torch.equal(found.logits, full.logits)


def test_prefix_reuses_what_is_common_at_the_start(
    llama: RowEngine, donor: Donor, full: Prefilled
) -> None:
    found = prefix().prefill(llama, PROMPT, [donor])
    assert found.reused == 20
    assert torch.equal(found.cache.rows[:, :, 0, :20], donor.keys_values[:, :, :20])
    assert close(found, full)


def test_donors_are_left_as_they_are(llama: RowEngine, donor: Donor) -> None:
    before = donor.keys_values.clone()
    for method in (*EVERYTHING, *NOTHING):
        method.prefill(llama, PROMPT, [donor])
    assert torch.equal(donor.keys_values, before)


def test_a_window_computes_the_tokens_after_the_edit(llama: RowEngine, donor: Donor) -> None:
    found = kvshare("aggressive", edit_window=5).prefill(llama, PROMPT, [donor])
    assert found.computed == len(EDIT) + 5 + 1
    kept = donor.keys_values[:, 1, 27:-1]  # V of positions 28 … 65, which moved by one
    assert torch.equal(found.cache.rows[:, 1, 0, 28:-1], kept)
    assert not torch.equal(found.cache.rows[:, 1, 0, 27], donor.keys_values[:, 1, 26])


def test_epic_computes_the_first_tokens_of_chunks_and_the_end(
    llama: RowEngine, donor: Donor
) -> None:
    planned = plan(PROMPT, [donor], PRESETS["aggressive"])
    placed = place(llama, PROMPT, [donor], planned)
    chosen = Epic(k=3, chunk_tokens=20, tail=2).selected(placed).nonzero().flatten().tolist()
    # chunks 0-20 (exact), 23-43, 43-63, 63-64; the last position is a placeholder anyway
    assert chosen == [23, 24, 25, 43, 44, 45, 63]


def test_chunks_join_spans_that_continue() -> None:
    spans = [Span(0, 4, 0, 0, 0), Span(4, 4, 4, 0, 4), Span(9, 3, 8, 0, 8), Span(12, 2, 0, 1, 0)]
    assert chunks(spans, 100) == [(0, 8), (9, 12), (12, 14)]
    assert chunks(spans, 5) == [(0, 5), (5, 8), (9, 12), (12, 14)]


def chosen_by(llama: RowEngine, donor: Donor, method: Selective) -> list[list[int]]:
    """For PROMPT: how many reused rows remain after each layer that chooses."""
    placed = place(llama, PROMPT, [donor], plan(PROMPT, [donor], method.policy))
    reused = int(placed.kept.sum())
    counts = {i: round(method.share * m * reused) for i, m in enumerate(method.schedule, 1)}
    narrowing = Narrowing(llama, placed.cache, ~placed.kept, counts, method.rule)
    found = []
    choose = narrowing.choose

    def watched(*args: object) -> torch.Tensor:
        rows = narrowing.rows
        going = choose(*args)
        found.append([p for p in rows[going].tolist() if placed.kept[p]])
        return going

    narrowing.choose = watched
    tokens = torch.tensor([PROMPT])
    llama.compute(placed.cache, tokens, torch.arange(LENGTH)[None], during=narrowing)
    return found


def test_hkvd_picks_what_deviates_most_from_full_prefill(
    llama: RowEngine, donor: Donor, full: Prefilled, naive: Prefilled
) -> None:
    """On the second layer fresh K and V are full prefill's, so the choice can be checked."""
    change = (full.cache.rows[1, :, 0] - naive.cache.rows[1, :, 0]).square().sum((0, 2, 3))
    change[[*EDIT, LENGTH - 1]] = -1
    method = cacheblend(0.1)
    first, second = chosen_by(llama, donor, method)[:2]
    reused = LENGTH - len(EDIT) - 1
    expected = change.topk(round(0.13 * reused)).indices.sort().values.tolist()
    assert first == expected
    assert all(position > max(EDIT) for position in first)  # nothing before an edit changes
    assert len(second) < len(first)
    assert set(second) < set(first)


def test_narrowing_leaves_the_model_as_it_was(llama: RowEngine, donor: Donor) -> None:
    before = llama.prefill(PROMPT)[1]
    cacheblend(0.2).prefill(llama, PROMPT, [donor])
    assert llama.model.config._attn_implementation == "sdpa"
    assert torch.equal(llama.prefill(PROMPT)[1], before)


def test_more_recomputing_comes_closer(llama: RowEngine, donor: Donor, full: Prefilled) -> None:
    def error(share: float) -> float:
        found = cacheblend(share).prefill(llama, PROMPT, [donor])
        return float((found.cache.rows - full.cache.rows).norm())

    assert error(0.0) > error(0.3) > error(0.8)


def test_rules_score_what_they_say() -> None:
    stored = torch.zeros(2, 3, 1, 2)
    fresh = stored.clone()
    fresh[0, 0] = 3.0  # K of the first row
    fresh[1, 1] = 1.0  # V of the second
    keys = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]]])
    query = torch.tensor([[[1.0, 0.0]] * 3])
    seen = Seen(query, keys, fresh, stored, torch.arange(3), 1.0)
    torch.testing.assert_close(deviation("k")(seen), torch.tensor([18.0**0.5, 0, 0]))
    torch.testing.assert_close(deviation("v")(seen), torch.tensor([0, 2.0**0.5, 0]))
    attended = attended_deviation(1)(seen)
    weight = torch.tensor([0.0, 9.0, 0.0]).softmax(0)[1]
    torch.testing.assert_close(attended, torch.tensor([0, float(weight) * 2.0**0.5, 0]))


def test_two_donors_fill_one_prompt(llama: RowEngine) -> None:
    first, second = prompt_of(64, 1), prompt_of(64, 2)
    prompt = [*first[:40], *second[10:60]]
    donors = [donor_of(llama, first), donor_of(llama, second)]
    found = kvshare("aggressive").prefill(llama, prompt, donors)
    assert found.reused == len(prompt) - 1
    assert torch.equal(found.cache.rows[:, 1, 0, 40:-1], donors[1].keys_values[:, 1, 10:59])


def test_policies_are_named_by_what_was_changed() -> None:
    method = kvshare("balanced", edit_window=32, tail=8)
    assert method.name == "kvshare balanced, edit_window 32, tail 8"
    assert method.policy == ReusePolicy(
        "balanced",
        edit_window=32,
        edit_growth=PRESETS["balanced"].edit_growth,
        min_run=PRESETS["balanced"].min_run,
        tail=8,
        max_generation=PRESETS["balanced"].max_generation,
    )


@pytest.mark.parametrize(("part", "which"), [("k", 0), ("v", 1)])
def test_hkvd_chooses_what_the_published_code_chooses(part: Literal["k", "v"], which: int) -> None:
    """LMCache's blender takes, on its one check layer, the rows with the largest sum of squared
    differences of K over heads and dimensions (cache_blend/blender.py); the authors' first code
    does the same with V."""
    generator = torch.Generator().manual_seed(3)
    fresh, stored = (torch.randn(2, 50, 3, 8, generator=generator) for _ in range(2))
    nothing = torch.empty(0)
    seen = Seen(nothing, nothing, fresh, stored, torch.arange(50), 1.0)
    published = torch.sum((fresh[which] - stored[which]) ** 2, dim=[1, 2])
    count = int(50 * 0.15)
    ours = deviation(part)(seen).topk(count).indices.sort().values
    assert torch.equal(ours, published.topk(count).indices.sort().values)
