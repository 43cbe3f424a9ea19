"""Confidence sequences: limits for a mean that hold at all times at once.

Whoever looks at an ordinary confidence interval after each value, and acts when it looks good, is
wrong far more often than it says. A confidence sequence holds at every moment, whoever looks when
and stops for whatever reason.

Here: the empirical Bernstein confidence sequence of S. Howard, A. Ramdas, J. McAuliffe, J. Sekhon,
"Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49 (2021),
theorem 4, with a grid of bets in place of their mixture (as in I. Waudby-Smith, A. Ramdas,
"Estimating means of bounded random variables by betting", JRSS B 86 (2024)). For values X_i in 0 to
1, guesses G_i made before them, and a bet c in 0 to 1,

    exp(c sum(X_i - E_i) - (-log(1 - c) - c) sum (X_i - G_i)^2),  E_i = E[X_i | what was before],

is a supermartingale that starts at 1, and so it is with E_i - X_i. So by Ville's inequality it ever
reaches 1/a with probability a at most. The sum of the E_i is all that it says about them: they may
drift. What is bounded is their mean so far.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Numbers = tuple[int, float, float]
"""Of a `Tally`: count, total and deviation."""

_BETS: Floats = 0.95 * 2.0 ** (-np.arange(16) / 2)
"""From streams of a few values to such of a hundred thousand."""
_SHARES: Floats = 1.0 / ((np.arange(16) + 1) * (np.arange(16) + 2))
"""Of the allowed error, for each bet; together less than 1. The first one decides how soon a stream
without any error is trusted."""
_PRICES: Floats = (-np.log1p(-_BETS) - _BETS) / _BETS
_ONCE: Floats = -np.log(_SHARES) / _BETS


def radius(deviation: npt.ArrayLike, error: npt.ArrayLike) -> Floats:
    """How far the sum of some values is from the sum of their means, on either side.

    `deviation`: sums of squared distances from the guesses, of any shape. `error`: the probability
    that the sum is ever further away, on one side; of a shape that goes with it.
    """
    spent = np.asarray(deviation, np.float64)[..., None] * _PRICES
    allowed = np.log(np.asarray(error, np.float64))[..., None] / _BETS
    found: Floats = (spent + _ONCE - allowed).min(axis=-1)
    return found


def limits(numbers: npt.ArrayLike, error: npt.ArrayLike) -> tuple[Floats, Floats]:
    """A lower and an upper limit for each mean of many tallies; 0 and 1 without any value.

    `numbers`: count, total and deviation of each, of any shape. `error`: as of `radius`.
    """
    found = np.asarray(numbers, np.float64)
    count = found[..., 0]
    some = np.maximum(count, 1.0)
    mean = found[..., 1] / some
    width = np.where(count > 0, radius(found[..., 2], error) / some, 1.0)
    return np.maximum(0.0, mean - width), np.minimum(1.0, mean + width)


class Interval(NamedTuple):
    """An estimate and its limits."""

    mean: float
    low: float
    high: float


class Tally(msgspec.Struct, array_like=True):
    """Values in 0 to 1 that came one after another."""

    count: int = 0
    total: float = 0.0
    deviation: float = 0.0
    """Sum of squared distances from the mean of the values before."""

    def add(self, value: float) -> None:
        """One more."""
        self.deviation += (value - self.mean) ** 2
        self.count += 1
        self.total += value

    @property
    def mean(self) -> float:
        """0 without any."""
        return self.total / self.count if self.count else 0.0

    def interval(self, error: float) -> Interval:
        """The mean and its limits. Each is ever wrong with the probability `error` at most."""
        low, high = limits(self.numbers, error)
        return Interval(self.mean, float(low), float(high))

    @property
    def numbers(self) -> Numbers:
        """What `limits` goes by."""
        return self.count, self.total, self.deviation
