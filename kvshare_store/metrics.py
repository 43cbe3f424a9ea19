"""What `Store.stats()` counts. Thread-safe; no value is ever derived from another's guess."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from kvshare_store.threads import Health

_WINDOW = 4096
_LABELS = 200


class Metrics:
    """Counters, labelled counters and durations of one store."""

    def __init__(self) -> None:
        self.health = Health()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._declined: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._seconds: dict[str, deque[float]] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`."""
        with self._lock:
            self._counts[name] += amount

    def decline(self, reason: str) -> None:
        """Count a lookup that ended without reuse."""
        with self._lock:
            self._declined[_known(self._declined, reason)] += 1

    def error(self, kind: str) -> None:
        """Count a failure by its kind."""
        with self._lock:
            self._errors[_known(self._errors, str(kind))] += 1

    def observe(self, name: str, seconds: float) -> None:
        """Add one duration."""
        with self._lock:
            self._seconds.setdefault(name, deque(maxlen=_WINDOW)).append(seconds)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Observe how long the block takes."""
        start = perf_counter()
        try:
            yield
        finally:
            self.observe(name, perf_counter() - start)

    def count(self, name: str) -> int:
        """Value of one counter."""
        with self._lock:
            return self._counts[name]

    @property
    def declined(self) -> dict[str, int]:
        """Declined lookups by reason."""
        with self._lock:
            return dict(self._declined)

    @property
    def errors(self) -> dict[str, int]:
        """Failures by kind."""
        with self._lock:
            return dict(self._errors)

    def quantiles(self, name: str) -> dict[str, float]:
        """p50 and p99 of the last durations, seconds; zeros before the first."""
        with self._lock:
            values = sorted(self._seconds.get(name, ()))
        if not values:
            return {"p50": 0.0, "p99": 0.0}
        last = len(values) - 1
        return {"p50": values[round(0.5 * last)], "p99": values[round(0.99 * last)]}


def _known(counter: Counter[str], label: str) -> str:
    """The label itself, or `other` once clients have named too many."""
    return label if label in counter or len(counter) < _LABELS else "other"
