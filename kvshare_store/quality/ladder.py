"""The ladder: which policy the evidence of a class allows, and how often the next one is tried.

docs/design/quality.md has the reasons and the proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvshare_store.quality.confidence import Interval
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


def decide(learned: Learned, floor: Evidence, ladder: Sequence[str], terms: Terms) -> Decision:
    """The highest policy of the ladder that is within the bound, and the share of requests for the
    next one such that all together are within it, whatever is true within the limits."""
    stale = learned.unscored >= STALE
    error, base = terms.each(learned.epoch), floor.diverged.interval(terms.each())
    rates = [_rate(learned.policies.get(policy), error, terms, stale=stale) for policy in ladder]
    extra = [max(0.0, rate.high - base.low) for rate in rates]
    extra[EXACT] = 0.0
    rung = max(at for at in range(len(ladder)) if extra[at] <= terms.bound)
    tried = rung + 1
    if tried >= len(ladder) or rates[tried].low - base.high > terms.bound:
        return Decision(rung, rung)
    return Decision(rung, tried, (terms.bound - extra[rung]) / (extra[tried] - extra[rung]))


def _rate(found: Evidence | None, error: float, terms: Terms, *, stale: bool) -> Interval:
    if found is None or stale:
        return Interval(0.0, 0.0, 1.0)
    rate = found.diverged.interval(error)
    # the mean so far is no limit for what comes next, if it is doubted that this is as before
    return rate._replace(high=1.0) if doubted(found, terms) else rate


def doubted(evidence: Evidence, terms: Terms) -> bool:
    """Whether the last scores look as if the rate had risen above the bound. While it is at the
    bound this happens once in so many scores as `1 / (error * bound)`, or less often."""
    return evidence.doubt >= -math.log(terms.error * terms.bound)
