"""The device tier: rows in the memory of an engine worker's own device, a GPU or the CPU.

It holds the blocks that are reused most, so that a hit is a copy from device to device. It belongs
to the engine's process; the daemon never loads torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvshare_store.blocks.eviction import LRU
from kvshare_store.blocks.tiers.allocator import Allocator
from kvshare_store.blocks.tiers.base import Tier, TierProperties, TierUse
from kvshare_store.errors import MissingBlockError, NoSpaceError
from kvshare_store.errors.wording import short
from kvshare_store.tensors.dtypes import DTYPES
from kvshare_store.tensors.frame import Block
from kvshare_store.tensors.layout import KVLayout

_ALIGN = 64


class _Place(NamedTuple):
    """Where a block lies and what it is."""

    offset: int
    nbytes: int
    namespace: str
    layout: KVLayout
    lossy: bool


class DeviceTier(Tier):
    """Canonical rows in one arena of `budget` bytes on `device`. Not thread-safe."""

    name = "device"
    properties = TierProperties(max_concurrency=1)

    def __init__(self, budget: int, device: torch.device | str = "cpu") -> None:
        self._arena = torch.empty(budget, dtype=torch.uint8, device=device)
        self._allocator = Allocator(budget)
        self._blocks: dict[str, _Place] = {}
        self._order = LRU()
        self._written = 0
        """Bytes of the arena, from its beginning, that may hold rows of blocks, here or gone."""

    def rows(self, name: str) -> torch.Tensor | None:
        """The block's rows in place, `[layers, 2, rows, kv_heads, head_dim]` of the layout's dtype
        on this tier's device, valid until the next `put` or `delete`; None if it is not here."""
        found = self._blocks.get(name)
        if found is None:
            return None
        self._order.touch(name)
        raw = self._arena[found.offset : found.offset + found.nbytes]
        layout = found.layout
        return raw.view(DTYPES[layout.dtype]).view(layout.shape(layout.rows_in(found.nbytes)))

    def serves(self, name: str, *, lossy: bool) -> bool:
        """Whether the block is here, with rows no further from the computed ones than `lossy`
        allows."""
        found = self._blocks.get(name)
        return found is not None and found.lossy <= lossy

    def keep(self, name: str, block: Block) -> None:
        """Copy a block to the device. Blocks used least recently make room for it. Exact rows
        replace lossy ones. `NoSpaceError` if the block is larger than the budget."""
        nbytes = _aligned(len(block.data))
        if nbytes > self._arena.numel():
            raise NoSpaceError(f"a block of {nbytes:,} bytes is larger than device_bytes")
        self._give_way(name, block)
        while name not in self._blocks and not self._store(name, block):
            self.drop(next(iter(self._order)))
        self._order.touch(name)

    def _give_way(self, name: str, block: Block) -> None:
        if name in self._blocks and not self.serves(name, lossy=block.lossy):
            self.drop(name)

    def _store(self, name: str, block: Block) -> bool:
        """Whether there was room."""
        nbytes = len(block.data)
        offset = self._allocator.allocate(_aligned(nbytes))
        if offset is not None:
            source = torch.frombuffer(bytearray(block.data), dtype=torch.uint8)
            self._written = max(self._written, offset + nbytes)
            self._arena[offset : offset + nbytes].copy_(source)
            self._blocks[name] = _Place(offset, nbytes, block.namespace, block.layout, block.lossy)
        return offset is not None

    def drop(self, name: str) -> bool:
        """Remove a block at once; False if it was not here."""
        found = self._blocks.pop(name, None)
        if found is None:
            return False
        self._allocator.free(found.offset)
        self._order.remove(name)
        return True

    def wipe(self) -> None:
        """Remove every block, and fill with zeros whatever held rows."""
        for name in self.names():
            self.drop(name)
        self._arena[: self._written].zero_()
        self._written = 0

    async def put(self, name: str, block: Block) -> None:
        self._give_way(name, block)
        if name not in self._blocks and not self._store(name, block):
            raise NoSpaceError(f"no room for a block of {len(block.data):,} bytes on the device")
        self._order.touch(name)

    async def get(self, name: str) -> Block:
        rows = self.rows(name)
        if rows is None:
            raise MissingBlockError(f"block {short(name)} is not in the device tier")
        place = self._blocks[name]
        data = rows.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
        return Block(place.namespace, place.layout, data, place.lossy)

    async def delete(self, name: str) -> bool:
        return self.drop(name)

    def size(self, name: str) -> int | None:
        found = self._blocks.get(name)
        return None if found is None else _aligned(found.nbytes)

    def names(self) -> list[str]:
        return list(self._order)

    def touch(self, name: str) -> None:
        if name in self._blocks:
            self._order.touch(name)

    def use(self) -> TierUse:
        return TierUse(self._allocator.used, self._arena.numel(), len(self._blocks))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
