"""What a method is, and what is done with the cache that it fills."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.rows import RowCache
from torch import Tensor


@dataclass(frozen=True)
class Donor:
    """An earlier prompt, computed in full."""

    tokens: tuple[int, ...]
    keys_values: Tensor
    """`[layers, 2, tokens, kv_heads, head_dim]`, K turned for the donor's own positions."""


@dataclass(frozen=True)
class Prefilled:
    """A prompt whose rows are all there, reused or computed."""

    cache: RowCache
    """One slot for each position of the prompt."""
    logits: Tensor
    """float32 `[vocab]`: of the last position."""
    reused: int
    """Rows taken from donors."""
    computed: int
    """Rows computed in every layer; a method that computes some layers more counts the mean."""
    declined: str = ""
    """Why nothing was reused, or empty."""


class Method(Protocol):
    """A way to fill a prompt's cache. Donors come most similar first and are not changed."""

    @property
    def name(self) -> str:
        """How the method and its parameters are written in tables."""

    def prefill(
        self, engine: RowEngine, prompt: Sequence[int], donors: Sequence[Donor]
    ) -> Prefilled:
        """The prompt's rows and the logits of its last position."""


def full_compute(engine: RowEngine, prompt: Sequence[int], declined: str = "") -> Prefilled:
    """Full prefill, as every method does it that finds nothing to reuse."""
    cache, logits = engine.prefill(prompt)
    return Prefilled(cache, logits, 0, len(prompt), declined)


def donor_of(engine: RowEngine, tokens: Sequence[int]) -> Donor:
    """Compute a prompt in full, to be a donor."""
    cache, _ = engine.prefill(tokens)
    return Donor(tuple(tokens), cache.rows[:, :, 0])


def stacked(engine: RowEngine, prompts: Sequence[Prefilled], more: int) -> RowCache:
    """One cache of all prompts, left-aligned, with room for `more` tokens each.

    Shorter prompts need no padding mask: a query sees the slots up to its own position only.
    """
    longest = max(prefilled.cache.slots for prefilled in prompts)
    batch = engine.cache(longest + more, len(prompts))
    for index, prefilled in enumerate(prompts):
        batch.rows[:, :, index, : prefilled.cache.slots] = prefilled.cache.rows[:, :, 0]
    return batch


def generate(
    engine: RowEngine,
    prompts: Sequence[Prefilled],
    max_new_tokens: int,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Greedy answers to a batch of prefilled prompts, without the stop token that ended each.

    The prompts' own caches are left as they are.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    cache = stacked(engine, prompts, max_new_tokens - 1)
    lengths = torch.tensor([prefilled.cache.slots for prefilled in prompts])
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    logits = torch.stack([prefilled.logits for prefilled in prompts])
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


def teacher_forced(engine: RowEngine, prefilled: Prefilled, continuation: Sequence[int]) -> Tensor:
    """Log-probabilities of each token of `continuation`, float32 `[len(continuation), vocab]`."""
    logits = [prefilled.logits[None]]
    if len(continuation) > 1:
        length = prefilled.cache.slots
        fed = torch.tensor([list(continuation[:-1])])
        cache = stacked(engine, [prefilled], fed.shape[1])
        positions = torch.arange(length, length + fed.shape[1])[None]
        logits.append(engine.compute(cache, fed, positions, logits_at=range(fed.shape[1]))[0])
    return torch.cat(logits).log_softmax(-1)[: len(continuation)]
