"""A recorded stream, served again and again as `Quality` says: does the bound hold?

What is bounded are conditional rates: how likely the next answer is to diverge beyond the rate of
full compute, given all that came before. They are known here, since requests are drawn from those
that were recorded, under whose every rung it is known whether the answer diverges.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvshare_store.observability.metrics import Metrics
from kvshare_store.quality.ladder import Decision, Terms
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.score import Score

RUNGS = ("faithful", "balanced", "aggressive")
LADDER = ("exact", *RUNGS)

AFTER = 300
"""Requests before the mean so far is looked at."""
SCORED = 0.5
"""Share of the edited answers that engines have the time to score."""
CONTROLS = 0.01
"""Share of the answers served in full that they score: the default of `second_look_control`."""
_LATER = 20
"""Answers that are served before the score of one comes."""
_POINTS = 40
"""Of a curve."""
_LAST = 0.1
"""Share of the requests that say which rung it ends at."""


class Outcome(NamedTuple):
    """A recorded request."""

    kind: str
    """Its class within the stream."""
    edited: tuple[bool, ...]
    """Under each of `RUNGS`: whether any row is approximate. Else it is served in full."""
    diverged: tuple[bool, ...]
    """Under each of `RUNGS`: whether its answer diverges. Never where no row is approximate."""
    control: bool
    """Whether the answer of full compute diverges."""

    def extra(self, rung: int) -> int:
        """The divergence that is there because of `LADDER[rung]`."""
        if not rung or not self.edited[rung - 1]:
            return 0
        return self.diverged[rung - 1] - self.control


class Replayed(NamedTuple):
    """What became of a stream. Extra rates are of divergence, for each request."""

    extra: float
    """The mean of the conditional rates."""
    most: float
    """The highest that this mean was after request `AFTER`."""
    classes: tuple[float, ...]
    """The same for each class, of its own requests, if it has more of them."""
    counted: float
    """Answers that did diverge, less those that would have in full compute."""
    edited: float
    """Share of the requests that got approximate rows."""
    last: str
    """The policy that most of the last requests got."""
    curve: tuple[float, ...]
    """The mean so far, at even distances."""


def extra_rates(pool: Sequence[Outcome]) -> dict[str, tuple[float, ...]]:
    """For each class and each of `LADDER` the rate of extra divergence, if requests are drawn from
    this pool. A rung that diverges less than full compute counts as 0."""
    found = {}
    for kind in {one.kind for one in pool}:
        ours = [one for one in pool if one.kind == kind]
        found[kind] = tuple(
            max(0.0, sum(one.extra(rung) for one in ours) / len(ours))
            for rung in range(len(LADDER))
        )
    return found


def halves(pool: Sequence[Outcome]) -> list[list[Outcome]]:
    """The half that diverges least, and the other one."""
    ranked = sorted(pool, key=lambda one: sum(one.extra(rung) for rung in range(len(LADDER))))
    return [ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]]


def replay(
    pools: Sequence[Sequence[Outcome]],
    terms: Terms,
    requests: int,
    seed: int,
    *,
    scored: float = SCORED,
    controls: float = CONTROLS,
) -> Replayed:
    """Serve `requests` drawn from the pools, one after another for as long each."""
    draw = random.Random(seed)
    judged = _Judged(terms, draw)
    rates = [extra_rates(pool) for pool in pools]
    stream, classes = _Mean(), dict[str, _Mean]()
    counted, served, edited, curve = 0, Counter[int](), 0, []
    for at in range(requests):
        part = at * len(pools) // requests
        one = draw.choice(pools[part])
        rung, made = judged.rung(one.kind)
        expected = _expected(made, rates[part][one.kind])
        stream.add(expected)
        classes.setdefault(one.kind, _Mean()).add(expected)
        judged.answered(one, rung, scored, controls)
        counted += one.extra(rung)
        edited += bool(rung) and one.edited[rung - 1]
        if at >= (1 - _LAST) * requests:
            served[rung] += 1
        if (at + 1) * _POINTS // requests > len(curve):
            curve.append(stream.mean)
    return Replayed(
        stream.mean, stream.most, tuple(one.most for one in classes.values() if one.count > AFTER),
        counted / requests, edited / requests, LADDER[served.most_common(1)[0][0]], tuple(curve),
    )  # fmt: skip


def _expected(made: Decision, rates: Sequence[float]) -> float:
    """The rate of extra divergence of a request before its rung is drawn."""
    return (1 - made.share) * rates[made.rung] + made.share * rates[made.tried]


class _Mean:
    """A mean so far, and the highest that it was after some values."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.most = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.mean += (value - self.mean) / self.count
        if self.count > AFTER:
            self.most = max(self.most, self.mean)


class _Drawn(float):
    """A number that `Quality` draws. It sees the share of requests that it is compared with."""

    share = 0.0

    def __lt__(self, share: float) -> bool:
        self.share = share
        return float(self) < share


class _Judged:
    """Requests of one namespace, as `Quality` has them served; scores come later."""

    def __init__(self, terms: Terms, draw: random.Random) -> None:
        self._draw, self._drawn = draw, _Drawn()
        self._quality = Quality(LADDER, terms, Metrics(), draw=self._next, clock=lambda: 0.0)
        self._scores: deque[Score | None] = deque([None] * _LATER)

    def _next(self) -> float:
        self._drawn = _Drawn(self._draw.random())
        return self._drawn

    def rung(self, kind: str) -> tuple[int, Decision]:
        """The rung that a request of a class gets, and what it was drawn from."""
        chosen = LADDER.index(self._quality.rung("stream", kind, LADDER[-1]))
        share = self._drawn.share
        rung = chosen - (float(self._drawn) < share)  # the next one is tried
        return chosen, Decision(rung, rung + (share > 0), share)

    def answered(self, one: Outcome, rung: int, scored: float, controls: float) -> None:
        """The request got this rung. Its answer may be scored, and the score of an earlier one
        comes."""
        in_full = not rung or not one.edited[rung - 1]
        if self._draw.random() < (controls if in_full else scored):
            diverged = one.control if in_full else one.diverged[rung - 1]
            self._scores.append(_score(one.kind, LADDER[rung], diverged, in_full))
        else:
            self._scores.append(None)
        if (score := self._scores.popleft()) is not None:
            self._quality.observe(score)


def _score(kind: str, policy: str, diverged: bool, control: bool) -> Score:
    return Score(
        namespace="stream", traffic=kind, policy="exact" if control else policy,
        regrets=(float(diverged),), greedy=True, control=control,
    )  # fmt: skip


# --- as text --------------------------------------------------------------------------------------


def as_text(streams: Mapping[str, Sequence[Outcome]]) -> str:
    """A line for each request: its kind, then under each rung `-` where it is served in full, or
    whether it diverges, then whether the control does. A line with `#` begins a stream."""
    lines = []
    for name, outcomes in streams.items():
        lines.append(f"# {name}")
        for one in outcomes:
            rungs = "".join(
                str(int(diverged)) if edited else "-"
                for edited, diverged in zip(one.edited, one.diverged, strict=True)
            )
            lines.append(f"{one.kind} {rungs} {int(one.control)}")
    return "\n".join([*lines, ""])


def from_text(text: str) -> dict[str, list[Outcome]]:
    """What `as_text` has written."""
    found: dict[str, list[Outcome]] = {}
    for line in text.splitlines():
        if line.startswith("# "):
            ours = found[line[2:]] = []
            continue
        kind, rungs, control = line.split()
        edited, diverged = (tuple(one in marks for one in rungs) for marks in ("01", "1"))
        ours.append(Outcome(kind, edited, diverged, control == "1"))
    return found
