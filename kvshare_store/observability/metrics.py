"""What `Store.stats()` counts. Thread-safe; no value is ever derived from another's guess."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from time import perf_counter
from typing import Any, NamedTuple

from kvshare_store.errors.wording import short
from kvshare_store.observability.threads import Health

_WINDOW = 4096
_LABELS = 200
_NAMESPACES = 100
"""Namespaces that are counted by themselves, so that tenants cannot fill a monitoring system."""
OTHERS = "other"
"""All others, in namespaces and in labels."""
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of histograms, seconds."""
NEW = "new"
"""Where blocks come from that no tier had: saved, merged or imported."""


class Durations:
    """The last durations, for quantiles, and all of them in a histogram."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self._last.append(seconds)
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    def copy(self) -> Durations:
        """As they are now."""
        copied = Durations()
        copied._last, copied._counts, copied._sum = self._last.copy(), [*self._counts], self._sum
        return copied

    def report(self) -> dict[str, Any]:
        """`p50` and `p99` of the last, zeros before the first; `sum` of all; `buckets`: how many
        were at most as long as each of `BUCKETS`, then all."""
        values = sorted(self._last) or [0.0]
        last = len(values) - 1
        return {
            "p50": values[round(0.5 * last)],
            "p99": values[round(0.99 * last)],
            "sum": self._sum,
            "buckets": list(accumulate(self._counts)),
        }


class Move(NamedTuple):
    """Copies of blocks from one tier to another."""

    source: str
    target: str


class Usage(NamedTuple):
    """What one namespace has asked for: requests by outcome, tokens by kind."""

    requests: Counter[str]
    tokens: Counter[str]


class Metrics:
    """Counters, labelled counters and durations of one store."""

    def __init__(self) -> None:
        self.health = Health()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._declined: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._blocks: Counter[Move] = Counter()
        self._bytes: Counter[Move] = Counter()
        self._evicted: Counter[str] = Counter()
        self._usage: dict[str, Usage] = {}
        self._seconds: dict[str, Durations] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`."""
        with self._lock:
            self._counts[name] += amount

    def add_all(self, amounts: Mapping[str, int]) -> None:
        """Count several at one moment: whoever asks for `counts` sees all of them or none."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def decline(self, reason: str) -> None:
        """Count a lookup that ended without reuse."""
        with self._lock:
            self._declined[_known(self._declined, reason)] += 1

    def error(self, kind: str) -> None:
        """Count a failure by its kind."""
        with self._lock:
            self._errors[_known(self._errors, str(kind))] += 1

    def moved(self, source: str, target: str, nbytes: int) -> None:
        """Count a block that was copied from one tier to another."""
        with self._lock:
            self._blocks[Move(source, target)] += 1
            self._bytes[Move(source, target)] += nbytes

    def evicted(self, tier: str) -> None:
        """Count a block that left a tier to make room."""
        with self._lock:
            self._evicted[tier] += 1

    def used(self, digest: str, outcome: str, tokens: Mapping[str, int], *, known: bool) -> None:
        """Count a request of a namespace, and its tokens by kind. `known`: something was saved
        there; whoever may only look must not take labels with names that mean nothing."""
        with self._lock:
            usage = self._usage[self._label(digest, known)]
            usage.requests[outcome] += 1
            for kind, amount in tokens.items():
                usage.tokens[kind] += amount

    def labels(self, digests: Iterable[str]) -> list[str]:
        """How known namespaces are called in labels: so, or all `other`s together, for good."""
        with self._lock:
            return [self._label(digest) for digest in digests]

    def _label(self, digest: str, known: bool = True) -> str:
        name, own = short(digest), len(self._usage) - (OTHERS in self._usage)
        if name not in self._usage and (not known or own >= _NAMESPACES):
            name = OTHERS
        self._usage.setdefault(name, Usage(Counter(), Counter()))
        return name

    def forget(self, digest: str) -> None:
        """A namespace was purged: nothing is counted for it any more."""
        with self._lock:
            self._usage.pop(short(digest), None)

    def observe(self, name: str, seconds: float) -> None:
        """Add one duration."""
        with self._lock:
            self._seconds.setdefault(name, Durations()).add(seconds)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Observe how long the block takes."""
        start = perf_counter()
        try:
            yield
        finally:
            self.observe(name, perf_counter() - start)

    def counts(self, names: Sequence[str]) -> dict[str, int]:
        """Values of counters at one moment."""
        with self._lock:
            return {name: self._counts[name] for name in names}

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

    @property
    def evictions(self) -> dict[str, int]:
        """Blocks that left a tier to make room, by tier."""
        with self._lock:
            return dict(self._evicted)

    def moves(self) -> list[dict[str, Any]]:
        """Blocks and bytes that were copied between tiers."""
        with self._lock:
            return [
                {**move._asdict(), "blocks": blocks, "bytes": self._bytes[move]}
                for move, blocks in self._blocks.items()
            ]

    def usage(self) -> dict[str, dict[str, Any]]:
        """What each namespace has asked for, by its label."""
        with self._lock:
            return {
                name: {"requests": dict(usage.requests), "tokens": dict(usage.tokens)}
                for name, usage in self._usage.items()
            }

    def durations(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The reports on durations, seconds."""
        with self._lock:  # what takes time is done without it
            copies = {name: self._seconds.get(name, Durations()).copy() for name in names}
        return {name: durations.report() for name, durations in copies.items()}


def _known(counter: Counter[str], label: str) -> str:
    """The label itself, or `other` once clients have named too many."""
    return label if label in counter or len(counter) < _LABELS else OTHERS
