"""What happened step by step, and what was known at which moment, as shapes that a template draws
as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvshare_store.http.history import COUNTERS, Step
from kvshare_store.quality.trend import DAY_S

WIDTH, HEIGHT = 600, 160
_GAP = 0.15
"""Of a bar's width, between two of them."""


class Bar(NamedTuple):
    """A rectangle; lengths in units of the drawing."""

    kind: str
    x: float
    y: float
    width: float
    height: float


class Chart(NamedTuple):
    """All that is drawn, and what stands beside it in words."""

    bars: tuple[Bar, ...]
    highest: int
    """Tokens at the top edge."""
    start: float
    """Unix seconds at the left edge."""
    stop: float
    reused: int
    tokens: int
    kinds: dict[str, int]
    """These tokens by kind."""
    width: int = WIDTH
    height: int = HEIGHT


def chart(steps: Sequence[Step]) -> Chart | None:
    """Bars of tokens by kind, the first kind at the bottom; None before anything could change."""
    if not steps:
        return None
    highest = max(max(sum(step.tokens) for step in steps), 1)
    wide = WIDTH / len(steps)
    bars: list[Bar] = []
    for at, step in enumerate(steps):
        top = float(HEIGHT)
        for kind, count in zip(COUNTERS, step.tokens, strict=True):
            if count:
                height = HEIGHT * count / highest
                top -= height
                x, width = at * wide + wide * _GAP / 2, wide * (1 - _GAP)
                bars.append(Bar(kind, *(round(one, 2) for one in (x, top, width, height))))
    sums = map(sum, zip(*(step.tokens for step in steps), strict=True))
    kinds = dict(zip(COUNTERS, sums, strict=True))
    return Chart(
        tuple(bars),
        highest,
        steps[0].start,
        steps[-1].stop,
        sum(step.reused for step in steps),
        sum(kinds.values()),
        kinds,
    )


class Band(NamedTuple):
    """A mean between its limits, moment by moment. Points are `x,y` in units of the drawing."""

    area: str
    """Corners of what is between the limits."""
    line: str
    """Points of the mean."""
    bound: float | None
    """How far down a bound is drawn; None: there is none, or it is above the top."""
    top: float
    """The rate at the top edge."""
    start: float
    """Unix seconds at the left edge."""
    stop: float


def band(trend: Sequence[Any], bound: float, now: float, width: int, height: int) -> Band | None:
    """A rate and its limits, as in `Moment`, each true until the next one; None without any.

    At first the limits are far apart. So that the rest can be seen, the top edge is where those of
    the last moment fit; what is above is cut off, and so is what is below 0. `bound`: 0 for none.
    """
    if not trend:
        return None
    start, stop = max(trend[0][0], now - DAY_S), max(now, trend[-1][0])
    _, _, (mean, _, high) = trend[-1]
    top = min(1.0, max(1.3 * high, 2.0 * mean, 1.5 * bound, 0.01))
    across = width / max(stop - start, 1.0)

    def stepped(which: int) -> list[str]:
        points = []
        for at, (moment, _, rates) in enumerate(trend):
            y = height * (1 - min(max(rates[which] / top, 0.0), 1.0))
            until = trend[at + 1][0] if at + 1 < len(trend) else start + width / across
            for when in (max(moment, start), until):
                points.append(f"{(when - start) * across:.1f},{y:.1f}")
        return points

    area = " ".join([*stepped(2), *reversed(stepped(1))])
    drawn = height * (1 - bound / top) if 0 < bound <= top else None
    return Band(area, " ".join(stepped(0)), drawn, top, start, stop)
