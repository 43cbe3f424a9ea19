"""All classes together, named by none: what may be counted where names would be too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from kvshare_store.quality.classes import Known
from kvshare_store.quality.confidence import Floats, Tally, radius
from kvshare_store.quality.evidence import Evidence
from kvshare_store.quality.ladder import EXACT, STALE, Terms

_Numbers = tuple[int, float, float]
"""Of a `Tally`."""


class Limits(msgspec.Struct, frozen=True):
    """Of the extra rate of divergence under one policy, each that of the class where it is
    highest."""

    lower: float
    upper: float


class Overview(msgspec.Struct, frozen=True):
    """What is known of all classes."""

    bound: float
    """The extra rate of divergence that the operator accepts; 0: any."""
    confidence: float
    classes: dict[str, int]
    """How many get each policy of the ladder."""
    silent: int
    """Those of which so many requests had no score that what was learned counts no more."""
    extra: dict[str, Limits]
    """By policy, where it has scored greedy answers; not of silent classes."""


class Counted(NamedTuple):
    """What an overview takes of one class: copies."""

    epoch: int
    silent: bool
    floor: _Numbers
    rates: dict[str, _Numbers]
    """Of divergence, by policy."""


def counted(known: Known, floor: Evidence) -> Counted:
    """One class, and the controls of its namespace."""
    learned = known.learned
    rates = {policy: _numbers(one.diverged) for policy, one in learned.policies.items()}
    return Counted(learned.epoch, learned.unscored >= STALE, _numbers(floor.diverged), rates)


def _numbers(tally: Tally) -> _Numbers:
    return tally.count, tally.total, tally.deviation


def overview(ladder: Sequence[str], terms: Terms, classes: Sequence[Counted]) -> Overview:
    """As `decide` sees each class, computed for all at once: there may be thousands."""
    steers = terms.bound > 0
    lower, upper, scored = _extra(ladder, terms, classes)
    loud = ~np.array([steers and one.silent for one in classes], bool)
    allowed = (upper <= terms.bound) & loud[:, None] if steers else np.ones(upper.shape, bool)
    allowed[:, EXACT:1] = True
    rungs = (allowed * np.arange(len(ladder))).max(axis=1, initial=EXACT)
    known = scored & loud[:, None]
    return Overview(
        terms.bound,
        round(1.0 - terms.error, 12),
        {policy: int((rungs == at).sum()) for at, policy in enumerate(ladder)},
        int((~loud).sum()),
        {
            policy: Limits(
                float(lower[known[:, at], at].max()), float(upper[known[:, at], at].max())
            )
            for at, policy in enumerate(ladder)
            if known[:, at].any()
        },
    )


def _extra(
    ladder: Sequence[str], terms: Terms, classes: Sequence[Counted]
) -> tuple[Floats, Floats, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
    """For each class and policy the limits of the extra rate, and whether any answer was scored."""
    nothing: _Numbers = (0, 0.0, 0.0)
    floor_low, floor_high = _limits([one.floor for one in classes], terms.each())
    lower, upper = np.zeros((2, len(classes), len(ladder)))
    scored = np.zeros(upper.shape, bool)
    epochs = np.array([one.epoch for one in classes], int)
    for at, policy in enumerate(ladder):
        rates = [one.rates.get(policy, nothing) for one in classes]
        scored[:, at] = [bool(count) for count, _, _ in rates]
        for epoch in np.unique(epochs):
            these = np.flatnonzero(epochs == epoch)
            low, high = _limits([rates[one] for one in these], terms.each(int(epoch)))
            lower[these, at] = np.maximum(0.0, low - floor_high[these])
            upper[these, at] = np.maximum(0.0, high - floor_low[these])
    return lower, upper, scored


def _limits(tallies: Sequence[_Numbers], error: float) -> tuple[Floats, Floats]:
    """As `Tally.interval`, of many."""
    counts, totals, deviations = np.array(tallies, np.float64).reshape(-1, 3).T
    some = np.maximum(counts, 1.0)
    width = np.where(counts > 0, radius(deviations, error) / some, 1.0)
    mean = totals / some
    return np.maximum(0.0, mean - width), np.minimum(1.0, mean + width)
