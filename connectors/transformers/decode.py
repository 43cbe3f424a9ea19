"""Decoding from prefilled prompts: greedy answers and teacher forcing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.rows import RowCache
from torch import Tensor


class Ready(Protocol):
    """A prefilled prompt, whatever computed its rows."""

    @property
    def cache(self) -> RowCache:
        """Its rows: one prompt, one slot for each position."""

    @property
    def logits(self) -> Tensor:
        """float32 `[vocab]`: of its last position."""


def stacked(engine: RowEngine, prompts: Sequence[Ready], more: int) -> RowCache:
    """One cache of all prompts, left-aligned, with room for `more` tokens each.

    Shorter prompts need no padding mask: a query sees the slots up to its own position only.
    """
    longest = max(ready.cache.slots for ready in prompts)
    batch = engine.cache(longest + more, len(prompts))
    for index, ready in enumerate(prompts):
        batch.rows[:, :, index, : ready.cache.slots] = ready.cache.rows[:, :, 0]
    return batch


def generate(
    engine: RowEngine,
    prompts: Sequence[Ready],
    max_new_tokens: int,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Greedy answers to a batch of prefilled prompts, without the stop token at the end of each.

    The prompts' own caches are not changed.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    cache = stacked(engine, prompts, max_new_tokens - 1)
    lengths = torch.tensor([ready.cache.slots for ready in prompts])
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    logits = torch.stack([ready.logits for ready in prompts])
    for step in range(max_new_tokens):
        chosen = logits.argmax(-1).tolist()
        going = [row for row, token in enumerate(chosen) if token not in stop]
        for row in going:
            answers[alive[row]].append(chosen[row])
        if len(going) < len(alive):
            alive = [alive[row] for row in going]
            cache = RowCache(cache.rows[:, :, going])
        if not alive or step == max_new_tokens - 1:
            break
        tokens = torch.tensor([[answers[index][-1]] for index in alive])
        logits = engine.compute(cache, tokens, lengths[alive, None] + step)[:, 0]
    return answers


def teacher_forced(engine: RowEngine, ready: Ready, continuation: Sequence[int]) -> Tensor:
    """Log-probabilities before each token of `continuation`: `[len(continuation), vocab]`."""
    return teacher_forced_batch(engine, [ready], continuation)[0]


def teacher_forced_batch(
    engine: RowEngine, prompts: Sequence[Ready], continuation: Sequence[int]
) -> Tensor:
    """Log-probabilities before each token of one continuation of all prompts, as one batch.

    float32 `[prompts, len(continuation), vocab]`. The prompts' own caches are left as they are.
    """
    logits = [torch.stack([ready.logits for ready in prompts])[:, None]]
    if len(continuation) > 1:
        fed = torch.tensor([list(continuation[:-1])] * len(prompts))
        new = fed.shape[1]
        cache = stacked(engine, prompts, new)
        lengths = torch.tensor([ready.cache.slots for ready in prompts])
        positions = lengths[:, None] + torch.arange(new)
        logits.append(engine.compute(cache, fed, positions, logits_at=range(new)))
    return torch.cat(logits, 1).log_softmax(-1)[:, : len(continuation)]
