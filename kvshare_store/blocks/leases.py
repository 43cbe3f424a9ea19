"""Leases: what keeps a plan's blocks in the arena until the request has loaded them."""

from __future__ import annotations

import heapq
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from kvshare_store.errors import LeaseError
from kvshare_store.errors.wording import short


class Lease(NamedTuple):
    """Blocks pinned for `owner` (a client's name) until `expires` (monotonic seconds)."""

    id: str
    owner: str
    names: tuple[str, ...]
    expires: float


_SPARE = 64
"""Entries of ended leases that the heap may keep besides as many as there are leases."""


class LeaseBook:
    """Every lease ends: by `end`, with its owner, or when it expires. Not thread-safe by itself."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._leases: dict[str, Lease] = {}
        self._owned: dict[str, dict[str, Lease]] = {}
        self._ends: list[tuple[float, str]] = []
        """A heap of expiry times; some of its leases have ended already."""
        self._pins: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._leases

    def grant(self, names: list[str], owner: str, seconds: float) -> Lease:
        """Pin `names`, whether they are resident yet or not."""
        lease = Lease(secrets.token_hex(16), owner, tuple(names), self.clock() + seconds)
        self._leases[lease.id] = lease
        self._owned.setdefault(owner, {})[lease.id] = lease
        heapq.heappush(self._ends, (lease.expires, lease.id))
        if len(self._ends) > 2 * len(self._leases) + _SPARE:
            self._ends = sorted((one.expires, one.id) for one in self._leases.values())
        for name in lease.names:
            self._pins[name] = self._pins.get(name, 0) + 1
        return lease

    def end(self, lease_id: str) -> Lease:
        """Unpin; `LeaseError` if the lease is unknown or has ended already."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            raise LeaseError(f"lease {short(lease_id)} is unknown or has ended")
        owned = self._owned[lease.owner]
        del owned[lease_id]
        if not owned:
            del self._owned[lease.owner]
        for name in lease.names:
            left = self._pins[name] - 1
            if left:
                self._pins[name] = left
            else:
                del self._pins[name]
        return lease

    def of_owner(self, owner: str) -> list[Lease]:
        """Leases of one client."""
        return list(self._owned.get(owner, {}).values())

    def count(self, owner: str) -> int:
        """How many leases a client has."""
        return len(self._owned.get(owner, ()))

    def expired(self) -> list[Lease]:
        """Leases that have expired, the oldest first. The caller must end each of them."""
        now, found = self.clock(), list[Lease]()
        while self._ends and self._ends[0][0] <= now:
            lease = self._leases.get(heapq.heappop(self._ends)[1])
            if lease is not None:
                found.append(lease)
        return found

    def pinned(self, name: str) -> bool:
        """Whether any lease holds the block."""
        return name in self._pins
