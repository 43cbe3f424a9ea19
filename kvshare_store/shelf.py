"""Shelf: the nodes that are here, from their first lookup to their last byte.

Tree, index, blocks and catalogue change together, under one lock; what waits for a medium or runs a
model happens in the committer's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvshare_store.blocks.arena import slot_bytes
from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.committer import Addition, Committer, Removal
from kvshare_store.config import StoreConfig
from kvshare_store.errors import (
    ConfigError,
    KVShareError,
    MissError,
    MissingBlockError,
    NoSpaceError,
)
from kvshare_store.home import Home
from kvshare_store.lookup.index import NamespaceIndex
from kvshare_store.lookup.semantic import Semantic
from kvshare_store.metrics import Metrics
from kvshare_store.namespace import Namespace
from kvshare_store.tree.catalog import Vectors
from kvshare_store.tree.delta_tree import DeltaTree
from kvshare_store.tree.node import Node

_FRAME_BYTES = 4096
"""More than the header of any block file."""


class Shelf:
    """Nodes of every namespace. Thread-safe; `lock` may be held over several calls."""

    def __init__(
        self, config: StoreConfig, tree: DeltaTree, semantic: Semantic, metrics: Metrics
    ) -> None:
        self.tree = tree
        self.lock = threading.RLock()
        self._config = config
        self._metrics = metrics
        self._semantic = semantic
        self._home = home = Home.open(config)
        self.catalog = home.catalog
        self.blocks = BlockStore(home.host, home.disk, home.io, self.lock, metrics)
        self.blocks.on_lost = self._on_lost
        self.blocks.in_use = self._in_use
        self._indexes: dict[str, NamespaceIndex] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._closed = False
        self.committer = Committer(
            self.catalog,
            self._make_durable,
            self._describe,
            self.blocks.delete,
            self._uncommitted,
        )
        try:
            self._recover()
        except KVShareError:
            self.close()
            raise

    def _recover(self) -> None:
        """Rebuild tree and index from the catalogue; nodes whose blocks are gone are dropped."""
        if self.catalog is None:
            return
        for namespace in self.catalog.namespaces():
            self._namespaces[namespace.digest] = namespace
        lost = []
        for node, vectors in self.catalog.load():
            if all(self.blocks.tier_of(name) for name in node.blocks):
                self._insert(node, vectors)
            else:
                lost.append(node.id)
                self._metrics.error(MissingBlockError.kind)
        orphans = self.blocks.names() - self.tree.blocks()
        if lost or orphans:
            self.committer.order(Removal(tuple(lost), tuple(orphans)))

    # --- namespaces --------------------------------------------------------------------------

    def register(self, namespace: Namespace) -> None:
        """Remember a namespace, for good where there is a catalogue."""
        if namespace.digest in self._namespaces:
            return
        if self.catalog is not None:
            self.catalog.add_namespace(namespace)
        self._namespaces[namespace.digest] = namespace

    def namespace(self, digest: str) -> Namespace | None:
        """What a digest stands for."""
        return self._namespaces.get(digest)

    def index(self, digest: str) -> NamespaceIndex:
        """What nominates donors in a namespace."""
        index = self._indexes.get(digest)
        if index is None:
            index = self._indexes[digest] = NamespaceIndex(self._config.block_tokens)
        return index

    # --- nodes come and go -------------------------------------------------------------------

    def add(self, node: Node, vectors: Vectors) -> None:
        """Offer a node to lookups now and make it durable soon. Its blocks are in a tier."""
        with self.lock:
            self._insert(node, vectors)
            self.committer.order(Addition(node, vectors))
            self.evict(max(0, len(self.tree) - self._config.max_nodes))

    def _insert(self, node: Node, vectors: Vectors) -> None:
        self.tree.add(node)
        self.index(node.namespace).add(node, vectors)

    def remove(self, ids: Sequence[str]) -> None:
        """Out of tree and index now, out of catalogue and tiers in the committer's time."""
        with self.lock:
            removed, unused = [], []
            for node_id in ids:
                gone = self._take_out(node_id)
                if gone is not None:
                    removed.append(node_id)
                    unused += gone
            if removed:
                self.committer.order(Removal(tuple(removed), tuple(unused)))

    def _take_out(self, node_id: str) -> list[str] | None:
        """Blocks that nobody uses once the node is gone; None if it was not here."""
        gone = self.tree.remove(node_id)
        if gone is None:
            return None
        node, unused = gone
        self.index(node.namespace).remove(node)
        return unused

    def evict(self, nodes: int, namespace: str | None = None) -> int:
        """Forget the least recently used nodes, or all of one namespace; returns how many."""
        if nodes < 0:
            raise ConfigError(f"cannot evict {nodes} nodes")
        with self.lock:
            chosen = [node.id for node in self.tree if namespace in (None, node.namespace)]
            chosen = chosen if namespace is not None else chosen[:nodes]
            self.remove(chosen)
            return len(chosen)

    def sweep(self, names: Sequence[str]) -> None:
        """Blocks that a lease has let go: those that lost their last node meanwhile can go."""
        with self.lock:
            unused = tuple(name for name in names if not self._in_use(name))
            if unused:
                self.committer.order(Removal((), unused))

    def users(self, name: str) -> list[Node]:
        """Nodes with rows in a block."""
        found = (self.tree.get(user) for user in self.tree.users(name))
        return [node for node in found if node is not None]

    def _in_use(self, name: str) -> bool:
        """Whether a node points at the block: one may have come since its deletion was ordered."""
        return bool(self.tree.users(name))

    def _on_lost(self, names: list[str]) -> None:
        with self.lock:
            self.remove([user for name in names for user in self.tree.users(name)])

    # --- in the committer's thread -----------------------------------------------------------

    def _make_durable(self, node: Node) -> None:
        with self.lock:
            if node.id not in self.tree:
                raise MissingBlockError(f"node {node.id[:12]} was removed before it was durable")
        self._make_disk_room(node)
        self.blocks.persist(list(node.blocks))

    def _make_disk_room(self, node: Node) -> None:
        """Forget the least recently used nodes until the node's blocks fit the disk budget."""
        disk = self.blocks.disk
        if disk is None:
            return
        with self.lock:
            needed = sum(
                slot_bytes(ref.nbytes) + _FRAME_BYTES
                for name in node.blocks
                if disk.size(name) is None and (ref := self.blocks.host.ref(name)) is not None
            )
            victims = [old.id for old in self.tree if old.id != node.id]
        if needed > disk.use().budget:
            raise NoSpaceError(f"the prompt takes {needed:,} bytes, more than disk_bytes")
        for victim in victims:
            use = disk.use()
            if use.bytes + needed <= use.budget:
                return
            with self.lock:
                unused = self._take_out(victim)
            if unused is not None:
                if self.catalog is not None:
                    self.catalog.delete([victim])
                self.blocks.delete(unused)

    def _describe(self, addition: Addition) -> Addition:
        """Add the text vector, which may take longer than a request should wait."""
        node = addition.node
        vector = self._semantic.of_node(self._namespaces[node.namespace], node.tokens)
        if vector is None:
            return addition
        with self.lock:
            if node.id in self.tree:
                self.index(node.namespace).semantic.add(node.id, vector)
        return Addition(node, Vectors(addition.vectors.lexical, vector))

    def _uncommitted(self, node: Node, error: KVShareError) -> None:
        """What cannot be made durable is no node: a full disk stops saving, not serving."""
        if not isinstance(error, MissError):
            self._metrics.error(error.kind)
        self.remove([node.id])

    # --- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Finish what is queued and let go of the home. Everything committed stays."""
        if not self._closed:
            self._closed = True
            self.committer.close()
            self.blocks.close()
            self._home.close()
