"""What a machine with a host tier and a disk tier would have served of a trace, and from which
tier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from kvshare_store.blocks.eviction import EvictionPolicy, make_policy
from kvshare_store.simulate.traces import Chunk, Request

UNLIMITED = "unlimited"
"""Name of the row for a cache that never evicts: the upper bound of every policy."""


class Served(msgspec.Struct):
    """Counts over the requests so far. All but `requests` are tokens."""

    requests: int = 0
    tokens: int = 0
    host: int = 0
    disk: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of all tokens that were found in either tier."""
        return (self.host + self.disk) / max(1, self.tokens)

    def since(self, earlier: Served) -> Served:
        """What was served after an earlier moment."""
        return Served(
            self.requests - earlier.requests,
            self.tokens - earlier.tokens,
            self.host - earlier.host,
            self.disk - earlier.disk,
        )


class Shelf:
    """Names in one tier, up to a budget in bytes."""

    def __init__(self, policy: EvictionPolicy, budget: float) -> None:
        self._policy = policy
        self._budget = budget
        self._sizes: dict[str, int] = {}
        self._used = 0

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def touch(self, name: str) -> None:
        """Count a use."""
        self._policy.touch(name)

    def add(self, name: str, nbytes: int, cost: float) -> list[tuple[str, int]]:
        """Add a name; returns what was evicted for it. A name larger than the budget is not
        kept."""
        if nbytes > self._budget:
            return []
        gone = []
        if self._used + nbytes > self._budget:
            for victim in self._policy.victims():
                gone.append((victim, self._sizes[victim]))
                self.remove(victim)
                if self._used + nbytes <= self._budget:
                    break
        self._policy.add(name, nbytes, cost)
        self._sizes[name] = nbytes
        self._used += nbytes
        return gone

    def remove(self, name: str) -> None:
        """Take a name out; one that is not here is ignored."""
        if name in self._sizes:
            self._policy.remove(name)
            self._used -= self._sizes.pop(name)


class Machine:
    """Two tiers, each with its own policy. Saved rows go to both, a hit on disk is copied to the
    host, and what the host evicts goes to disk unless it is there."""

    def __init__(self, policy: str, host_bytes: float, disk_bytes: float, row_bytes: int) -> None:
        self._host = Shelf(_policy(policy), host_bytes)
        self._disk = Shelf(_policy(policy), disk_bytes)
        self._row_bytes = row_bytes
        self.policy = policy
        self.served = Served()

    def serve(self, request: Request) -> None:
        """Count what the tiers have of a request, up to the first gap, and keep the whole
        request."""
        self.served.requests += 1
        self.served.tokens += sum(chunk.tokens for chunk in request)
        for chunk in request:
            if chunk.name in self._host:
                self.served.host += chunk.tokens
            elif chunk.name in self._disk:
                self.served.disk += chunk.tokens
            else:
                break
        self._keep(request)

    def _keep(self, request: Sequence[Chunk]) -> None:
        for chunk in reversed(request):  # the rest of a prompt is of no use without its beginning
            nbytes, cost = chunk.tokens * self._row_bytes, float(chunk.tokens)
            if chunk.name in self._disk:
                self._disk.touch(chunk.name)
            else:
                self._disk.add(chunk.name, nbytes, cost)
            if chunk.name in self._host:
                self._host.touch(chunk.name)
            else:
                for name, size in self._host.add(chunk.name, nbytes, cost):
                    if name not in self._disk:
                        self._disk.add(name, size, cost * size / nbytes)


def _policy(name: str) -> EvictionPolicy:
    return make_policy("lru" if name == UNLIMITED else name)


def machines(
    policies: Sequence[str], host_bytes: int, disk_bytes: int, row_bytes: int
) -> list[Machine]:
    """One machine for each policy, and one that keeps everything."""
    limited = [Machine(policy, host_bytes, disk_bytes, row_bytes) for policy in policies]
    return [*limited, Machine(UNLIMITED, math.inf, 0, row_bytes)]
