"""Counters of the last hour, so that a page can show what changed and not only what adds up."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

STEP_S = 10.0
_SAMPLES = 361
KINDS = ("exact", "continued", "edited", "recomputed")
"""Of the tokens of a plan."""
COUNTERS = {
    "exact": "tokens_reused_exact",
    "continued": "tokens_reused_continued",
    "edited": "tokens_reused_edited",
    "cached": "tokens_engine_cached",
    "recomputed": "tokens_recomputed",
}
"""What became of the tokens of all requests that have ended, by kind; `cached`: the engine's own
cache had them."""
_REUSED = 3
"""The first of these kinds."""


class Sample(NamedTuple):
    """The counters at one moment."""

    at: float
    """Unix seconds."""
    tokens: tuple[int, ...]
    """By kind, as `COUNTERS`."""
    tiers: dict[str, int]
    """Bytes by tier."""
    loaded: int
    stored: int


class Step(NamedTuple):
    """What happened between two samples."""

    start: float
    stop: float
    tokens: tuple[int, ...]
    loaded: int
    stored: int

    @property
    def reused(self) -> int:
        """Tokens whose rows came from the store."""
        return sum(self.tokens[:_REUSED])


class History:
    """A ring of samples, one every `STEP_S` seconds. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)

    def take(self, stats: Mapping[str, Any]) -> None:
        """Remember what `Store.stats` says now."""
        sample = Sample(
            self._clock(),
            tuple(stats[name] for name in COUNTERS.values()),
            {name: use["bytes"] for name, use in stats["tiers"].items()},
            stats["bytes_loaded"],
            stats["bytes_stored"],
        )
        with self._lock:
            self._samples.append(sample)

    def steps(self, most: int = 60) -> list[Step]:
        """What happened, in at most so many steps of equal length, the oldest first."""
        with self._lock:
            samples = list(self._samples)
        stride = max(1, -(-(len(samples) - 1) // most))
        chosen = samples[::-1][::stride][::-1]  # counted from the newest, which always shows
        return [
            Step(
                before.at,
                after.at,
                # a miss whose tokens the engine turns out to have had lowers a counter
                tuple(max(0, b - a) for a, b in zip(before.tokens, after.tokens, strict=True)),
                after.loaded - before.loaded,
                after.stored - before.stored,
            )
            for before, after in itertools.pairwise(chosen)
        ]

    def moved(self) -> dict[str, int]:
        """By how many bytes each tier grew since the first sample."""
        with self._lock:
            if not self._samples:
                return {}
            first, last = self._samples[0], self._samples[-1]
        return {name: size - first.tiers.get(name, 0) for name, size in last.tiers.items()}
