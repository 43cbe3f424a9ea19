"""How often each namespace may ask for something: a bucket of permits each, refilled steadily."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from kvshare_store.bounded import Latest

_KEPT = 4096
"""Namespaces whose buckets are kept. One that is forgotten begins with a full bucket."""


class _Bucket(NamedTuple):
    permits: float
    at: float
    """When so many were left, by the clock."""


class Rates:
    """At most so many a second for each namespace, and as many at once. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: Latest[str, _Bucket] = Latest(_KEPT)

    def __len__(self) -> int:
        """Namespaces that are remembered."""
        return len(self._buckets)

    def allow(self, namespace: str, rate: float) -> bool:
        """Whether the namespace may ask now; if so, that is counted. `rate`: how often in a
        second, which may change at any time; 0 means no limit."""
        if not rate:
            return True
        most, now = max(1.0, rate), self._clock()
        with self._lock:
            bucket = self._buckets.get(namespace, _Bucket(most, now))
            permits = min(most, bucket.permits + (now - bucket.at) * rate)
            allowed = permits >= 1.0
            self._buckets[namespace] = _Bucket(permits - allowed, now)
        return allowed
