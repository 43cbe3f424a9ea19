"""How much better a choice is than the windows' frontier: more reuse at equal KL, or less KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.harness.result import Cell
from benchmarks.harness.spread import low_to_high
from benchmarks.quality.agreement_scores import Score

COLUMNS = [
    "set", "what is recomputed", "reused", "KL 16", "± (s.e.)", "x bf16 twice",
    "points more at equal KL", "KL, times, at equal reuse", "95 % of resamples",
]  # fmt: skip
MORE, LESS = 3.0, 0.7
"""What a choice must reach to be adopted: points more reused, or so many times the KL."""
RESAMPLES = 1_000
_LEAST_KL = 1e-9
"""Rounding in float32 makes as much of two equal distributions, or 0."""


class Point(NamedTuple):
    """Where a method stands: all prompts together."""

    reused: float
    kl: float


class Samples(NamedTuple):
    """One method's scores, a number for each prompt, in an order that all methods share."""

    reused: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    kl: npt.NDArray[np.float64]

    def point(self, drawn: npt.NDArray[np.int64] | slice = slice(None)) -> Point:
        """Of all prompts, or of those drawn."""
        reused = self.reused[drawn].sum() / self.tokens[drawn].sum()
        return Point(float(reused), float(self.kl[drawn].mean()))


class Beside(NamedTuple):
    """A point beside the frontier; None where the frontier does not reach so far."""

    more: float | None
    """Percentage points more reused than the frontier at the same KL."""
    times: float | None
    """KL, as a multiple of the frontier's at the same reuse."""


def samples_of(scores: Sequence[Score]) -> dict[str, Samples]:
    """By method, in the order in which methods first appear."""
    kept: dict[str, list[Score]] = {}
    for one in scores:
        kept.setdefault(one.method, []).append(one)
    return {
        name: Samples(
            np.array([one.reused for one in ours]),
            np.array([one.tokens for one in ours]),
            np.array([one.kl for one in ours]),
        )
        for name, ours in kept.items()
    }


def beside(frontier: Sequence[Point], one: Point) -> Beside:
    """Against the frontier's best points, between which the logarithm of the KL is linear."""
    best: list[Point] = []
    for point in sorted(frontier, key=lambda point: (-point.reused, point.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    reused = [point.reused for point in reversed(best)]
    logs = [_log(point) for point in reversed(best)]
    log = _log(one)
    more = times = None
    if logs[0] <= log <= logs[-1]:
        more = 100 * (one.reused - float(np.interp(log, logs, reused)))
    if reused[0] <= one.reused <= reused[-1]:
        times = float(np.exp(log - np.interp(one.reused, reused, logs)))
    return Beside(more, times)


def _log(point: Point) -> float:
    return float(np.log(max(point.kl, _LEAST_KL)))


def adopted(found: Beside) -> bool:
    """Whether that is enough to adopt the choice."""
    more, times = found
    return (more is not None and more >= MORE) or (times is not None and times <= LESS)


def resampled(
    frontier: Sequence[Samples], one: Samples, clusters: Sequence[str], seed: int
) -> list[float]:
    """`times` of `beside` for resamples of whole clusters (the prompts of one family)."""
    draws = np.random.default_rng(seed)
    names = np.array(clusters)
    members = [np.flatnonzero(names == name) for name in dict.fromkeys(clusters)]
    found = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate(
            [members[at] for at in draws.integers(len(members), size=len(members))]
        )
        times = beside([each.point(drawn) for each in frontier], one.point(drawn)).times
        if times is not None:
            found.append(times)
    return found


def rows(
    name: str, scores: Sequence[Score], windows: Sequence[str], floor: float, seed: int
) -> list[list[Cell]]:
    """A line for each method of one set. `windows`: the methods that are the frontier."""
    every = samples_of(scores)
    first = next(iter(every))
    clusters = [family_of(one.pair) for one in scores if one.method == first]
    frontier = [every[window] for window in windows]
    points = [each.point() for each in frontier]
    found: list[list[Cell]] = []
    for method, ours in every.items():
        point = ours.point()
        error = float(np.std(ours.kl) / len(ours.kl) ** 0.5)
        line: list[Cell] = [name, method, point.reused, point.kl, error, point.kl / floor]
        if method in windows:
            found.append([*line, None, None, None])
            continue
        again = resampled(frontier, ours, clusters, seed)
        known = len(again) > RESAMPLES / 2  # most of them within the frontier
        spread = low_to_high(*np.quantile(again, (0.025, 0.975))) if known else None
        found.append([*line, *beside(points, point), spread])
    return found


def family_of(pair: str) -> str:
    """The family of a prompt: its id up to the last dot."""
    return pair.rpartition(".")[0] or pair


def verdicts(found: Sequence[Sequence[Cell]], windows: Sequence[str]) -> list[str]:
    """Choices that could be built and reach what was asked, in words."""
    said = []
    for line in found:
        name, method, reused, _, _, floor, more, times, spread = line
        buildable = method not in windows and not str(method).startswith("oracle")
        if buildable and adopted(Beside(more, times)):  # type: ignore[arg-type]
            near = f"{reused:.1%} reused at {floor:.1f} x floor, times {spread or 'unknown'}"
            said.append(f"{method} ({name}): {near}")
    return said
