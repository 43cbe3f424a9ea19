"""Trends: what was known of the policies of classes, moment by moment. In memory only."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from kvshare_store.bounded import Latest
from kvshare_store.quality.confidence import Interval

_SERIES = 512
"""Policies of classes whose trend is kept: those that were scored last."""
_MOMENTS = 48
DAY_S = 86_400.0
"""What a trend covers once there is so much."""
_SLOWEST_S = DAY_S / _MOMENTS


class Moment(NamedTuple):
    """What was known when an answer had been scored."""

    at: float
    """Unix seconds."""
    greedy: int
    """Greedy answers that were scored so far."""
    extra: Interval
    """As `PolicyReport.extra`."""


class _Series:
    """All moments while they are few; later so far apart that those of the last day fit."""

    def __init__(self) -> None:
        self._moments: list[Moment] = []
        self._step = 1.0
        """Seconds between two of them, at least."""

    def add(self, moment: Moment) -> None:
        """The newest always stays."""
        kept = self._moments
        if len(kept) > 1 and 0 <= kept[-1].at - kept[-2].at < self._step:
            kept.pop()
        kept.append(moment)
        while len(kept) > _MOMENTS and self._step < _SLOWEST_S:
            self._step = min(2 * self._step, _SLOWEST_S)
            kept[:] = _apart(kept, self._step)
        del kept[:-_MOMENTS]

    def last(self, since: float) -> tuple[Moment, ...]:
        """Those since then, and the one before them, which was true until the first of them."""
        kept = self._moments
        begin = next((at for at, (_, one) in enumerate(pairwise(kept)) if one.at >= since), -1)
        return tuple(kept[begin:])


def _apart(moments: list[Moment], step: float) -> list[Moment]:
    """The last one, and of the others those that are so far apart."""
    found = moments[:1]
    for moment in moments[1:-1]:
        if moment.at - found[-1].at >= step:
            found.append(moment)
    return [*found, moments[-1]]


class Trends:
    """Those of many classes; the ones that nothing was added to the longest go. Not thread-safe."""

    def __init__(self) -> None:
        self._series: Latest[tuple[str, str, str], _Series] = Latest(_SERIES)
        """By namespace, class and policy."""

    def add(self, namespace: str, traffic: str, policy: str, moment: Moment) -> None:
        """Something new is known."""
        name = namespace, traffic, policy
        series = self._series[name] = self._series.get(name) or _Series()
        series.add(moment)

    def of(self, namespace: str, traffic: str, policy: str, now: float) -> tuple[Moment, ...]:
        """The last day of one policy, the oldest first."""
        series = self._series.get((namespace, traffic, policy))
        return () if series is None else series.last(now - DAY_S)

    def forget(self, namespace: str) -> None:
        """A namespace was purged."""
        for name in [name for name in self._series if name[0] == namespace]:
            del self._series[name]
