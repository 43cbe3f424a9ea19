"""All classes together, named by none: what may be counted where names would be too many."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from kvshare_store.quality.ladder import Seen, Terms, extra_of


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


def overview(ladder: Sequence[str], terms: Terms, classes: Sequence[Seen]) -> Overview:
    """All classes at once: there may be thousands. Without a bound all get the last policy."""
    found = extra_of(classes, ladder, terms)
    rungs = found.rungs(terms.bound if terms.bound > 0 else np.inf)
    lower, upper = np.maximum(0.0, found.lower), np.maximum(0.0, found.upper)
    known = np.array(
        [[not one.silent and policy in one.rates and one.rates[policy][0] > 0 for policy in ladder]
         for one in classes], bool,
    ).reshape(upper.shape)  # fmt: skip
    return Overview(
        terms.bound,
        round(1.0 - terms.error, 12),
        {policy: int((rungs == at).sum()) for at, policy in enumerate(ladder)},
        sum(one.silent for one in classes),
        {
            policy: Limits(
                float(lower[known[:, at], at].max()), float(upper[known[:, at], at].max())
            )
            for at, policy in enumerate(ladder)
            if known[:, at].any()
        },
        sum(bool(one.doubted) for one in classes),
    )
