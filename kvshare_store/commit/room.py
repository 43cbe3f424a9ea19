"""Room for what becomes durable: nodes worth least are forgotten where a tier or a file system is
full. In the committer's thread."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from kvshare_store.blocks.levels import FRAME_BYTES
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.host.arena import slot_bytes
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.errors import FullDiskError, KVShareError, NoSpaceError
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.state import Change

log = logging.getLogger("kvshare")

T = TypeVar("T")

_TIMES = 4
"""So often room is made for one write on a file system that is full."""


class Room:
    """Forgets nodes, their rows before their blocks."""

    def __init__(self, nodes: NodeStore, catalog: Catalog | None) -> None:
        self._nodes = nodes
        self._blocks = nodes.blocks
        self._catalog = catalog
        self.keep: Collection[str] = ()
        """Nodes that are being made durable: they stay."""
        self._compacted = 0
        """Bytes of the catalogue when it was compacted."""

    def make(self, names: Iterable[str]) -> None:
        """Move or forget what is worth least until the blocks fit the budget of the tier that must
        hold them. `NoSpaceError` if the blocks alone are more than the budget."""
        tier = self._tier
        if tier is None or not tier.use().budget:
            return
        needed = self.missing_bytes(names)
        if needed > tier.use().budget:
            raise NoSpaceError(f"the prompts take {needed:,} bytes, more than {tier.name}_bytes")
        while not self._blocks.make_room(tier.name, needed):
            if self._compact(needed):
                continue
            gone, unused = self._drop(tier.use().bytes + needed - tier.use().budget)
            if not gone and not self._compact(1):
                return
            # rows leave the catalogue before their blocks leave the tiers
            if self._catalog is not None:
                self._catalog.delete(node.id for node in gone)
            self.delete(unused)

    def delete(self, names: Iterable[str]) -> None:
        """Remove blocks that nobody leases or uses from every tier and wait for it.

        Whoever pointed at them must be gone before; a block that came into use again since then
        stays.
        """
        with self._nodes.lock:
            unused = [name for name in names if not self._nodes.tree.uses(name)]
            free = self._blocks.pool.drop(unused)
        self._blocks.delete(free)

    def _compact(self, nbytes: int) -> bool:
        """Whether so many bytes of old versions of the catalogue could be dropped: forgetting nodes
        does not make it smaller. One that several machines share is in no budget."""
        catalog = self._catalog
        if catalog is None or catalog.place.shared:
            return False
        if catalog.bytes - self._compacted < nbytes:
            return False
        catalog.compact()
        self._compacted = catalog.bytes
        return True

    @property
    def _tier(self) -> Tier | None:
        """The tier of this machine that must hold every committed row."""
        levels = self._blocks.levels
        return next((at.tier for at in levels if at.required and not at.shared), None)

    def missing_bytes(self, names: Iterable[str]) -> int:
        """What those of the blocks take that are not in the tier that must hold them."""
        tier = self._tier
        with self._nodes.lock:
            return sum(
                slot_bytes(ref.nbytes) + FRAME_BYTES
                for name in names
                if (tier is None or tier.size(name) is None)
                and (ref := self._blocks.host.ref(name)) is not None
            )

    def _drop(self, nbytes: int) -> Change:
        """Take nodes that free about so many bytes, those worth least first, out of memory."""
        tier, gone, unused = self._tier, list[Node](), list[str]()
        with self._nodes.lock:
            while nbytes > 0 and tier is not None:
                victims = self._nodes.tree.victims()
                victim = next((n for n in victims if n.id not in self.keep), None)
                if victim is None:
                    break
                change = self._nodes.drop([victim.id])
                nbytes -= sum(tier.size(name) or 0 for name in change.unused)
                gone += change.nodes
                unused += change.unused
        return Change(tuple(gone), tuple(unused))

    # --- a file system that is full below the budget -----------------------------------------

    def retried(self, write: Callable[[], T], nbytes: int) -> T:
        """Each time that the disk has no room (nor inodes), forget twice as much. First one node
        only: what is then removed of the catalogue may be enough. A remote that is full gains
        nothing when this machine forgets: its refusal goes to the caller."""
        for attempt in range(_TIMES):
            try:
                return write()
            except FullDiskError as error:
                if not self._relieve(nbytes << attempt if attempt else 1, error):
                    raise
        return write()

    def _relieve(self, nbytes: int, error: FullDiskError) -> bool:
        """Forget nodes for a file system that is full; False if there are none to forget.

        Blocks go first, against the order of an eviction: the catalogue cannot be written before
        they are gone. Rows that a crash leaves are of nodes that the next start drops.
        """
        gone, unused = self._drop(nbytes)
        if not gone:
            return False
        log.warning("kvshare: %d prompts are forgotten, there is no space: %s", len(gone), error)
        self.delete(unused)
        if self._catalog is not None:
            with contextlib.suppress(KVShareError):  # the next start drops them, if not now
                self._catalog.delete(node.id for node in gone)
                self._compact(1)  # its old versions take files, and inodes
        return True
