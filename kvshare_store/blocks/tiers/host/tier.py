"""The host tier: blocks in the arena, read in place by every client that maps it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from kvshare_store.blocks.eviction import CostAware, EvictionPolicy
from kvshare_store.blocks.tiers.allocator import Allocator
from kvshare_store.blocks.tiers.base import Tier, TierProperties, TierUse
from kvshare_store.blocks.tiers.host.arena import Arena, slot_bytes
from kvshare_store.errors import MissingBlockError, NoSpaceError
from kvshare_store.errors.wording import short
from kvshare_store.plan import BlockRef
from kvshare_store.tensors.frame import Block
from kvshare_store.tensors.layout import KVLayout

_MOST_USERS = 4
"""A cap on the users that count, so that a block that many nodes use and nobody asks for can be
evicted in the end."""


class Slot(NamedTuple):
    """Where a block lies and what it is."""

    offset: int
    nbytes: int
    namespace: str
    layout: KVLayout
    lossy: bool
    seq: int


class HostTier(Tier):
    """Not thread-safe by itself: `BlockStore` serialises its callers."""

    name = "host"
    properties = TierProperties(max_concurrency=1)

    def __init__(self, arena: Arena, policy: EvictionPolicy | None = None) -> None:
        self.arena = arena
        self._allocator = Allocator(arena.nbytes)
        self._slots: dict[str, Slot] = {}
        self._at: dict[int, str] = {}
        """The block in each slot that holds one, by offset."""
        self._policy = CostAware() if policy is None else policy

    def reserve(self, nbytes: int, may_go: Callable[[str], bool] | None = None) -> int:
        """Offset of a nameless slot for `nbytes` bytes of rows; `NoSpaceError` when none fits.

        Where the free bytes are scattered, blocks that `may_go` are moved together: nobody reads or
        writes those, so they may as well be elsewhere.
        """
        size = slot_bytes(nbytes)
        offset = self._allocator.allocate(size)
        if offset is None and may_go is not None and self._gather(size, may_go):
            offset = self._allocator.allocate(size)
        if offset is None:
            raise NoSpaceError(
                f"no {nbytes:,} bytes in a row free of {self.arena.nbytes:,}: raise host_bytes"
            )
        try:
            self.arena.ensure(offset, nbytes)
        except NoSpaceError:
            self._allocator.free(offset)
            raise
        self.arena.clear_label(offset)
        return offset

    def _gather(self, size: int, may_go: Callable[[str], bool]) -> bool:
        """Slide blocks together until `size` bytes are free in a row; False if that cannot be."""

        def movable(offset: int) -> bool:
            name = self._at.get(offset)
            return name is not None and may_go(name)

        moves = self._allocator.moves(size, movable)
        for move in moves:
            name = self._at[move.source]
            self.arena.move(move.source, move.target, self._slots[name].nbytes)
            self._allocator.moved(move)
            del self._at[move.source]
            self._at[move.target] = name
            self._slots[name] = self._slots[name]._replace(offset=move.target)
        return bool(moves)

    def cancel(self, offset: int) -> None:
        """Give back a slot that was never sealed. It may still hold bytes of a block that was
        purged meanwhile, and that nobody has overwritten."""
        self.arena.wipe(offset, self._allocator.size_of(offset))
        self._allocator.free(offset)

    def seal(self, offset: int, name: str, block: Block, *, leased: bool = False) -> None:
        """A filled slot becomes block `name`. If the block is here already, the slot is given back;
        but exact rows replace lossy ones that are not `leased`."""
        known = self._slots.get(name)
        if known is not None and known.lossy and not block.lossy and not leased:
            self._let_go(known)
            known = None
        if known is not None:
            self.cancel(offset)
        else:
            nbytes, lossy = len(block.data), block.lossy
            seq = self.arena.set_label(offset, name, lossy=lossy)
            self._slots[name] = Slot(offset, nbytes, block.namespace, block.layout, lossy, seq)
            self._at[offset] = name
        if name in self._policy:
            self._policy.touch(name)
        else:
            self._policy.add(name, len(block.data), block.rows)

    def wipe(self, at: int, nbytes: int) -> int | None:
        """Zero the free bytes, and those that slots do not use, in `nbytes` bytes from offset `at`
        on. Returns where to continue, None at the end."""
        stop = at + nbytes
        for start, size in self._allocator.free_ranges():
            begin, end = max(start, at), min(start + size, stop)
            if begin < end:
                self.arena.wipe(begin, end - begin)
        for slot in self._slots.values():
            if at <= slot.offset < stop:
                self.arena.wipe_edges(slot.offset, slot.nbytes)
        return stop if stop < self.arena.nbytes else None

    def weigh(self, name: str, users: int) -> None:
        """So many nodes use the block: losing it would cost its rows once for each of them."""
        slot = self._slots.get(name)
        if slot is not None:
            rows = slot.layout.rows_in(slot.nbytes)
            self._policy.add(name, slot.nbytes, rows * max(1, min(users, _MOST_USERS)))

    def lossy(self, name: str) -> bool:
        """Whether the block is here with rows that a lossy codec has changed."""
        slot = self._slots.get(name)
        return slot is not None and slot.lossy

    def namespace(self, name: str) -> str | None:
        """The namespace of a block, or None if it is not here."""
        slot = self._slots.get(name)
        return None if slot is None else slot.namespace

    def ref(self, name: str) -> BlockRef | None:
        """Where clients find the block, or None if it is not here."""
        slot = self._slots.get(name)
        if slot is None:
            return None
        rows = slot.layout.rows_in(slot.nbytes)
        return BlockRef(name, rows, slot.nbytes, slot.offset, slot.seq, slot.lossy)

    def used(self, names: Iterable[str]) -> dict[str, BlockRef]:
        """As `ref`, of those of the blocks that are here; counts a use of each."""
        slots, found, touch = self._slots, dict[str, BlockRef](), self._policy.touch
        layout, row_bytes = None, 0
        for name in names:
            slot = slots.get(name)
            if slot is None:
                continue
            if slot.layout is not layout:  # blocks of one plan share theirs
                layout, row_bytes = slot.layout, slot.layout.row_bytes
            rows = slot.nbytes // row_bytes
            found[name] = BlockRef(name, rows, slot.nbytes, slot.offset, slot.seq, slot.lossy)
            touch(name)
        return found

    def peek(self, name: str) -> Block:
        """The block in place: shared memory, valid until the block is deleted."""
        slot = self._slots.get(name)
        if slot is None:
            raise MissingBlockError(f"block {short(name)} is not in the host tier")
        rows = self.arena.rows(slot.offset, slot.nbytes)
        return Block(slot.namespace, slot.layout, rows, slot.lossy)

    async def put(self, name: str, block: Block) -> None:
        if name in self._slots and not (self.lossy(name) and not block.lossy):
            self._policy.touch(name)
            return
        offset = self.reserve(len(block.data))
        self.arena.rows(offset, len(block.data))[:] = block.data
        self.seal(offset, name, block)

    async def get(self, name: str) -> Block:
        block = self.peek(name)
        self._policy.touch(name)
        return Block(block.namespace, block.layout, bytes(block.data), block.lossy)

    async def delete(self, name: str) -> bool:
        return self.drop(name)

    def drop(self, name: str) -> bool:
        """Remove a block at once; False if it was not here."""
        slot = self._slots.pop(name, None)
        if slot is None:
            return False
        self._let_go(slot)
        self._policy.remove(name)
        return True

    def _let_go(self, slot: Slot) -> None:
        self.arena.clear_label(slot.offset)
        self._allocator.free(slot.offset)
        del self._at[slot.offset]

    def has(self, name: str) -> bool:
        return name in self._slots

    def absent(self, names: Iterable[str]) -> list[str]:
        """Those of the blocks that are not here."""
        return [name for name in names if name not in self._slots]

    def size(self, name: str) -> int | None:
        slot = self._slots.get(name)
        return None if slot is None else slot_bytes(slot.nbytes)

    def names(self) -> list[str]:
        return list(self._policy)

    def victims(self) -> Iterator[str]:
        """The least valuable block first, for whoever makes room; they may be dropped meanwhile."""
        return self._policy.victims()

    def touch(self, name: str) -> None:
        if name in self._slots:
            self._policy.touch(name)

    def use(self) -> TierUse:
        return TierUse(self._allocator.used, self.arena.nbytes, len(self._slots))

    async def close(self) -> None:
        self.arena.close()
