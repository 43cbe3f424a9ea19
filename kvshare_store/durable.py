"""Making nodes durable, in the committer's thread: room on disk, then every block of a batch."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from kvshare_store.blocks.arena import slot_bytes
from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.blocks.levels import FRAME_BYTES
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.condemned import Condemned
from kvshare_store.errors import (
    FullDiskError,
    KVShareError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
)
from kvshare_store.tree.catalog import Catalog
from kvshare_store.tree.delta_tree import DeltaTree
from kvshare_store.tree.node import Node

log = logging.getLogger("kvshare")

_COMMIT_BYTES = 1 << 16
"""About what LanceDB writes for one commit, beside the rows."""
_TIMES = 4
"""So often room is made for one write on a file system that is full."""
_CONFIRMED_IN = 4
"""Attempts to write blocks within half a grace."""


class Durable:
    """Bytes before metadata. `take_out` removes a node from tree and index and returns the blocks
    that nobody uses any more."""

    def __init__(
        self,
        tree: DeltaTree,
        blocks: BlockStore,
        lock: threading.RLock,
        catalog: Catalog | None,
        take_out: Callable[[str], list[str] | None],
        condemned: Condemned | None = None,
    ) -> None:
        self._tree = tree
        self._blocks = blocks
        self._lock = lock
        self._catalog = catalog
        self._take_out = take_out
        self._condemned = condemned
        self._keep: set[str] = set()
        """Nodes that are being made durable."""
        self._compacted = 0
        """Bytes of the catalogue when it was compacted."""

    def make(self, nodes: Sequence[Node]) -> list[KVShareError | None]:
        """Write the blocks of all nodes, as many at a time as the tiers are worth.

        For each node what went wrong, or None. One that fails does not take the others along.
        """
        try:
            self.write(nodes)
        except KVShareError as error:
            if len(nodes) == 1:
                return [error]
            return [failed for node in nodes for failed in self.make([node])]
        return [None] * len(nodes)

    def write(self, nodes: Sequence[Node]) -> None:
        """Return once every block of the nodes is durable; raises the first error."""
        with self._lock:
            for node in nodes:
                if node.id not in self._tree:
                    raise MissingBlockError(f"node {node.id[:12]} left before it was durable")
        names = list(dict.fromkeys(name for node in nodes for name in node.blocks))
        keep = {node.id for node in nodes}
        self.make_room(names, keep)
        self._keep = keep
        if self._condemned is not None:
            self._condemned.rescue(names)
        self._retried(lambda: self._blocks.persist(names), self._missing_bytes(names))

    def add_rows(self, add: Callable[[], None]) -> None:
        """Call `add`, which commits rows, with room for them on a file system that is full."""
        self._retried(add, _COMMIT_BYTES)

    def confirmed(self, nodes: Sequence[Node]) -> list[KVShareError | None]:
        """`confirm` for each node on its own where it fails for all: what went wrong, or None."""
        try:
            self.confirm(nodes)
        except KVShareError as error:
            if len(nodes) == 1:
                return [error]
            return [failed for node in nodes for failed in self.confirmed([node])]
        return [None] * len(nodes)

    def confirm(self, nodes: Sequence[Node]) -> None:
        """Their rows are committed: return once no block of theirs can have been removed from a
        shared remote before whoever removes it could see the row. Raises what stands in the way."""
        if self._condemned is None or not nodes:
            return
        names = list(dict.fromkeys(name for node in nodes for name in node.blocks))
        for _ in range(_CONFIRMED_IN):
            self._condemned.rescue(names)
            if self._blocks.sure(names):
                return
            self._blocks.persist(names)
        raise StorageError(
            "the catalogue is slower than shared_grace_seconds allows; raise that on every machine"
        )

    def make_room(self, names: Iterable[str], keep: set[str]) -> None:
        """Move or forget what is worth least until the blocks fit the budget of the tier that must
        hold them.

        Nodes in `keep` stay. `NoSpaceError` if the blocks alone are more than the budget.
        """
        tier = self._tier
        if tier is None or not tier.use().budget:
            return
        needed = self._missing_bytes(names)
        if needed > tier.use().budget:
            raise NoSpaceError(f"the prompts take {needed:,} bytes, more than {tier.name}_bytes")
        while not self._blocks.make_room(tier.name, needed):
            if self._compact(needed):
                continue
            gone, unused = self._take(tier.use().bytes + needed - tier.use().budget, keep)
            if not gone and not self._compact(1):
                return
            # rows leave the catalogue before their blocks leave the tiers
            if self._catalog is not None:
                self._catalog.delete(gone)
            self._blocks.delete(unused)

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

    def _missing_bytes(self, names: Iterable[str]) -> int:
        tier = self._tier
        with self._lock:
            return sum(
                slot_bytes(ref.nbytes) + FRAME_BYTES
                for name in names
                if (tier is None or tier.size(name) is None)
                and (ref := self._blocks.host.ref(name)) is not None
            )

    def _take(self, nbytes: int, keep: set[str]) -> tuple[list[str], list[str]]:
        """Take nodes that free about so many bytes, those worth least first, out of tree and index;
        returns them and the blocks that nobody uses any more."""
        tier, gone, unused = self._tier, list[str](), list[str]()
        with self._lock:
            while nbytes > 0 and tier is not None:
                victim = next((n for n in self._tree.victims() if n.id not in keep), None)
                if victim is None:
                    break
                left = self._take_out(victim.id) or []
                nbytes -= sum(tier.size(name) or 0 for name in left)
                gone.append(victim.id)
                unused += left
        return gone, unused

    # --- a file system that is full below the budget -----------------------------------------

    def _retried(self, write: Callable[[], None], nbytes: int) -> None:
        """Each time that the disk has no room (nor inodes), forget twice as much. First one node
        only: what is then removed of the catalogue may be enough. A remote that is full gains
        nothing when this machine forgets: its refusal goes to the caller."""
        for attempt in range(_TIMES):
            try:
                write()
                return
            except FullDiskError as error:
                if not self._relieve(nbytes << attempt if attempt else 1, error):
                    raise
        write()

    def _relieve(self, nbytes: int, error: FullDiskError) -> bool:
        """Forget nodes for a file system that is full; False if there are none to forget.

        Blocks go first, against the order of an eviction: the catalogue cannot be written before
        they are gone. Rows that a crash leaves are of nodes that the next start drops.
        """
        gone, unused = self._take(nbytes, self._keep)
        if not gone:
            return False
        log.warning("kvshare: %d prompts are forgotten, there is no space: %s", len(gone), error)
        self._blocks.delete(unused)
        if self._catalog is not None:
            with contextlib.suppress(KVShareError):  # the next start drops them, if not now
                self._catalog.delete(gone)
                self._compact(1)  # its old versions take files, and inodes
        return True
