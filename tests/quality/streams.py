"""Streams of requests of one class, served as `Quality` says and scored afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvshare_store.observability.metrics import Metrics
from kvshare_store.quality.keeping import File
from kvshare_store.quality.ladder import Terms
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.score import Score

LADDER = ("exact", "faithful", "balanced", "aggressive")
Rates = Callable[[int], tuple[float, float, float]]
"""The extra rate of divergence under each policy behind `exact`, at each request."""


def score(
    policy: str = "faithful",
    diverged: bool = False,
    *,
    control: bool = False,
    greedy: bool = True,
    namespace: str = "n",
    traffic: str = "t",
) -> Score:
    return Score(
        namespace=namespace,
        traffic=traffic,
        policy="off" if control else policy,
        regrets=(0.0, 1.5 if diverged else 0.0),
        greedy=greedy,
        control=control,
    )


def quality(
    bound: float = 0.02, file: File | None = None, seed: int = 0, **options: object
) -> Quality:
    settings = {"draw": np.random.default_rng(seed).random, "metrics": Metrics(), **options}
    return Quality(LADDER, Terms(bound, 0.05), file=file, **settings)  # type: ignore[arg-type]


class Run(NamedTuple):
    """What became of a stream."""

    served: list[int]
    """For each request the rung that it got."""
    extra: float
    """The expected rate of divergence beyond that of full compute."""
    most: float
    """The highest that this rate was from a tenth of the stream on."""
    diverged: float
    """The rate at which answers diverged, those at `exact` included."""


def run(
    judge: Quality, rates: Rates, requests: int, *, floor: float = 0.0, scored: float = 1.0,
    controls: float = 0.05, seed: int = 0,
) -> Run:  # fmt: skip
    """`floor`: the rate at which answers diverge that are served in full. `scored`: the share of
    edited answers that are scored; `controls`: controls for each request."""
    random = np.random.default_rng(seed + 1_000_000)
    served, spent, most, bad = [], 0.0, 0.0, 0
    for at, (luck, is_scored, is_control, control) in enumerate(random.random((requests, 4))):
        rung = LADDER.index(judge.rung("n", "t", LADDER[-1]))
        extra = (0.0, *rates(at))[rung]
        served.append(rung)
        spent += extra
        diverged = bool(luck < floor + extra)
        bad += diverged
        if at >= requests // 10:
            most = max(most, spent / (at + 1))
        if rung and is_scored < scored:
            judge.observe(score(LADDER[rung], diverged))
        if is_control < controls:
            judge.observe(score(diverged=bool(control < floor), control=True))
    return Run(served, spent / requests, most, bad / requests)
