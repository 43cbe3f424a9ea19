"""Content-addressed blocks through the tiers: reserve, seal, lease, persist, evict.

All bookkeeping happens under one lock that the Store shares; whatever waits for a medium happens
outside it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any

from kvshare_store.blocks.arena import slot_bytes
from kvshare_store.blocks.io_loop import IoLoop
from kvshare_store.blocks.leases import Lease, LeaseBook
from kvshare_store.blocks.tiers.base import Tier, TierUse
from kvshare_store.blocks.tiers.host import HostTier
from kvshare_store.errors import KVShareError, LeaseError, NoSpaceError
from kvshare_store.metrics import Metrics
from kvshare_store.plan import BlockRef
from kvshare_store.tensors.frame import Block


class BlockStore:
    """Names to rows. `on_lost` is told which blocks are about to leave the last tier; blocks that
    are `in_use` are not deleted."""

    def __init__(
        self,
        host: HostTier,
        disk: Tier | None,
        io: IoLoop,
        lock: threading.RLock,
        metrics: Metrics,
    ) -> None:
        self.host = host
        self.disk = disk
        self.leases = LeaseBook()
        self.on_lost: Callable[[list[str]], None] = lambda names: None
        self.in_use: Callable[[str], bool] = lambda name: False
        self._io = io
        self._lock = lock
        self._metrics = metrics
        self._reserved: dict[int, int] = {}
        """Bytes of each slot that is being filled, by its offset."""
        self._promotions: dict[str, Future[None]] = {}

    # --- writing ------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> int:
        """Offset of an empty slot, making room if needed; `NoSpaceError` if nothing can go.

        Nobody else gets the slot until it is sealed or cancelled: whoever fills it may be slow, and
        what it still writes must not land in another block.
        """
        with self._lock:
            offset = self._allocate(nbytes)
            self._reserved[offset] = nbytes
            return offset

    def reserved(self, offset: int) -> memoryview:
        """The bytes of a reserved slot; `LeaseError` if the reservation has ended."""
        nbytes = self._reserved.get(offset)
        if nbytes is None:
            raise LeaseError("the slot is no longer reserved; save again")
        return self.host.arena.rows(offset, nbytes)

    def holds(self, slots: Iterable[Any]) -> bool:
        """Whether every slot (anything with an `offset`) is still reserved."""
        return all(slot.offset in self._reserved for slot in slots)

    def seal(self, offset: int, name: str, block: Block) -> None:
        """The slot holds `block` from now on. The caller has computed `name` from its bytes."""
        with self._lock:
            if self._reserved.pop(offset, None) is None:
                raise LeaseError("the slot is no longer reserved; save again")
            self.host.seal(offset, name, block)

    def cancel(self, offset: int) -> None:
        """Give a reserved slot back; one that is not reserved is ignored."""
        with self._lock:
            if self._reserved.pop(offset, None) is not None:
                self.host.cancel(offset)

    def persist(self, names: list[str]) -> None:
        """Return once every block is durable. Raises the first error; the others may be durable."""
        if self.disk is not None:
            self._io.run(self._persist(self.disk, names))

    async def _persist(self, disk: Tier, names: list[str]) -> None:
        slots = asyncio.Semaphore(disk.properties.max_concurrency)

        async def write(name: str) -> None:
            async with slots:
                if disk.size(name) is None:
                    await disk.put(name, self.host.peek(name))

        # all of them end before anybody hears of an error: a write reads the rows in place
        ended = await asyncio.gather(*(write(name) for name in names), return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error

    # --- reading ------------------------------------------------------------------------------

    def tier_of(self, name: str) -> str | None:
        """The fastest tier that holds the block, or None."""
        if self.host.size(name) is not None:
            return self.host.name
        return self.disk.name if self.disk is not None and self.disk.size(name) else None

    def lease(
        self, names: list[str], owner: str, seconds: float, timeout: float
    ) -> tuple[Lease, dict[str, BlockRef]]:
        """Pin blocks and bring them into the arena; wait for that at most `timeout` seconds.

        Returns the lease and where each block lies that is resident by then; promotions that are
        late go on for the next request. Do not hold the lock.
        """
        with self._lock:
            lease = self.leases.grant(names, owner, seconds)
            absent = [name for name in names if self.host.size(name) is None]
            promotions = [self._promote(name) for name in absent] if self.disk else []
        if promotions:
            wait(promotions, timeout)
        with self._lock:
            for name in names:
                self.host.touch(name)
                if self.disk is not None:
                    self.disk.touch(name)
            return lease, {name: ref for name in names if (ref := self.host.ref(name)) is not None}

    def _promote(self, name: str) -> Future[None]:
        """Bring one block from disk to host; requests for the same block share one read."""
        running = self._promotions.get(name)
        if running is None:
            running = self._promotions[name] = self._io.submit(self._fetch(name))
        return running

    async def _fetch(self, name: str) -> None:
        try:
            block = await self.disk.get(name)  # type: ignore[union-attr]
            with self._lock:
                wanted = self.leases.pinned(name) or self.in_use(name)
                if wanted and self.host.size(name) is None:
                    offset = self._allocate(len(block.data))
                    self.host.arena.rows(offset, len(block.data))[:] = block.data
                    self.host.seal(offset, name, block)
        except KVShareError as error:
            self._metrics.error(error.kind)
            if self.disk is not None and self.disk.size(name) is None:
                self.on_lost([name])
        finally:
            with self._lock:
                self._promotions.pop(name, None)

    def end_lease(self, lease_id: str) -> Lease:
        """Unpin a plan's blocks; `LeaseError` if the lease has ended already."""
        with self._lock:
            return self.leases.end(lease_id)

    def reap(self, dead_owners: set[str]) -> list[Lease]:
        """End leases that have expired or whose client is gone; returns them."""
        with self._lock:
            ended = self.leases.expired()
            ended += [
                lease
                for owner in dead_owners
                for lease in self.leases.of_owner(owner)
                if lease not in ended
            ]
            for lease in ended:
                self.leases.end(lease.id)
            return ended

    # --- making room --------------------------------------------------------------------------

    def _allocate(self, nbytes: int) -> int:
        while True:
            try:
                return self.host.reserve(nbytes)
            except NoSpaceError:
                if slot_bytes(nbytes) > self.host.arena.nbytes or not self._evict_one():
                    raise

    def _evict_one(self) -> bool:
        """Let the least recently used block leave the host tier; False if none may."""
        for name in self.host.names():
            if self.leases.pinned(name):
                continue
            if self.disk is not None:
                if self.disk.size(name) is None:
                    continue  # not durable yet: these are the only bytes
                return self.host.drop(name)
            self.on_lost([name])
            if self.host.size(name) is not None:
                self.host.drop(name)
            return True
        return False

    def delete(self, names: list[str]) -> None:
        """Remove blocks that nobody pins or uses from every tier and wait for it.

        Whoever pointed at them must be gone before; a block that came into use again since then
        stays. Only one thread may delete and persist, so
        that a block which comes back at that moment is not deleted with its predecessor.
        """
        with self._lock:
            free = [n for n in names if not (self.leases.pinned(n) or self.in_use(n))]
            for name in free:
                self.host.drop(name)
        if self.disk is not None and free:
            self._io.run(self._delete_from(self.disk, free))

    async def _delete_from(self, disk: Tier, names: list[str]) -> None:
        for name in names:
            try:
                await disk.delete(name)
            except KVShareError as error:
                self._metrics.error(error.kind)

    def names(self) -> set[str]:
        """Every block in any tier."""
        return set(self.host.names()) | set(self.disk.names() if self.disk is not None else ())

    def use(self) -> dict[str, TierUse]:
        """Bytes, budget and blocks of each tier."""
        tiers: list[Tier] = [self.host] if self.disk is None else [self.host, self.disk]
        return {tier.name: tier.use() for tier in tiers}

    def close(self) -> None:
        """Close every tier."""
        if self.disk is not None:
            self._io.run(self.disk.close())
        self._io.run(self.host.close())
