"""Stacked bars of what happened step by step, as shapes that a template draws as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvshare_store.http.history import COUNTERS, Step

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
