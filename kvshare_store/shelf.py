"""Shelf: the nodes that are here, from their first lookup to their last byte.

Tree, index, blocks and catalogue change together, under one lock; what waits for a medium or runs a
model happens in the committer's thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.blocks.levels import Level
from kvshare_store.committer import Addition, Committer, Removal
from kvshare_store.config import StoreConfig
from kvshare_store.durable import Durable
from kvshare_store.errors import (
    ConfigError,
    KVShareError,
    MissError,
    MissingBlockError,
    NoSpaceError,
)
from kvshare_store.home import Home
from kvshare_store.lookup.embedders import lexical_vector
from kvshare_store.lookup.index import NamespaceIndex
from kvshare_store.lookup.semantic import Semantic
from kvshare_store.metrics import Metrics
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.frame import Block
from kvshare_store.tree.catalog import Vectors
from kvshare_store.tree.delta_tree import DeltaTree
from kvshare_store.tree.node import Node

log = logging.getLogger("kvshare")


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Python looks for garbage the more often the more objects are made; among those of a recovery,
    which all stay, it finds none and takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _give_memory_back() -> None:
    """What reading the catalogue took and freed stays with the C library in pieces, a third of all
    memory after a recovery, until it is told to return them. Only glibc can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


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
        self.blocks = BlockStore(home.host, home.below, home.io, self.lock, metrics)
        self.blocks.on_lost = self.lost
        self.blocks.users = tree.user_count
        self._indexes: dict[str, NamespaceIndex] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._registered: set[str] = set()
        """Namespaces that the catalogue knows."""
        self.closed: set[str] = set()
        """Namespaces in which nothing new is stored, because they are being purged."""
        self.encrypted = bool(config.encryption_key)
        self._closed = False
        self.durable = Durable(tree, self.blocks, self.lock, self.catalog, self._take_out)
        if self.catalog is not None:
            self.catalog.with_room = self.durable.add_rows
        self.committer = Committer(
            self.catalog,
            self._make_durable,
            self._describe,
            self.blocks.delete,
            self._uncommitted,
        )
        try:
            with _no_collections():
                self._recover()
            _give_memory_back()
        except KVShareError:
            self.close()
            raise

    def _recover(self) -> None:
        """Rebuild tree and index from the catalogue; nodes whose blocks are gone are dropped.

        Blocks that no node uses are left to the janitor.
        """
        if self.catalog is None:
            return
        for namespace in self.catalog.namespaces():
            self._namespaces[namespace.digest] = namespace
            self._registered.add(namespace.digest)
        lost = []
        now = time.time()
        for node, vectors in self.catalog.load():
            if self.blocks.expect(node.blocks, node.namespace):
                self._insert(node, vectors, idle=max(0.0, now - node.created))
            else:
                lost.append(node.id)
                self._metrics.error(MissingBlockError.kind)
        self.tree.settle()
        self._count_faults()
        if lost:
            self.committer.order(Removal(tuple(lost), ()))

    def _count_faults(self) -> None:
        """Rows that the catalogue cannot stand for are counted and left out: `check` names them."""
        faults = self.catalog.take_faults() if self.catalog is not None else []
        for fault in faults:
            self._metrics.error(fault.error.kind)
        if faults:
            first = faults[0]
            log.warning(
                "kvshare: %d faults in the catalogue, `kvshare check` names them; the first: %s: "
                "%s", len(faults), first.about, first.error,
            )  # fmt: skip

    # --- namespaces --------------------------------------------------------------------------

    def register(self, namespace: Namespace) -> None:
        """Remember a namespace; for good with its first node."""
        self._namespaces.setdefault(namespace.digest, namespace)

    def namespace(self, digest: str) -> Namespace | None:
        """What a digest stands for."""
        return self._namespaces.get(digest)

    def namespaces(self) -> list[Namespace]:
        """Every namespace that is known."""
        return list(self._namespaces.values())

    def forget_namespace(self, digest: str) -> None:
        """Nothing of the namespace is left, and nobody knows what its digest stood for."""
        with self.lock:
            self._namespaces.pop(digest, None)
            self._indexes.pop(digest, None)
            self._registered.discard(digest)

    def keep_registered(self, digests: set[str]) -> None:
        """Others have purged what is not among these: the next save there writes a new record."""
        with self.lock:
            self._registered &= digests

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
            node = self._insert(node, vectors)
            self.committer.order(Addition(node, vectors))
            self.evict(max(0, len(self.tree) - self._config.max_nodes))
            self.hold_quota(node.namespace, newest=node.id)

    def _insert(self, node: Node, vectors: Vectors, idle: float = 0.0) -> Node:
        node = self.tree.rooted(node)
        self.tree.add(node, idle)
        self.blocks.weigh(node.blocks)
        self.index(node.namespace).add(node, vectors)
        return node

    def hold_quota(self, namespace: str, newest: str = "") -> int:
        """Forget nodes of a namespace that is over its quota, and of no other; returns how many.

        The newest goes only if it alone is too much.
        """
        quota, gone = self._config.namespace_bytes, 0
        with self.lock:
            while quota and self.tree.bytes_of(namespace) > quota:
                victims = self.tree.victims(namespace)
                victim = next((node.id for node in victims if node.id != newest), newest)
                if victim not in self.tree:
                    break  # what is left is pinned
                if victim == newest:
                    self._metrics.error(NoSpaceError.kind)
                self.remove([victim])
                gone += 1
        return gone

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
        self.blocks.weigh(node.blocks)
        self.index(node.namespace).remove(node)
        return unused

    def evict(self, nodes: int, namespace: str | None = None) -> int:
        """Forget the nodes worth least, or all of one namespace, pinned or not; returns how many.

        Pinned nodes go only with their namespace.
        """
        if nodes < 0:
            raise ConfigError(f"cannot evict {nodes} nodes")
        with self.lock:
            if namespace is not None:
                chosen = [node.id for node in self.tree if node.namespace == namespace]
            else:
                chosen = [node.id for node in islice(self.tree.victims(), nodes)]
            self.remove(chosen)
            return len(chosen)

    def withdraw(self, namespace: str) -> list[Node]:
        """Take all nodes of a namespace out of tree and index, and leave the rest to the caller."""
        with self.lock:
            nodes = [node for node in self.tree if node.namespace == namespace]
            for node in nodes:
                self._take_out(node.id)
            return nodes

    # --- other machines ----------------------------------------------------------------------

    def learn(self, namespaces: Iterable[Namespace], rows: Iterable[tuple[Node, Vectors]]) -> None:
        """Nodes that others have committed to a shared catalogue: they can be donors from now."""
        with self.lock:
            for namespace in namespaces:
                self._namespaces.setdefault(namespace.digest, namespace)
                self._registered.add(namespace.digest)
            for node, vectors in rows:
                if node.id not in self.tree and node.namespace not in self.closed:
                    self.blocks.expect(node.blocks, node.namespace)
                    self._insert(node, vectors)
        self._count_faults()

    def unlearn(self, ids: Iterable[str]) -> None:
        """Nodes that others have removed: what this machine keeps of them goes as well."""
        with self.lock:
            unused = [name for i in ids for name in self._take_out(i) or ()]
            self.blocks.doubt_shared(unused)
            if unused:
                self.committer.order(Removal((), tuple(unused)))

    def commit_again(self, nodes: Iterable[Node]) -> None:
        """Repeat commits that a shared catalogue has lost."""
        with self.lock:
            for node in nodes:
                if node.id in self.tree:
                    vectors = Vectors(lexical_vector(node.tokens), None)
                    self.committer.order(Addition(node, vectors))

    def clear(self) -> int:
        """Forget every node, pinned or not; returns how many there were."""
        with self.lock:
            chosen = [node.id for node in self.tree]
            self.remove(chosen)
            return len(chosen)

    def sweep(self, names: Sequence[str]) -> None:
        """Blocks that a lease has let go: those that lost their last node meanwhile can go."""
        with self.lock:
            unused = tuple(name for name in names if not self.tree.uses(name))
            if unused:
                self.committer.order(Removal((), unused))

    def size_of(self, name: str) -> int:
        """Bytes of a block in the fastest tier that has it; 0 if none has."""
        level = self.blocks.levels.holder(name)
        return self.blocks.host.size(name) or (level and level.tier.size(name)) or 0

    def read_from(self, level: Level, name: str) -> Block:
        """A verified block from this very tier, or what the tier says. Do not hold the lock."""
        return self._home.io.run(level.tier.get(name))

    def users(self, name: str) -> list[Node]:
        """Nodes with rows in a block."""
        found = (self.tree.get(user) for user in self.tree.users(name))
        return [node for node in found if node is not None]

    def lost(self, names: Sequence[str]) -> None:
        """Blocks are gone or bad: so are the nodes that use them, in the same moment."""
        with self.lock:
            self.remove([user for name in names for user in self.tree.users(name)])

    # --- in the committer's thread -----------------------------------------------------------

    def _make_durable(self, nodes: Sequence[Node]) -> list[KVShareError | None]:
        try:
            for digest in {node.namespace for node in nodes} - self._registered:
                if self.catalog is not None:
                    self.catalog.add_namespace(self._namespaces[digest])
                self._registered.add(digest)
        except KVShareError as error:
            return [error] * len(nodes)
        return self.durable.make(nodes)

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
