"""Shelf: the nodes that are here, from their first lookup to their last byte.

Tree, index, blocks and catalogue change together, under one lock; what waits for a medium
happens in the committer's thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.blocks.levels import Level
from kvshare_store.committer import Addition, Committer, Removal
from kvshare_store.condemned import Condemned
from kvshare_store.config import StoreConfig
from kvshare_store.durable import Durable
from kvshare_store.errors import (
    ConfigError,
    HomeError,
    KVShareError,
    MissError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
)
from kvshare_store.home import Home
from kvshare_store.lookup.embedders import lexical_vector
from kvshare_store.lookup.index import NamespaceIndex
from kvshare_store.metrics import Metrics
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.frame import Block
from kvshare_store.tree.catalog import Vectors
from kvshare_store.tree.delta_tree import DeltaTree
from kvshare_store.tree.node import Node
from kvshare_store.uses import Uses

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

    def __init__(self, config: StoreConfig, tree: DeltaTree, metrics: Metrics) -> None:
        self.tree = tree
        self.lock = threading.RLock()
        self._config = config
        self._metrics = metrics
        self.health = metrics.health
        self._home = home = Home.open(config, metrics.health)
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
        self.machine = uuid.uuid4().hex
        """Names this process among those that share a catalogue."""
        self.shared = self.catalog is not None and self.catalog.place.shared
        self.condemned = self._open_condemned() if self.shared else None
        self.uses = self._open_uses()
        self.durable = Durable(
            tree, self.blocks, self.lock, self.catalog, self._take_out, self.condemned
        )
        if self.catalog is not None:
            self.catalog.with_room = self.durable.add_rows
        self.committer = Committer(
            self.catalog,
            self._make_durable,
            self.blocks.delete,
            self._uncommitted,
            metrics.health,
            self._committed,
        )
        try:
            with _no_collections():
                self._recover()
            _give_memory_back()
        except KVShareError as error:
            self.close()
            if isinstance(error, StorageError):
                raise HomeError(
                    f"home {config.home_path} cannot be read: {error}. See to its disk and the "
                    "rights of its folders, or choose another home"
                ) from error
            raise

    def _open_condemned(self) -> Condemned | None:
        if self.catalog is None:
            return None
        grace_s = self._config.shared_grace_seconds
        return Condemned(self.catalog.facts, self.machine, grace_s, self.blocks.doubt_shared)

    def _open_uses(self) -> Uses | None:
        """Where last uses count beyond this process, they are written down."""
        if self.catalog is None or not (self.shared or self._config.ttl_seconds):
            return None
        return Uses(self.catalog.uses, self.tree, self.lock, self._config.ttl_seconds)

    def _recover(self) -> None:
        """Rebuild tree and index from the catalogue; nodes whose blocks are gone are dropped.

        Blocks that no node uses are left to the janitor.
        """
        if self.catalog is None:
            return
        for namespace in self.catalog.namespaces():
            self._namespaces[namespace.digest] = namespace
            self._registered.add(namespace.digest)
        now = time.time()
        used = self.uses.recorded() if self.uses is not None else {}
        lost: list[Node] = []
        idle: dict[str, tuple[Node, float]] = {}
        for batch in self.catalog.load_batches():
            for digest, rows in self._complete(batch, lost, idle.keys()).items():
                self._index_of(digest).extend(rows)
                for node, _ in rows:
                    last = max(node.created, used.get(node.id, 0.0))
                    idle[node.id] = node, max(0.0, now - last)
        self.tree.fill(idle.values())
        for index in self._indexes.values():
            index.settle()
        self._count_faults()
        if lost:
            self.committer.order(self._removal(lost))
        if self.shared:
            self._let_go_of_excess()

    def _complete(
        self,
        batch: Iterable[tuple[Node, Vectors]],
        lost: list[Node],
        known: Collection[str],
    ) -> dict[str, list[tuple[Node, Vectors]]]:
        """Rows whose blocks are there, by namespace; others are `lost`. A row of a node that is
        known by then is one too many."""
        found: defaultdict[str, dict[str, tuple[Node, Vectors]]] = defaultdict(dict)
        for node, vectors in batch:
            if not self.blocks.expect(node.blocks, node.namespace):
                lost.append(node)
                self._metrics.error(MissingBlockError.kind)
            elif node.id not in known:
                found[node.namespace].setdefault(node.id, (node, vectors))
        return {namespace: list(rows.values()) for namespace, rows in found.items()}

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

    def index(self, digest: str) -> NamespaceIndex | None:
        """What nominates donors in a namespace; None for one without nodes, which costs nothing."""
        return self._indexes.get(digest)

    # --- nodes come and go -------------------------------------------------------------------

    def add(self, node: Node, vectors: Vectors) -> None:
        """Offer a node to lookups now and make it durable soon. Its blocks are in a tier."""
        with self.lock:
            node = self._insert(node, vectors)
            self.committer.order(Addition(node, vectors))
            if self.shared:
                self._let_go_of_excess()
            else:
                self.evict(max(0, len(self.tree) - self._config.max_nodes))
            self.hold_quota(node.namespace, newest=node.id)

    def _insert(self, node: Node, vectors: Vectors, idle: float = 0.0) -> Node:
        node = self.tree.rooted(node)
        self.tree.add(node, idle)
        self.blocks.weigh(node.blocks)
        self._index_of(node.namespace).add(node, vectors)
        return node

    def _index_of(self, namespace: str) -> NamespaceIndex:
        index = self._indexes.get(namespace)
        if index is None:
            index = self._indexes[namespace] = NamespaceIndex(self._config.block_tokens)
        return index

    def hold_quota(self, namespace: str, newest: str = "") -> int:
        """Forget nodes of a namespace that is over its quota, and of no other; returns how many.

        The newest goes only if it alone is too much. With a shared catalogue only nodes go that for
        a while no machine has used.
        """
        quota, gone = self._config.namespace_bytes, 0
        with self.lock:
            while quota and self.tree.bytes_of(namespace) > quota:
                victims = filter(self._quiet, self.tree.victims(namespace))
                victim = next((node.id for node in victims if node.id != newest), newest)
                if victim not in self.tree or (self.shared and victim == newest):
                    break  # what is left is pinned, or others may be using it
                if victim == newest:
                    self._metrics.error(NoSpaceError.kind)
                self.remove([victim])
                gone += 1
        return gone

    def _quiet(self, node: Node) -> bool:
        """Whether no machine can have used the node lately: others write their uses down late."""
        late = 2 * self.uses.period if self.shared and self.uses is not None else 0.0
        return not late or self.tree.idle_for(node.id) >= late

    def remove(self, ids: Sequence[str], *, whatever: bool = False) -> None:
        """Out of tree and index now, out of catalogue and tiers in the committer's time.

        In a shared catalogue a row stays that another machine has pinned, merged or saved anew
        meanwhile, unless somebody asked for the removal of `whatever` is there.
        """
        with self.lock:
            removed, unused = [], []
            for node_id in ids:
                node = self.tree.get(node_id)
                if node is not None:
                    removed.append(node)
                    unused += self._take_out(node_id) or []
            if removed:
                removal = self._removal(removed, unused)
                self.committer.order(removal._replace(stamps=()) if whatever else removal)

    def _removal(self, nodes: Sequence[Node], unused: Sequence[str] = ()) -> Removal:
        stamps = tuple(node.stamp for node in nodes) if self.shared else ()
        return Removal(tuple(node.id for node in nodes), tuple(unused), stamps)

    def _let_go_of_excess(self) -> None:
        """`max_nodes` bounds this machine's memory: the rows stay for the others."""
        with self.lock:
            excess = max(0, len(self.tree) - self._config.max_nodes)
            chosen = [node.id for node in islice(self.tree.victims(), excess)]
            unused = [name for i in chosen for name in self._take_out(i) or ()]
            if unused:
                self.committer.order(Removal((), tuple(unused)))

    def _take_out(self, node_id: str) -> list[str] | None:
        """Blocks that nobody uses once the node is gone; None if it was not here."""
        gone = self.tree.remove(node_id)
        if gone is None:
            return None
        node, unused = gone
        self.blocks.weigh(node.blocks)
        index = self._indexes.get(node.namespace)
        if index is not None:
            index.remove(node)
            if not len(index):
                del self._indexes[node.namespace]
        return unused

    def evict(self, nodes: int, namespace: str | None = None) -> int:
        """Forget the nodes worth least, or all of one namespace, pinned or not; returns how many.

        Pinned nodes go only with their namespace.
        """
        if nodes < 0:
            raise ConfigError(f"cannot evict {nodes} nodes")
        with self.lock:
            if namespace is None:
                chosen = [node.id for node in islice(self.tree.victims(), nodes)]
            else:
                chosen = [node.id for node in self.tree if node.namespace == namespace]
            self.remove(chosen, whatever=namespace is not None)
            return len(chosen)

    def withdraw(self, namespace: str) -> list[Node]:
        """Take all nodes of a namespace out of tree and index, and leave the rest to the caller."""
        with self.lock:
            nodes = [node for node in self.tree if node.namespace == namespace]
            for node in nodes:
                self._take_out(node.id)
            return nodes

    # --- other machines ----------------------------------------------------------------------

    def learn(
        self,
        namespaces: Iterable[Namespace],
        rows: Iterable[tuple[Node, Vectors]],
        known: Mapping[str, int],
    ) -> None:
        """Rows that others have committed to a shared catalogue: they can be donors from now.

        A node that is here takes the form of its row, if it has the stamp that its row had before
        (`known`); else a change of this machine's is on its way.
        """
        with self.lock:
            for namespace in namespaces:
                self._namespaces.setdefault(namespace.digest, namespace)
                self._registered.add(namespace.digest)
            for node, vectors in rows:
                here = self.tree.get(node.id)
                ours = here is not None and here.stamp != known.get(node.id)
                if not ours and node.namespace not in self.closed:
                    self._adopt(node, vectors)
            self._let_go_of_excess()
        self._count_faults()

    def _adopt(self, node: Node, vectors: Vectors) -> None:
        """The row is what counts: what this machine had of the node goes."""
        known = node.id in self.tree
        idle = max(0.0, self.tree.idle_for(node.id) if known else time.time() - node.created)
        unused = self._take_out(node.id) or []
        self.blocks.expect(node.blocks, node.namespace)
        self._insert(node, vectors, idle)
        self.sweep(unused)

    def unlearn(self, gone: Mapping[str, int]) -> None:
        """Rows (their stamps, by id) that others have removed: what this machine keeps goes as
        well, unless it has saved the node anew."""
        with self.lock:
            here = [i for i, stamp in gone.items() if (n := self.tree.get(i)) and n.stamp == stamp]
            unused = [name for i in here for name in self._take_out(i) or ()]
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
            self.remove(chosen, whatever=True)
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
            wanted = {node.namespace for node in nodes} & self._namespaces.keys()
            new = wanted - self._registered  # a node that has left may be of a forgotten one
            if new and self.catalog is not None:
                self.catalog.add_namespaces([self._namespaces[digest] for digest in new])
            self._registered |= new
        except KVShareError as error:
            return [error] * len(nodes)
        return self.durable.make(nodes)

    def _committed(self, nodes: Sequence[Node], known: set[str]) -> list[KVShareError | None]:
        """Rows are committed. Of `known` nodes another machine's row was there before. For each
        node what went wrong, or None."""
        if not self.shared or self.catalog is None:
            return [None] * len(nodes)
        ours = [node for node in nodes if node.id not in known]
        failed = {
            node.id: error
            for node, error in zip(ours, self.durable.confirmed(ours), strict=True)
            if error is not None
        }
        try:
            theirs = list(self.catalog.load(ids=known)) if known else []
            self.learn((), theirs, {node.id: node.stamp for node in nodes})
        except KVShareError as error:
            failed |= dict.fromkeys(known, error)
        return [failed.get(node.id) for node in nodes]

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
