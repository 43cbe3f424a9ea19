"""Rows computed at scattered positions are the rows that full prefill computes."""

from __future__ import annotations

import pytest
import torch
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.rows import RowCache

from kvshare_store.errors import PlanError
from tests.transformers.tiny import prompt_of, tiny_model

TOLERANCE = 1e-4
LENGTH = 48


def noisy(engine: RowEngine, tokens: list[int], noise: torch.Tensor) -> RowCache:
    """A full prefill's cache with 50-fold noise at the positions `noise`."""
    cache, _ = engine.prefill(tokens)
    cache.rows[:, :, :, noise] = torch.randn_like(cache.rows[:, :, :, noise]) * 50
    return cache


@pytest.mark.parametrize("seed", range(3))
def test_partial_prefill_equals_full_prefill(engine: RowEngine, seed: int) -> None:
    tokens = prompt_of(LENGTH, seed)
    full, expected = engine.prefill(tokens)
    gaps = torch.rand(LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.5
    gaps[-1] = True
    positions = gaps.nonzero().flatten()
    cache = noisy(engine, tokens, positions)

    logits = engine.partial(cache, tokens, positions)

    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(cache.rows, full.rows, atol=TOLERANCE, rtol=0)
    kept = (~gaps).nonzero().flatten()
    assert torch.equal(cache.rows[:, :, :, kept], full.rows[:, :, :, kept])


def test_a_noisy_row_that_is_not_recomputed_shows(engine: RowEngine) -> None:
    """The control: the equality above comes from recomputing, not from rows that have no
    influence."""
    tokens = prompt_of(LENGTH)
    _, expected = engine.prefill(tokens)
    positions = torch.tensor([4, 5, 6, 20, 21, LENGTH - 1])
    cache = noisy(engine, tokens, positions)
    logits = engine.partial(cache, tokens, positions[positions != 20])
    assert (logits - expected).abs().max() > 100 * TOLERANCE


def test_a_later_row_is_never_seen(engine: RowEngine) -> None:
    tokens = prompt_of(LENGTH)
    full, _ = engine.prefill(tokens)
    cache = noisy(engine, tokens, torch.arange(10, LENGTH))
    engine.compute(cache, torch.tensor([tokens[8:10]]), torch.tensor([[8, 9]]))
    torch.testing.assert_close(
        cache.rows[:, :, :, :10], full.rows[:, :, :, :10], atol=TOLERANCE, rtol=0
    )


def test_prompts_of_different_lengths_share_a_batch(llama: RowEngine) -> None:
    prompts = [prompt_of(30, 1), prompt_of(12, 2)]
    alone = [llama.prefill(tokens)[0] for tokens in prompts]
    cache = llama.cache(31, batch=2)
    for index, one in enumerate(alone):
        cache.rows[:, :, index, : one.slots] = one.rows[:, :, 0]
    positions = torch.tensor([[30], [12]])
    together = llama.compute(cache, torch.tensor([[7], [9]]), positions)[:, 0]
    for index, token in enumerate((7, 9)):
        expected = llama.prefill([*prompts[index], token])[1]
        torch.testing.assert_close(together[index], expected, atol=TOLERANCE, rtol=0)


def test_bf16_rows_keep_their_dtype() -> None:
    engine = RowEngine(tiny_model("LlamaConfig", torch.bfloat16))
    cache, logits = engine.prefill(prompt_of(LENGTH))
    assert cache.rows.dtype == torch.bfloat16
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("positions", [[], [3, 4], [LENGTH]])
def test_positions_that_make_no_sense_are_refused(llama: RowEngine, positions: list[int]) -> None:
    tokens = prompt_of(LENGTH)
    cache, _ = llama.prefill(tokens)
    with pytest.raises(PlanError):
        llama.partial(cache, tokens, torch.tensor(positions, dtype=torch.int64))


def test_the_context_is_not_overrun(llama: RowEngine) -> None:
    with pytest.raises(PlanError):
        llama.prefill(prompt_of(300))
