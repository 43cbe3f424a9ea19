"""The device tier of a worker: blocks that its requests reuse most stay on its device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvshare_store.blocks.tiers.device import DeviceTier
from kvshare_store.bounded import Latest
from kvshare_store.daemon.fetching import LeasedRows
from kvshare_store.errors import LeaseError
from kvshare_store.plan import BlockRef
from kvshare_store.tensors.frame import Block
from kvshare_store.tensors.layout import KVLayout

_USES = 2
"""A block is kept from this use on."""
_REMEMBERED = 4096
"""Blocks whose uses are counted."""
_BLOCKS_PER_STEP = 16


class Resident:
    """Filled after the forward, so that no token waits for it. Without a budget it is off."""

    def __init__(self, budget: int, device: torch.device | str, layout: KVLayout) -> None:
        self.tier = DeviceTier(budget, device) if budget else None
        self._layout = layout
        self._uses: Latest[str, int] = Latest(_REMEMBERED)
        self._wanted: dict[str, tuple[LeasedRows, BlockRef]] = {}
        self._wiped = ""

    def rows(self, ref: BlockRef) -> torch.Tensor | None:
        """The block's rows on the device, at least as exact as the arena's; None if absent."""
        return self.tier.rows(ref.name) if self.tier is not None and self._serves(ref) else None

    def _serves(self, ref: BlockRef) -> bool:
        return self.tier is not None and self.tier.serves(ref.name, lossy=ref.lossy)

    def purged(self, wiped: str) -> None:
        """Drop every copy if `wiped`, of the newest plan, has changed (see `ReusePlan.wiped`)."""
        if self.tier is None or wiped == self._wiped:
            return
        self._wiped = wiped
        self._uses.clear()
        self._wanted.clear()
        self.tier.wipe()

    def used(self, arena: LeasedRows, blocks: Sequence[BlockRef]) -> None:
        """A request has loaded rows of these blocks."""
        if self.tier is None:
            return
        for ref in blocks:
            uses = self._uses[ref.name] = self._uses.get(ref.name, 0) + 1
            if uses >= _USES and not self._serves(ref):
                self._wanted[ref.name] = (arena, ref)

    def fill(self) -> None:
        """Copy blocks that were used often enough.

        Their lease may have ended. The label in the arena, checked before and after the copy, says
        whether the block was still there.
        """
        wanted, self._wanted = list(self._wanted.values())[:_BLOCKS_PER_STEP], {}
        for arena, ref in wanted:
            self._copy(arena, ref)

    def _copy(self, arena: LeasedRows, ref: BlockRef) -> None:
        if self.tier is None or ref.nbytes > self.tier.use().budget:
            return
        try:
            arena.check(ref)
            rows = bytes(arena.rows(ref.offset, ref.nbytes))
            arena.check(ref)
        except LeaseError:
            return
        # the namespace is not needed: a plan names blocks of its own namespace only
        self.tier.keep(ref.name, Block("", self._layout, rows, ref.lossy))
