"""Makes room: where a tier or a file system is full, the nodes worth least are removed. Runs in the
committer's thread."""

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
"""How often room is made for one write on a full file system."""


class Room:
    """Removes nodes, their rows before their blocks."""

    def __init__(self, nodes: NodeStore, catalog: Catalog | None) -> None:
        self._nodes = nodes
        self._blocks = nodes.blocks
        self._catalog = catalog
        self.keep: Collection[str] = ()
        """Nodes that are being made durable; they stay."""
        self._compacted = 0
        """Bytes of the catalogue after its last compaction."""

    def make(self, names: Iterable[str]) -> None:
        """Move or remove what is worth least until the blocks fit into the budget of the tier that
        must hold them. `NoSpaceError` if the blocks alone exceed the budget."""
        tier = self._tier
        if tier is None or not tier.use().budget:
            return
        needed = self.missing_bytes(names)
        if needed > tier.use().budget:
            raise NoSpaceError(f"the prompts take {needed:,} bytes, more than {tier.name}_bytes")
        while not self._blocks.make_room(tier.name, needed):
            missing = tier.use().missing(needed)
            if self._compact(missing):
                continue
            gone, unused = self._drop(missing, self._nodes.shorten)
            if not gone and not self._compact(1):
                return
            # rows leave the catalogue before their blocks leave the tiers
            if self._catalog is not None:
                self._catalog.delete(node.id for node in gone)
            self.delete(unused)

    def hold_budget(self) -> None:
        """Also count what commits have added since the last save, and make room for it now."""
        self.fit_catalog()
        self.keep = ()
        self.make(())

    def fit_catalog(self) -> None:
        """Every commit adds to the catalogue. Drop its old versions before they exceed the budget,
        unless blocks can move to a lower tier instead."""
        if not self._blocks.make_room("disk", 0):
            self._compact(1)

    def delete(self, names: Iterable[str]) -> None:
        """Remove blocks that nobody leases or uses from every tier, and wait for it. The nodes that
        used them must be removed before. A block that is in use again by now stays, and so does one
        that a row still names: whoever removes the row removes the block."""
        nodes = self._nodes
        with nodes.lock:
            unused = [name for name in names if not (nodes.tree.uses(name) or nodes.named(name))]
            free = self._blocks.pool.drop(unused)
        self._blocks.delete(free)

    def _compact(self, nbytes: int) -> bool:
        """Whether old versions of the catalogue with so many bytes could be dropped. Removing nodes
        does not make the catalogue smaller. One that several machines share is in no budget."""
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
        """Bytes of those blocks that are not yet in the tier that must hold them."""
        tier = self._tier
        with self._nodes.lock:
            return sum(
                slot_bytes(ref.nbytes) + FRAME_BYTES
                for name in names
                if (tier is None or tier.size(name) is None)
                and (ref := self._blocks.host.ref(name)) is not None
            )

    def _drop(self, nbytes: int, give_up: Callable[[Node, int], Change]) -> Change:
        """Let nodes go in memory, those used longest ago first, until their blocks had about so
        many bytes."""
        tier, gone, unused = self._tier, list[Node](), list[str]()
        with self._nodes.lock:
            while nbytes > 0 and tier is not None:
                victims = self._nodes.tree.victims()
                victim = next((n for n in victims if n.id not in self.keep), None)
                if victim is None:
                    break
                change = give_up(victim, nbytes)
                nbytes -= sum(tier.size(name) or 0 for name in change.unused)
                gone += change.nodes
                unused += change.unused
        return Change(tuple(gone), tuple(unused))

    # --- a file system that is full below the budget -----------------------------------------

    def retried(self, write: Callable[[], T], nbytes: int) -> T:
        """Try a write; each time that the disk has no room (or no inodes), remove twice as many
        nodes and try again. At first it is one node: shrinking the catalogue may be enough. If a
        remote is full, removing nodes of this machine does not help, and its error is raised."""
        for attempt in range(_TIMES):
            try:
                return write()
            except FullDiskError as error:
                if not self._relieve(nbytes << attempt if attempt else 1, error):
                    raise
        return write()

    def compacted(self, write: Callable[[], T]) -> T:
        """Try a write that is not worth a prompt; if the disk has no room, once more after old
        versions of the catalogue are gone."""
        try:
            return write()
        except FullDiskError:
            if not self._compact(1):
                raise
            return write()

    def _relieve(self, nbytes: int, error: FullDiskError) -> bool:
        """Remove nodes because the file system is full; False if none is left. Here blocks go
        before rows, unlike in an eviction: the catalogue cannot be written before there is room. If
        a crash leaves rows without blocks, the next start drops those nodes. They go as a whole: a
        beginning would need a row of its own."""
        gone, unused = self._drop(nbytes, lambda victim, _: self._nodes.drop([victim.id]))
        if not gone:
            return False
        log.warning("kvshare: %d prompts are forgotten, there is no space: %s", len(gone), error)
        self.delete(unused)
        if self._catalog is not None:
            with contextlib.suppress(KVShareError):  # the next start drops them, if not now
                self._catalog.delete(node.id for node in gone)
                self._compact(1)  # its old versions take files, and inodes
        return True
