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

from kvshare_store.metrics import Metrics
from kvshare_store.quality.evidence import Evidence, Learned
from kvshare_store.quality.ladder import Decision, Terms, decide
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.score import Score

RUNGS = ("faithful", "balanced", "aggressive")
LADDER = ("exact", *RUNGS)
_TOP = len(LADDER) - 1

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
        expected = judged.expected(one.kind, rates[part][one.kind])
        stream.add(expected)
        classes.setdefault(one.kind, _Mean()).add(expected)
        rung = judged.serve(one, scored, controls)
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


class _Judged:
    """Requests of one namespace, as `Quality` has them served; scores come later."""

    def __init__(self, terms: Terms, draw: random.Random) -> None:
        self._terms, self._draw = terms, draw
        self._quality = Quality(LADDER, terms, Metrics(), draw=draw.random, clock=lambda: 0.0)
        self._floor = Evidence()
        self._decisions: dict[str, Decision] = {}
        self._scores: deque[Score | None] = deque([None] * _LATER)

    def expected(self, kind: str, rates: Sequence[float]) -> float:
        """The rate of extra divergence of the next request of a class, before its rung is drawn."""
        made = self._decision(kind)
        return (1 - made.share) * rates[made.rung] + made.share * rates[made.tried]

    def _decision(self, kind: str) -> Decision:
        if kind not in self._decisions:
            for one in self._quality.report():
                rung = LADDER.index(one.rung)
                tried = LADDER.index(one.tried) if one.tried else rung
                self._decisions[one.traffic] = Decision(rung, tried, one.share)
        if kind not in self._decisions:  # no score of it has come
            self._decisions[kind] = decide(Learned(), self._floor, LADDER, self._terms)
        return self._decisions[kind]

    def serve(self, one: Outcome, scored: float, controls: float) -> int:
        """The rung that a request gets. Its answer may be scored, and an earlier score comes."""
        rung = LADDER.index(self._quality.rung("stream", one.kind, LADDER[-1]))
        in_full = not rung or not one.edited[rung - 1]
        if self._draw.random() < (controls if in_full else scored):
            diverged = one.control if in_full else one.diverged[rung - 1]
            self._scores.append(_score(one.kind, LADDER[rung], diverged, in_full))
        else:
            self._scores.append(None)
        score = self._scores.popleft()
        if score is not None:
            self._quality.observe(score)
            if score.control:
                self._floor.add(score)
            self._decisions.clear()
        return rung


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
