"""All classes together, named by none: what may be counted where names would be too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare_store.quality.confidence import Floats
from kvshare_store.quality.ladder import Seen, Terms, extra_of
from kvshare_store.readable import enough

Which = npt.NDArray[np.bool_]


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
    doubted: int = 0
    """Classes with a policy whose last scores look as if its rate had risen above the bound."""
    shown: dict[str, Limits] = {}
    """As `extra`, of the classes with enough scores and controls to show a rate of."""


def overview(ladder: Sequence[str], terms: Terms, classes: Sequence[Seen]) -> Overview:
    """All classes at once: there may be thousands. Without a bound all get the last policy."""
    found = extra_of(classes, ladder, terms)
    rungs = found.rungs(terms.bound if terms.bound > 0 else np.inf)
    lower, upper = np.maximum(0.0, found.lower), np.maximum(0.0, found.upper)
    known = _which(classes, ladder, lambda scores, _: scores > 0)
    shown = _which(classes, ladder, enough)
    return Overview(
        terms.bound,
        round(1.0 - terms.error, 12),
        {policy: int((rungs == at).sum()) for at, policy in enumerate(ladder)},
        sum(one.silent for one in classes),
        _highest(lower, upper, known, ladder),
        sum(bool(one.doubted) for one in classes),
        _highest(lower, upper, shown, ladder),
    )


def _which(
    classes: Sequence[Seen], ladder: Sequence[str], meant: Callable[[int, int], bool]
) -> Which:
    """Classes by policies: those that are not silent, and whose scores and controls are meant."""
    none = (0, 0.0, 0.0)
    found = [
        [not one.silent and meant(one.rates.get(name, none)[0], one.floor[0]) for name in ladder]
        for one in classes
    ]
    return np.array(found, bool).reshape(len(classes), len(ladder))


def _highest(
    lower: Floats, upper: Floats, meant: Which, ladder: Sequence[str]
) -> dict[str, Limits]:
    return {
        policy: Limits(float(lower[meant[:, at], at].max()), float(upper[meant[:, at], at].max()))
        for at, policy in enumerate(ladder)
        if meant[:, at].any()
    }
