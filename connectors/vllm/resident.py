"""What a worker keeps on its own device: the blocks that its requests reuse most."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from kvshare_store.blocks.tiers.device import DeviceTier
from kvshare_store.blocks.tiers.host.arena import ArenaView
from kvshare_store.errors import LeaseError
from kvshare_store.plan import BlockRef
from kvshare_store.tensors.frame import Block
from kvshare_store.tensors.layout import KVLayout

_USES = 2
"""A block used so often is worth its place."""
_REMEMBERED = 4096
_BLOCKS_PER_STEP = 16


class Resident:
    """A device tier filled after the forward, off the way of any token. No budget: nothing."""

    def __init__(self, budget: int, device: torch.device | str, layout: KVLayout) -> None:
        self._tier = DeviceTier(budget, device) if budget else None
        self._layout = layout
        self._uses: OrderedDict[str, int] = OrderedDict()
        self._wanted: dict[str, tuple[ArenaView, BlockRef]] = {}

    def rows(self, ref: BlockRef) -> torch.Tensor | None:
        """The block's rows on the device, as exact as those in the arena or more, or None."""
        return self._tier.rows(ref.name) if self._tier is not None and self._serves(ref) else None

    def _serves(self, ref: BlockRef) -> bool:
        return self._tier is not None and self._tier.serves(ref.name, lossy=ref.lossy)

    def used(self, arena: ArenaView, blocks: Sequence[BlockRef]) -> None:
        """A request has loaded rows of these blocks."""
        if self._tier is None:
            return
        for ref in blocks:
            uses = self._uses[ref.name] = self._uses.pop(ref.name, 0) + 1
            if uses >= _USES and not self._serves(ref):
                self._wanted[ref.name] = (arena, ref)
        while len(self._uses) > _REMEMBERED:
            self._uses.popitem(last=False)

    def fill(self) -> None:
        """Copy what has become worth it. Its lease may have ended: the label in the arena says,
        before and after the copy, whether the block was still there."""
        wanted, self._wanted = list(self._wanted.values())[:_BLOCKS_PER_STEP], {}
        for arena, ref in wanted:
            self._copy(arena, ref)

    def _copy(self, arena: ArenaView, ref: BlockRef) -> None:
        if self._tier is None or ref.nbytes > self._tier.use().budget:
            return
        try:
            arena.check(ref)
            rows = bytes(arena.rows(ref.offset, ref.nbytes))
            arena.check(ref)
        except LeaseError:
            return
        # a plan names blocks of its own namespace only, so none needs to be written down here
        self._tier.keep(ref.name, Block("", self._layout, rows, ref.lossy))
