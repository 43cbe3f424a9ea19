"""Making nodes durable, in the committer's thread: room on disk, then every block of a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from kvshare_store.blocks.arena import slot_bytes
from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.condemned import Condemned
from kvshare_store.errors import KVShareError, MissingBlockError, NoSpaceError, StorageError
from kvshare_store.tree.catalog import Catalog
from kvshare_store.tree.delta_tree import DeltaTree
from kvshare_store.tree.node import Node

_FRAME_BYTES = 4096
"""More than the header of any block file."""
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
        self.make_room(names, {node.id for node in nodes})
        if self._condemned is not None:
            self._condemned.rescue(names)
        self._blocks.persist(names)

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
        level = next((at for at in self._blocks.levels if at.required and not at.shared), None)
        if level is None or not level.tier.use().budget:
            return
        tier = level.tier
        with self._lock:
            needed = sum(
                slot_bytes(ref.nbytes) + _FRAME_BYTES
                for name in names
                if tier.size(name) is None and (ref := self._blocks.host.ref(name)) is not None
            )
        if needed > tier.use().budget:
            raise NoSpaceError(f"the prompts take {needed:,} bytes, more than {tier.name}_bytes")
        while not self._blocks.make_room(tier.name, needed):
            if not self._forget(tier, tier.use().bytes + needed - tier.use().budget, keep):
                return

    def _forget(self, tier: Tier, nbytes: int, keep: set[str]) -> bool:
        """Forget nodes that free about so many bytes, those worth least first; False if none may
        go. Their rows leave the catalogue before their blocks leave the tiers."""
        gone: list[str] = []
        unused: list[str] = []
        with self._lock:
            while nbytes > 0:
                victim = next((n for n in self._tree.victims() if n.id not in keep), None)
                if victim is None:
                    break
                left = self._take_out(victim.id) or []
                nbytes -= sum(tier.size(name) or 0 for name in left)
                gone.append(victim.id)
                unused += left
        if gone and self._catalog is not None:
            self._catalog.delete(gone)
        self._blocks.delete(unused)
        return bool(gone)
