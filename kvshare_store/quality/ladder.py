"""The ladder: which policy the evidence of a class allows, and how often the next one is tried.

docs/design/quality.md has the reasons and the proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_store.quality.confidence import Floats, Numbers, limits, radius
from kvshare_store.quality.evidence import Evidence, Learned

EXACT = 0
"""The first rung: all rows are exact, so nothing diverges for it."""
STALE = 1000
"""Requests that were served without a single score: what was learned before counts no more."""
_SHARED_BY = 4
"""Limits that must all hold: those of three policies, and of the controls."""


class Terms(NamedTuple):
    """What the operator accepts."""

    bound: float
    """The extra rate of divergence. 0: any; nothing is steered."""
    error: float
    """The probability that a class is ever beyond it: 1 - confidence."""

    def each(self, epoch: int = 1) -> float:
        """The error of each limit, so that all together keep to `error` over all epochs."""
        return self.error / (_SHARED_BY * epoch * (epoch + 1))


class Decision(NamedTuple):
    """What a class gets."""

    rung: int = EXACT
    """The highest whose extra rate is known to be within the bound."""
    tried: int = EXACT
    """The next one, which some requests get; `rung` if none is tried."""
    share: float = 0.0
    """Of the requests, for `tried`."""


class Seen(NamedTuple):
    """What the ladder goes by, of one class: copies."""

    epoch: int
    silent: bool
    """So many requests came without a score that what was learned counts no more."""
    floor: Numbers
    rates: dict[str, Numbers]
    """Of divergence, by policy."""
    doubted: frozenset[str]
    """Policies whose last scores look as if their rate had risen above the bound."""


def seen(learned: Learned, floor: Evidence, terms: Terms) -> Seen:
    """One class, and the controls of its namespace."""
    found = learned.policies
    return Seen(
        learned.epoch,
        terms.bound > 0 and learned.unscored >= STALE,
        floor.diverged.numbers,
        {policy: one.diverged.numbers for policy, one in found.items()},
        frozenset(policy for policy, one in found.items() if doubted(one, terms)),
    )


class Extra(NamedTuple):
    """Limits of the rate of divergence beyond that of controls: classes by policies."""

    lower: Floats
    upper: Floats

    def rungs(self, bound: float) -> npt.NDArray[np.int_]:
        """Of each class the highest policy that is within the bound."""
        within = self.upper <= bound
        within[:, EXACT:1] = True
        found: npt.NDArray[np.int_] = (within * np.arange(within.shape[1])).max(1, initial=EXACT)
        return found


def extra_of(classes: Sequence[Seen], ladder: Sequence[str], terms: Terms) -> Extra:
    """What is known of each policy of each class. All that is decided, shown and counted comes from
    here. The mean so far is no limit for what comes next if it is doubted that this is as before,
    or if nobody has scored for long."""
    nothing: Numbers = (0, 0.0, 0.0)
    shape, floor = (len(classes), len(ladder) + 1), len(ladder)
    numbers, errors = [], []
    for one in classes:
        rates = {} if one.silent else one.rates
        numbers.append([*(rates.get(policy, nothing) for policy in ladder), one.floor])
        errors.append([*[terms.each(one.epoch)] * floor, terms.each()])
    low, high = limits(np.array(numbers, float).reshape(*shape, 3), np.reshape(errors, shape))
    for at, one in enumerate(classes):
        for policy in one.doubted.intersection(ladder):
            high[at, ladder.index(policy)] = 1.0
    return Extra(low[:, :floor] - high[:, floor:], high[:, :floor] - low[:, floor:])


def decide(learned: Learned, floor: Evidence, ladder: Sequence[str], terms: Terms) -> Decision:
    """The highest policy of the ladder that is within the bound, and the share of requests for the
    next one such that all together are within it, whatever is true within the limits."""
    found = extra_of([seen(learned, floor, terms)], ladder, terms)
    (rung,) = found.rungs(terms.bound).tolist()
    (lower,), (upper,) = found.lower.tolist(), found.upper.tolist()
    tried = rung + 1
    if tried >= len(ladder) or lower[tried] > terms.bound:
        return Decision(rung, rung)
    spent = 0.0 if rung == EXACT else max(0.0, upper[rung])
    return Decision(rung, tried, (terms.bound - spent) / (upper[tried] - spent))


def scores_needed(terms: Terms, epoch: int = 1) -> int:
    """How many scores without a divergence show that a policy is within the bound; 0 without one.
    Each divergence takes more."""
    if not terms.bound:
        return 0
    return math.ceil(float(radius(0.0, terms.each(epoch))) / terms.bound)


def requests_needed(terms: Terms, scores: int, epoch: int = 1) -> int:
    """How many more requests of a class at `exact` that takes after so many good scores, if each
    request that is tried is scored: few are tried at first. 0 if there are enough."""
    counts = np.arange(scores, scores_needed(terms, epoch))
    upper = np.minimum(1.0, radius(0.0, terms.each(epoch)) / np.maximum(counts, 1))
    return math.ceil(upper.sum() / terms.bound) if len(counts) else 0


def doubted(evidence: Evidence, terms: Terms) -> bool:
    """Whether the last scores look as if the rate had risen above the bound. While it is at the
    bound this happens once in so many scores as `1 / (error * bound)`, or less often."""
    return terms.bound > 0 and evidence.doubt >= -math.log(terms.error * terms.bound)
