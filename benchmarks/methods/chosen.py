"""A policy's windows and, beside or instead of them, positions that were chosen otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.methods.base import Donor, Prefilled, full_compute
from benchmarks.methods.dependence import Weights, sources
from benchmarks.methods.reuse import place, plan, positions_where
from kvshare_store.lookup.policy import Mask, ReusePolicy

COMMON = 2_000
"""Token ids below are of frequent pieces: byte pair encodings number merges by frequency."""
_OFTEN = 4
"""A token that occurs more often in a prompt is not rare there."""

Positions = npt.NDArray[np.int64]
Choice = Callable[[Positions, Mask], Mask]
"""From which position of the donor the policy takes each position (-1: it is computed) and which
these are, to which of them are computed all the same; bool `[tokens]`."""


@dataclass(frozen=True)
class Chosen:
    """Reuses what the policy keeps and the choice leaves."""

    name: str
    policy: ReusePolicy
    choice: Choice = field(repr=False)

    def prefill(
        self, engine: RowEngine, prompt: Sequence[int], donors: Sequence[Donor]
    ) -> Prefilled:
        """The prompt's rows; one donor."""
        planned = plan(prompt, donors, self.policy)
        if planned.declined:
            return full_compute(engine, prompt, planned.declined)
        placed = place(engine, prompt, donors, planned)
        kept = placed.kept.numpy()
        chosen = self.choice(sources(placed.spans, len(prompt)), kept)
        fresh = positions_where(~kept | chosen)
        logits = engine.partial(placed.cache, prompt, fresh)
        return Prefilled(placed.cache, logits, len(prompt) - len(fresh), len(fresh))


def highest(weights: Weights, kept: Mask, share: float, block: int = 1) -> Mask:
    """Of the kept positions the `share` with the highest weights, none of weight 0; with `block`,
    whole blocks of so many positions, by their mean."""
    pooled = _pooled(np.where(kept, weights, 0), block)
    count = round(share * int(kept.sum()))
    ranked = np.argsort(-pooled, kind="stable")[:count]
    chosen = np.zeros(len(kept), np.bool_)
    chosen[ranked] = True
    return chosen & kept & (pooled > 0)


def until(weights: Weights, kept: Mask, rest: float, block: int = 1) -> Mask:
    """Of the kept positions those with the highest weights, as few as leave no more than `rest` in
    sum: many of one family, none of another. With `block` as in `highest`."""
    pooled = _pooled(np.where(kept, weights, 0), block)
    ranked = np.argsort(-pooled, kind="stable")
    left = pooled.sum() - np.cumsum(pooled[ranked])
    enough = int(np.searchsorted(-left, -rest)) + 1 if pooled.sum() > rest else 0
    chosen = np.zeros(len(kept), np.bool_)
    chosen[ranked[:enough]] = True
    return chosen & kept


def _pooled(weights: Weights, block: int) -> Weights:
    if block == 1:
        return weights
    padded = np.pad(weights, (0, -len(weights) % block)).reshape(-1, block)
    return np.repeat(padded.mean(1), block)[: len(weights)]


def of_donor(weights: Weights, source: Positions) -> Weights:
    """Weights of a donor's positions where a prompt takes them over, 0 elsewhere."""
    return np.where(source >= 0, weights[source], 0).astype(np.float32)


def dependants(
    prompt: Sequence[int], donor: Sequence[int], source: Positions, kept: Mask, window: int
) -> Mask:
    """Kept positions at a later recurrence of a rare token that is computed, or whose row is left
    out (edited text and windows), and the `window - 1` behind it."""
    tokens, before = np.asarray(prompt), np.asarray(donor)
    first: dict[int, int] = {}
    for at in np.flatnonzero(source < 0):
        first.setdefault(int(tokens[at]), int(at))
    for token, at in _removed(before, source):
        first[token] = min(at, first.get(token, at))
    chosen = np.zeros(len(tokens), np.bool_)
    for token, edited in first.items():
        later = np.flatnonzero((tokens == token) & kept)
        if token >= COMMON and (tokens == token).sum() <= _OFTEN:
            for at in later[later > edited]:
                chosen[at : at + window] = True
    return chosen & kept


def _removed(donor: Positions, source: Positions) -> list[tuple[int, int]]:
    """Tokens of the donor that the prompt does not take over, each with the position of the prompt
    at which it would stand."""
    taken = np.zeros(len(donor), np.bool_)
    taken[source[source >= 0]] = True
    at_source = np.full(len(donor), len(source), np.int64)
    at_source[source[source >= 0]] = np.flatnonzero(source >= 0)
    stands = np.minimum.accumulate(at_source[::-1])[::-1]
    return [(int(donor[at]), int(stands[at])) for at in np.flatnonzero(~taken)]


def passage_starts(
    prompt: Sequence[int], newline: int, source: Positions, kept: Mask, k: int
) -> Mask:
    """The first `k` tokens of each passage behind the first edit. Passages have an empty line
    before them."""
    ends = np.asarray(prompt) == newline
    starts = np.flatnonzero(ends[:-2] & ends[1:-1] & ~ends[2:]) + 2
    moved = np.flatnonzero(source != np.arange(len(source)))
    chosen = np.zeros(len(kept), np.bool_)
    for start in starts[starts > (moved[0] if len(moved) else len(kept))]:
        chosen[start : start + k] = True
    return chosen & kept
