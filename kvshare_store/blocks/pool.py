"""The host tier as a buffer pool: slots being filled, pinned blocks, and which blocks may leave."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future

from kvshare_store.blocks.io_loop import IoLoop
from kvshare_store.blocks.leases import LeaseBook
from kvshare_store.blocks.levels import Level, Levels
from kvshare_store.blocks.slot_sizes import SlotSizes
from kvshare_store.blocks.tiers.host.arena import slot_bytes
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.errors import LeaseError, NoSpaceError
from kvshare_store.observability.metrics import NEW, Metrics
from kvshare_store.tensors.frame import Block

_DIRTY_SHARE = 0.75
"""Share of the host budget for rows that no tier below holds yet. The rest serves readers:
otherwise, saving faster than the tiers below can write would leave no room to bring stored rows
back."""
_WIPED_AT_ONCE = 1 << 26
"""Bytes of the arena that are wiped in one go while the lock is held."""
_WRITING_BACK = 64
"""Most blocks that leave the host at the same time; beyond that they are dropped, not copied."""


class Reserved:
    """A slot that is being filled, until it is sealed or cancelled. From then on it names nothing,
    although the same place may be another thread's slot."""

    __slots__ = ("offset",)

    def __init__(self, offset: int) -> None:
        self.offset = offset


class BufferPool:
    """Which blocks are in the host tier. Thread-safe under the lock of the store."""

    def __init__(
        self, host: HostTier, levels: Levels, io: IoLoop, lock: threading.RLock, metrics: Metrics
    ) -> None:
        self.leases = LeaseBook()
        self._host = host
        self._levels = levels
        self._io = io
        self._lock = lock
        self._metrics = metrics
        self._reserved: SlotSizes[Reserved] = SlotSizes()
        """Bytes of rows of each slot that is being filled."""
        self._dirty: SlotSizes[str] = SlotSizes()
        """Bytes of each block that no tier below the host holds yet."""
        self._persisting: frozenset[str] = frozenset()
        """Blocks that are being written to tiers below at this moment, from their place in the
        host."""
        self._leaving: frozenset[str] = frozenset()
        """Blocks that are being deleted from the tiers below at this moment: some still have
        them."""
        self._writing_back = 0
        self._lost: list[str] = []
        """Blocks that are in no tier any more, until `take_lost` reports them."""
        self.wiped = _new_wipe()
        """See `ReusePlan.wiped`."""

    # --- slots --------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> Reserved:
        """An empty slot, after making room if needed; `NoSpaceError` if no block may
        leave. Without a tier below, blocks that leave are lost (`take_lost`).

        No other thread gets or moves the slot until it is sealed or cancelled, so it is filled
        without the lock.
        """
        with self._lock:
            self._check_dirty(nbytes)
            return self.allocate(nbytes)

    def allocate(self, nbytes: int) -> Reserved:
        """As `reserve`, for a copy of a block that a tier below has, so it does not matter how many
        blocks wait to be written. Hold the lock."""
        slot = Reserved(self._allocate(nbytes))
        self._reserved[slot] = nbytes
        return slot

    def check_fits(self, sizes: Iterable[int]) -> None:
        """`NoSpaceError` if blocks of so many bytes can never be in the host together, as those of
        one save must be."""
        needed, there = sum(map(slot_bytes, sizes)), self._host.arena.nbytes
        if needed > there:
            raise NoSpaceError(
                f"the rows take {needed:,} bytes, the host tier has {there:,}: raise host_bytes"
            )

    def _check_dirty(self, nbytes: int) -> None:
        dirty = self._dirty.slots
        taken = dirty + self._reserved.slots
        if dirty and taken + slot_bytes(nbytes) > self._host.arena.nbytes * _DIRTY_SHARE:
            raise NoSpaceError(
                f"{dirty:,} bytes of the host tier wait to be written below; "
                "raise host_bytes, or save more slowly"
            )

    def reserved(self, slot: Reserved) -> memoryview:
        """The bytes of a reserved slot; `LeaseError` if it is no longer reserved."""
        nbytes = self._reserved.get(slot)
        if nbytes is None:
            raise LeaseError("the slot is no longer reserved; save again")
        return self._host.arena.rows(slot.offset, nbytes)

    def seal(self, slot: Reserved, name: str, block: Block) -> None:
        """The slot holds `block` from now on. The caller has computed `name` from its bytes."""
        with self._lock:
            self.place(slot, name, block)
            self._metrics.moved(NEW, self._host.name, len(block.data))
            if self._levels and self.holder(name) is None:
                self._dirty[name] = len(block.data)

    def place(self, slot: Reserved, name: str, block: Block) -> None:
        """As `seal`, for a copy of a block that a tier below has. Hold the lock."""
        if self._reserved.pop(slot, None) is None:
            raise LeaseError("the slot is no longer reserved; save again")
        self._host.seal(slot.offset, name, block, leased=not self._may_go(name))

    def cancel(self, slot: Reserved) -> None:
        """Give a reserved slot back; one that is not reserved any more is ignored."""
        with self._lock:
            if self._reserved.pop(slot, None) is not None:
                self._host.cancel(slot.offset)

    def filling(self) -> set[Reserved]:
        """The slots that are reserved."""
        return set(self._reserved)

    @contextlib.contextmanager
    def persisting(self, names: Collection[str]) -> Iterator[None]:
        """Inside the context the blocks stay where they are. Afterwards those that a tier below has
        may leave."""
        with self._lock:
            self._persisting = frozenset(names)
        try:
            yield
        finally:
            with self._lock:
                self._persisting = frozenset()
                for name in names:
                    if self._levels.holder(name) is not None:
                        self._dirty.pop(name, None)

    # --- what leaves --------------------------------------------------------------------------

    def _allocate(self, nbytes: int) -> int:
        while True:
            try:
                return self._host.reserve(nbytes, self._may_go)
            except NoSpaceError:
                if slot_bytes(nbytes) > self._host.arena.nbytes or not self._evict_one():
                    raise

    def _may_go(self, name: str) -> bool:
        """Whether a block may leave the host or move within it: nothing reads its rows in place,
        and they are not the only copy."""
        return not (self.leases.pinned(name) or name in self._dirty or name in self._persisting)

    def _evict_one(self) -> bool:
        """Let the least valuable block leave the host tier; False if none may."""
        for name in self._host.victims():
            if not self._may_go(name):
                continue
            if self._levels:
                self._write_back(name)
            else:
                self.lose(name)
            self._metrics.evicted(self._host.name)
            return self._host.drop(name)
        return False

    def _write_back(self, name: str) -> None:
        """Copy a block to the level that receives what leaves the host, unless a level has it
        already."""
        holder = self._levels.holder(name)
        first = next(iter(self._levels))
        if holder is first or not first.back or self._writing_back >= _WRITING_BACK:
            return
        block = self._host.peek(name)
        copied = Block(block.namespace, block.layout, bytes(block.data), block.lossy)
        self._writing_back += 1
        self._io.submit(self._levels.write_back(name, copied)).add_done_callback(self._written_back)

    def _written_back(self, _: Future[None]) -> None:
        self._writing_back -= 1

    def lose(self, name: str) -> None:
        """The block is in no tier any more. Hold the lock."""
        self._lost.append(name)

    def take_lost(self) -> list[str]:
        """Blocks that left their last tier since the last call. Hold the lock: the nodes that use
        them must go too."""
        lost, self._lost = self._lost, []
        return lost

    def drop(self, names: Iterable[str]) -> list[str]:
        """Remove blocks that no node uses from the host, except leased ones. Returns those that are
        to be deleted below; until `deleted` nothing counts on finding them there. Keep holding the
        lock under which they were found unused."""
        free = [name for name in names if not self.leases.pinned(name)]
        self._drop(free)
        self._leaving = frozenset(free)
        return free

    def deleted(self) -> None:
        """What `drop` returned last has been deleted below."""
        with self._lock:
            self._leaving = frozenset()

    def holder(self, name: str) -> Level | None:
        """The fastest level below that holds the block, and will."""
        return None if name in self._leaving else self._levels.holder(name)

    def drop_namespace(self, namespace: str) -> list[str]:
        """Remove every block of a namespace from the host; returns them. None of them may be
        leased. Hold the lock."""
        found = self._of_namespace(namespace)
        self._drop(found)
        return found

    def drop_copies(self, namespace: str, keep: Collection[str]) -> list[str] | None:
        """Remove blocks of a namespace from the host, except `keep`, those of its nodes; returns
        them. If one of them is leased, nothing is removed and the result is None. Hold the lock."""
        unused = [name for name in self._of_namespace(namespace) if name not in keep]
        if any(map(self.leases.pinned, unused)):
            return None
        self._drop(unused)
        return unused

    def _of_namespace(self, namespace: str) -> list[str]:
        return [name for name in self._host.names() if self._host.namespace(name) == namespace]

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._host.drop(name)
            self._dirty.pop(name, None)

    def wipe(self) -> None:
        """Fill the free parts of the arena with zeros, and let engines know that copies must go."""
        at: int | None = 0
        while at is not None:
            with self._lock:
                at = self._host.wipe(at, _WIPED_AT_ONCE)
        self.wiped = _new_wipe()  # last: until now a copy could be made


def _new_wipe() -> str:
    return secrets.token_hex(8)
