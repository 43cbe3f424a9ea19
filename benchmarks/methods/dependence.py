"""How much the rows of a donor depend on what was edited: learned from a prompt computed in full.

A second look computes an edited prompt in full. Beside the rows that would have been reused, that
says how far each of them was off, and which of them the end of the prompt attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from kvshare_connectors.transformers.attention import attending, grouped_attention
from kvshare_connectors.transformers.engine import RowEngine
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.methods.base import Donor, Prefilled
from benchmarks.methods.reuse import PLACEHOLDERS_ONLY, place, plan
from kvshare_store.plan.spans import Span

_NAME = "kvshare_attended"
_SUFFIX = 16
"""Queries at the end of the prompt whose attention counts."""

Weights = npt.NDArray[np.float32]
"""A number for each position of a prompt, 0 or more."""


class Dependence(NamedTuple):
    """Two ways to say how much each position of a prompt was off."""

    deviation: Weights
    """Mean over the layers of the L2 norm of what changed in K and V, relative to that of the
    layer's rows."""
    attended: Weights
    """Sum over the layers of the attention of the last queries times what changed in V."""


class Attended(AbstractContextManager["Attended"]):
    """While entered, a forward notes how much its last queries attend to each slot."""

    def __init__(self, engine: RowEngine) -> None:
        self._engine = engine
        self._undo = ExitStack()
        self.layers: list[Tensor] = []
        """For each layer float32 `[slots]`: the mean over heads and queries."""

    def __enter__(self) -> Attended:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, self._attend)
        self._undo.enter_context(attending(self._engine.model, _NAME))
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
    ) -> Any:
        last, seen = query[0, :, -_SUFFIX:], mask[0, :, -_SUFFIX:]
        keys = key[0].repeat_interleave(len(last) // key.shape[1], 0)
        scores = last @ keys.transpose(1, 2) * module.scaling + seen
        self.layers.append(scores.float().softmax(-1).mean((0, 1)))
        return grouped_attention(module, query, key, value, mask, **kwargs)


def computed_and_attended(engine: RowEngine, prompt: Sequence[int]) -> tuple[Prefilled, Tensor]:
    """The prompt computed in full, and float32 `[layers, tokens]`: what its end attends to."""
    cache, attended = engine.cache(len(prompt)), Attended(engine)
    tokens, positions = torch.tensor([list(prompt)]), torch.arange(len(prompt))[None]
    logits = engine.compute(cache, tokens, positions, during=attended)
    return Prefilled(cache, logits[0, 0], 0, len(prompt)), torch.stack(attended.layers)


def dependence(
    engine: RowEngine, prompt: Sequence[int], donor: Donor, full: Prefilled, attention: Tensor
) -> tuple[Dependence, npt.NDArray[np.int64]]:
    """How far off each position of the prompt would be if all that can be were reused (0 where
    nothing is), and from which position of the donor (-1: none)."""
    placed = place(engine, prompt, [donor], plan(prompt, [donor], PLACEHOLDERS_ONLY))
    source = sources(placed.spans, len(prompt))
    true = full.cache.rows[:, :, 0]
    change = (placed.cache.rows[:, :, 0] - true).flatten(3).norm(dim=3)  # [layers, 2, tokens]
    change /= true.flatten(3).norm(dim=3).mean(2, keepdim=True)
    change[:, :, source < 0] = 0
    attended = (attention * change[:, 1]).sum(0)
    return Dependence(change.mean((0, 1)).numpy(), attended.numpy()), source


def sources(spans: Sequence[Span], length: int) -> npt.NDArray[np.int64]:
    """The donor's position that fills each position of a prompt, -1 where none does."""
    source = np.full(length, -1, np.int64)
    for span in spans:
        source[span.start : span.stop] = np.arange(span.source, span.source + span.length)
    return source


def learned(engine: RowEngine, donor: Donor, earlier: Sequence[Sequence[int]]) -> Dependence:
    """The mean over earlier prompts of how much each position *of the donor* was off."""
    sums = np.zeros((2, len(donor.tokens)), np.float32)
    counts = np.zeros(len(donor.tokens), np.float32)
    for prompt in earlier:
        found, source = dependence(engine, prompt, donor, *computed_and_attended(engine, prompt))
        at = np.flatnonzero(source >= 0)
        sums[:, source[at]] += np.stack(found)[:, at]
        counts[source[at]] += 1
    return Dependence(*(sums / np.maximum(counts, 1)))
