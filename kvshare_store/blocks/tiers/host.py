"""The host tier: blocks in the shared-memory arena, read in place by everyone who maps it."""

from __future__ import annotations

from typing import NamedTuple

from kvshare_store.blocks.arena import Allocator, Arena, slot_bytes
from kvshare_store.blocks.eviction import LRU
from kvshare_store.blocks.tiers.base import Tier, TierProperties, TierUse
from kvshare_store.errors import MissingBlockError, NoSpaceError
from kvshare_store.plan import BlockRef
from kvshare_store.tensors.frame import Block
from kvshare_store.tensors.layout import KVLayout


class Slot(NamedTuple):
    """Where a block lies and what it is."""

    offset: int
    nbytes: int
    namespace: str
    layout: KVLayout


class HostTier(Tier):
    """Not thread-safe by itself: `BlockStore` serialises its callers."""

    name = "host"
    properties = TierProperties(persistent=False, shared=True, max_concurrency=1)

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._allocator = Allocator(arena.nbytes)
        self._slots: dict[str, Slot] = {}
        self._order = LRU()

    def reserve(self, nbytes: int) -> int:
        """Offset of a nameless slot for `nbytes` bytes of rows; `NoSpaceError` when none fits."""
        offset = self._allocator.allocate(slot_bytes(nbytes))
        if offset is None:
            raise NoSpaceError(
                f"no {nbytes:,} bytes in a row free of {self.arena.nbytes:,}: raise host_bytes"
            )
        try:
            self.arena.ensure(offset, nbytes)
        except NoSpaceError:
            self._allocator.free(offset)
            raise
        self.arena.set_label(offset, "")
        return offset

    def cancel(self, offset: int) -> None:
        """Give back a slot that was never sealed."""
        self._allocator.free(offset)

    def seal(self, offset: int, name: str, block: Block) -> None:
        """The filled slot becomes block `name`; if that is here already, the slot is given back."""
        if name in self._slots:
            self.cancel(offset)
        else:
            self.arena.set_label(offset, name)
            self._slots[name] = Slot(offset, len(block.data), block.namespace, block.layout)
        self._order.touch(name)

    def ref(self, name: str) -> BlockRef | None:
        """Where clients find the block, or None if it is not here."""
        slot = self._slots.get(name)
        if slot is None:
            return None
        return BlockRef(name, slot.layout.rows_in(slot.nbytes), slot.nbytes, slot.offset)

    def peek(self, name: str) -> Block:
        """The block in place: shared memory, valid until the block is deleted."""
        slot = self._slots.get(name)
        if slot is None:
            raise MissingBlockError(f"block {name[:12]} is not in the host tier")
        return Block(slot.namespace, slot.layout, self.arena.rows(slot.offset, slot.nbytes))

    async def put(self, name: str, block: Block) -> None:
        if name not in self._slots:
            offset = self.reserve(len(block.data))
            self.arena.rows(offset, len(block.data))[:] = block.data
            self.seal(offset, name, block)
        self._order.touch(name)

    async def get(self, name: str) -> Block:
        block = self.peek(name)
        self._order.touch(name)
        return Block(block.namespace, block.layout, bytes(block.data))

    async def delete(self, name: str) -> bool:
        return self.drop(name)

    def drop(self, name: str) -> bool:
        """Remove a block at once; False if it was not here."""
        slot = self._slots.pop(name, None)
        if slot is None:
            return False
        self.arena.set_label(slot.offset, "")
        self._allocator.free(slot.offset)
        self._order.remove(name)
        return True

    def size(self, name: str) -> int | None:
        slot = self._slots.get(name)
        return None if slot is None else slot_bytes(slot.nbytes)

    def names(self) -> list[str]:
        return list(self._order)

    def touch(self, name: str) -> None:
        if name in self._slots:
            self._order.touch(name)

    def use(self) -> TierUse:
        return TierUse(self._allocator.used, self.arena.nbytes, len(self._slots))

    async def close(self) -> None:
        self.arena.close(unlink=True)
