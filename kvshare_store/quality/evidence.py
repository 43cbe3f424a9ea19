"""Evidence: what the scores of one class of traffic say of each policy."""

from __future__ import annotations

import math

import msgspec

from kvshare_store.quality.confidence import Tally
from kvshare_store.quality.parts import COMPUTED, DISTANCE, bucket_of
from kvshare_store.quality.score import Score

MOST_NATS = 4.0
"""A regret counts as this at most, so that a mean of them can be bounded."""


class Scores(msgspec.Struct, array_like=True):
    """What some scores together say."""

    diverged: Tally = msgspec.field(default_factory=Tally)
    """Of greedy requests: 1 where another token was the likeliest."""
    regret: Tally = msgspec.field(default_factory=Tally)
    """Of the same requests, as shares of `MOST_NATS`."""
    sampled: Tally = msgspec.field(default_factory=Tally)
    """Regrets of the other requests. They have the sampling in them, so they are compared with
    those of controls that were sampled only."""

    def count(self, score: Score) -> None:
        """One more score."""
        regret = min(score.regret, MOST_NATS) / MOST_NATS
        if not score.greedy:
            self.sampled.add(regret)
            return
        self.regret.add(regret)
        self.diverged.add(float(score.diverged is not None))


class Evidence(Scores, array_like=False):
    """Scores of answers that were served under one policy."""

    doubt: float = 0.0
    """Log of the e-detector's value: how much likelier the last scores are if the rate is far above
    the bound than if it is at the bound."""
    computed: dict[str, Scores] = {}
    """By bucket, how much of the prompts was computed (`quality/parts.py`)."""
    distance: dict[str, Scores] = {}
    """By bucket, how far the answers begin behind an edit."""

    def add(self, score: Score, allowed: float = 1.0) -> None:
        """One more score. `allowed`: the rate of divergence that is not doubted."""
        self.count(score)
        for parts, name in (
            (self.computed, bucket_of(COMPUTED, _percent(score.computed))),
            (self.distance, bucket_of(DISTANCE, score.distance)),
        ):
            if name:
                parts.setdefault(name, Scores()).count(score)
        if score.greedy:
            self.doubt = max(0.0, self.doubt) + _doubt(score.diverged is not None, allowed)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _doubt(diverged: bool, allowed: float) -> float:
    """The log of a bet whose expectation is 1 at most while the rate is at most `allowed`: that the
    rate is four times as high (J. Shin, A. Ramdas, A. Rinaldo, "E-detectors", 2024)."""
    feared = min(4 * allowed, (1 + allowed) / 2)
    if allowed <= 0 or feared <= allowed:
        return 0.0
    return math.log(feared / allowed) if diverged else math.log((1 - feared) / (1 - allowed))


class Learned(msgspec.Struct):
    """What is known of one class."""

    policies: dict[str, Evidence] = msgspec.field(default_factory=dict)
    epoch: int = 1
    """Counts how often the evidence began anew. Each time a smaller part of the error is left."""
    unscored: int = 0
    """Requests that were served on approximate rows since the last score of a greedy one."""
    scored: float = 0.0
    """When the last score came, Unix seconds."""

    def of(self, policy: str) -> Evidence:
        """The evidence of a policy."""
        return self.policies.setdefault(policy, Evidence())

    def forget(self) -> None:
        """Begin anew."""
        self.policies.clear()
        self.epoch += 1
