"""What a method is; what is done with the caches that methods fill is here by name too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from kvshare_connectors.transformers.decode import generate, teacher_forced, teacher_forced_batch
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.rows import RowCache
from torch import Tensor

__all__ = [
    "Donor",
    "Method",
    "Prefilled",
    "donor_of",
    "full_compute",
    "generate",
    "in_two_chunks",
    "teacher_forced",
    "teacher_forced_batch",
]


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


def in_two_chunks(engine: RowEngine, prompt: Sequence[int]) -> Prefilled:
    """Full compute as an engine does it whose step budget ends in the middle of the prompt.

    Exact, and rounded otherwise than in one: the noise floor.
    """
    cache = engine.cache(len(prompt))
    tokens, positions = torch.tensor([list(prompt)]), torch.arange(len(prompt))[None]
    cut = len(prompt) // 2
    engine.compute(cache, tokens[:, :cut], positions[:, :cut])
    logits = engine.compute(cache, tokens[:, cut:], positions[:, cut:])
    return Prefilled(cache, logits[0, 0], 0, len(prompt))


def donor_of(engine: RowEngine, tokens: Sequence[int]) -> Donor:
    """Compute a prompt in full, to be a donor."""
    cache, _ = engine.prefill(tokens)
    return Donor(tuple(tokens), cache.rows[:, :, 0])
