"""Leases: what keeps a plan's blocks in the arena until the request has loaded them."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from kvshare_store.errors import LeaseError


class Lease(NamedTuple):
    """Blocks pinned for `owner` (a client's name) until `expires` (monotonic seconds)."""

    id: str
    owner: str
    names: tuple[str, ...]
    expires: float


class LeaseBook:
    """Every lease ends: by `end`, by `end_owner`, or by `expire`. Not thread-safe by itself."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._pins: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._leases

    def grant(self, names: list[str], owner: str, seconds: float) -> Lease:
        """Pin `names`, whether they are resident yet or not."""
        lease = Lease(uuid.uuid4().hex, owner, tuple(names), self._clock() + seconds)
        self._leases[lease.id] = lease
        self._pins.update(lease.names)
        return lease

    def end(self, lease_id: str) -> Lease:
        """Unpin; `LeaseError` if the lease is unknown or has ended already."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            raise LeaseError(f"lease {lease_id[:12]} is unknown or has ended")
        self._pins.subtract(lease.names)
        for name in lease.names:
            if self._pins[name] <= 0:
                del self._pins[name]
        return lease

    def of_owner(self, owner: str) -> list[Lease]:
        """Leases of one client."""
        return [lease for lease in self._leases.values() if lease.owner == owner]

    def expired(self) -> list[Lease]:
        """Leases whose time is over; end each of them."""
        now = self._clock()
        return [lease for lease in self._leases.values() if lease.expires <= now]

    def pinned(self, name: str) -> bool:
        """Whether any lease holds the block."""
        return name in self._pins
