"""Adds and removes nodes: in memory at once, in the catalogue and the tiers a little later.

`NodeState` says what each change still needs. This module hands that on: it tells `blocks` how many
nodes use a block, and queues what must become durable or be removed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice, repeat
from typing import TypeVar

from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.blocks.pool import Reserved
from kvshare_store.commit.queue import Addition, CommitQueue, Removal
from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError, NoSpaceError
from kvshare_store.namespace import Namespace
from kvshare_store.namespace.limits import TenantLimits
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.state import Change, NodeState
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.observability.metrics import Metrics

T = TypeVar("T")

_NOTHING: Mapping[str, float] = {}
_ANY = -1
"""In place of a stamp: whatever stamp the row has."""
_STEPS = 256
"""Nodes that go for a quota while the lock is held: a quota may be lowered for thousands."""


class NodeStore:
    """Thread-safe; `lock` may be held over several calls."""

    def __init__(
        self,
        config: StoreConfig,
        state: NodeState,
        blocks: BlockStore,
        queue: CommitQueue,
        metrics: Metrics,
        limits: TenantLimits,
        *,
        shared: bool,
        late_s: float,
    ) -> None:
        """`shared`: other machines have these nodes too, and write their uses down up to `late_s`
        seconds later."""
        self.state = state
        self.tree = state.tree
        self.namespaces = state.namespaces
        self.lock = state.lock
        self.blocks = blocks
        self.queue = queue
        self.limits = limits
        self._config = config
        self._metrics = metrics
        self._shared = shared
        self._late_s = late_s
        self._named: Counter[str] = Counter()
        """How many rows that are about to be removed name a block."""
        self._numbers = count(1)
        self._waiting: set[int] = set()
        """Numbers of the removals that these are from."""
        self._leaving: Counter[tuple[str, int]] = Counter()
        """How many of these removals are of a row, by its id and stamp; `_ANY` for all forms of it.
        Only where others write rows too."""
        self._uncommitted: dict[str, int] = {}
        """Stamps by id of the nodes whose rows are not in the catalogue yet."""

    def reload(self, config: StoreConfig, limits: TenantLimits) -> None:
        """Go on by other settings; nodes that are too many now go with the next saves."""
        with self.lock:
            self._config, self.limits = config, limits
            if limits.quotas:
                self.tree.order_namespaces()

    # --- nodes come --------------------------------------------------------------------------

    def has(self, node: Node) -> bool:
        """Whether the node is here, in this form: not as it was saved again, or merged, since."""
        here = self.tree.get(node.id)
        return here is not None and here.stamp == node.stamp and here.blocks == node.blocks

    def add(self, node: Node, vectors: Vectors) -> Node:
        """Offer a node to lookups now and make it durable soon; returns it as it was added. Its
        blocks are in a tier.

        One that is here already stays as it is, and so does its row, and that one is returned: the
        beginning of another prompt may have become this one meanwhile.
        """
        with self.lock:
            here = self.tree.get(node.id)
            if here is not None:
                self.tree.touch(node.id)
                self.remove_unused(node.blocks)
                return here
            node = self._insert(node, vectors)
            self._commit(node, vectors)
            self._hold_count()
            self.hold_quota(node.namespace, newest=node.id)
            return node

    def _commit(self, node: Node, vectors: Vectors) -> None:
        self._uncommitted[node.id] = node.stamp
        self.queue.put(Addition(node, vectors))

    def committed(self, nodes: Iterable[Node]) -> None:
        """The additions of these nodes are done, or have failed: they count for `max_nodes`. One
        that was removed and saved again meanwhile waits for its second addition."""
        with self.lock:
            for node in nodes:
                if self._uncommitted.get(node.id) == node.stamp:
                    del self._uncommitted[node.id]
            if self._shared:
                self.drop_excess()

    def _hold_count(self) -> None:
        if self._shared:
            self.drop_excess()
        else:
            self.evict(max(0, len(self.tree) - self._config.max_nodes))

    def _insert(self, node: Node, vectors: Vectors, idle: float = 0.0) -> Node:
        node = self.state.insert(node, vectors, idle)
        self._weigh([node])
        return node

    def _weigh(self, nodes: Iterable[Node]) -> None:
        """Tell `blocks` how many nodes use the blocks of these."""
        for node in nodes:
            for name in filter(self.blocks.weighs, node.blocks):
                self.blocks.weigh(name, self.tree.user_count(name))

    def add_again(self, nodes: Iterable[Node]) -> None:
        """Repeat commits that a shared catalogue has lost."""
        with self.lock:
            for node in nodes:
                if node.id in self.tree:
                    self._commit(node, Vectors(lexical_vector(node.tokens), None))

    def replace(self, node: Node, changed: Node) -> list[str] | None:
        """Replace a node by another form of it whose row is committed. Returns the blocks that no
        node uses any more, or None if the node was removed or changed meanwhile or a block is gone;
        then what must happen to the row is queued already."""
        with self.lock:
            complete = all(self.blocks.tier_of(name) for name in changed.blocks)
            if self.tree.get(node.id) is not node or not complete:
                return None
            return list(self.state.replace(node, changed).unused)

    def used(self, node: Node) -> None:
        """A node was used just now; that is not noted of a pool's, where nothing changes by what
        tenants do. Hold the lock."""
        if not self.pooled(node):
            self.tree.touch(node.id)

    def pooled(self, node: Node) -> bool:
        """Whether a node is of a pool."""
        known = self.namespaces.get(node.namespace)
        return known is not None and bool(known.pool)

    def reserve(self, nbytes: int) -> Reserved:
        """See `BufferPool.reserve`. Where no tier is below, the nodes of blocks that had to go are
        removed."""
        with self.lock:
            try:
                return self.blocks.pool.reserve(nbytes)
            finally:
                self.remove_lost()

    # --- nodes go ----------------------------------------------------------------------------

    def drop(self, ids: Iterable[str]) -> Change:
        """Take nodes out of memory only. The caller decides about their rows and blocks."""
        with self.lock:
            change = self.state.remove(ids)
            self._weigh(change.nodes)
            return change

    def shorten(self, node: Node, nbytes: int) -> Change:
        """Free so many bytes at the end of a node, or drop it (`NodeState.shorten`). What is left
        of it is queued. Where other machines have the node too, it is dropped."""
        with self.lock:
            if self._shared:
                return self.drop([node.id])
            change, shorter = self.state.shorten(node, nbytes, self._config.min_prompt_tokens)
            self._weigh([node])
            vectors = None if shorter is None else self.state.vectors(shorter)
            if shorter is not None and vectors is not None:
                self._commit(shorter, vectors)
            return change

    def remove(self, ids: Iterable[str], *, whatever: bool = False, instead: str = "") -> int:
        """Remove nodes from memory now, from catalogue and tiers a little later; returns how many.

        In a shared catalogue, rows stay that another machine has pinned, merged or saved again
        meanwhile. `whatever` removes those too. `instead`: the node that takes their place; they
        come back if it cannot be made durable.
        """
        with self.lock:
            gone = self.drop(ids).nodes
            if gone:
                self.queue.put(self.removal(gone, whatever=whatever)._replace(instead=instead))
            return len(gone)

    def forget(self, node: Node) -> bool:
        """As `remove`, but only if the node is here in this form; whether it was."""
        with self.lock:
            return self.has(node) and bool(self.remove([node.id]))

    def removal(self, nodes: Sequence[Node], *, whatever: bool = False) -> Removal:
        """The removal of rows in the form that this machine knows, or of `whatever` form, and then
        of the blocks that no node uses by then. It must be queued. Until `removed` these blocks are
        `named`, and nobody learns these rows. Hold the lock."""
        stamps = tuple(node.stamp for node in nodes) if self._shared and not whatever else ()
        blocks = tuple(name for node in nodes for name in node.blocks)
        ids = tuple(node.id for node in nodes)
        removal = Removal(ids, blocks, stamps, number=next(self._numbers))
        self._named.update(blocks)
        self._waiting.add(removal.number)
        if self._shared:
            self._leaving.update(_rows_of(removal))
        return removal

    def named(self, block: str) -> bool:
        """Whether a row names the block whose node has left memory and whose removal is queued."""
        return block in self._named

    def removed(self, removals: Iterable[Removal]) -> None:
        """No row names the blocks of these removals any more, or its node is back. To say so again
        changes nothing."""
        with self.lock:
            for removal in removals:
                if removal.number in self._waiting:
                    self._waiting.remove(removal.number)
                    _take_off(self._named, removal.blocks)
                    if self._shared:
                        _take_off(self._leaving, _rows_of(removal))

    def remove_unused(self, names: Iterable[str]) -> None:
        """Remove those of the blocks that no node uses."""
        with self.lock:
            unused = tuple(name for name in names if not self.tree.uses(name))
            if unused:
                self.queue.put(Removal((), unused))

    def remove_lost(self, names: Sequence[str] = ()) -> None:
        """Blocks are missing or damaged: `names`, and those that the tiers have lost and that were
        not saved again since. The nodes that use them are removed in the same moment."""
        with self.lock:
            gone = [n for n in self.blocks.pool.take_lost() if self.blocks.tier_of(n) is None]
            lost = [*names, *gone]
            if lost:
                self.remove([user for name in lost for user in self.tree.users(name)])

    # --- which go first ----------------------------------------------------------------------

    def evict(self, nodes: int, namespace: str | None = None) -> int:
        """Remove the nodes worth least, or all of one namespace, pinned or not; returns how many.

        Pinned nodes go only with their namespace.
        """
        if nodes < 0:
            raise ConfigError(f"cannot evict {nodes} nodes")
        with self.lock:
            if namespace is None:
                chosen = list(islice(self.tree.victims(), nodes))
            else:
                chosen = self.state.of_namespace(namespace)
            return self.remove([node.id for node in chosen], whatever=namespace is not None)

    def drop_excess(self) -> None:
        """Keep `max_nodes` with a shared catalogue, where it only bounds this machine's memory: the
        rows stay for the other machines. A node without a row would be lost: it stays until it has
        one."""
        with self.lock:
            excess = max(0, len(self.tree) - self._config.max_nodes)
            if excess:
                known = (n.id for n in self.tree.victims() if n.id not in self._uncommitted)
                self.remove_unused(self.drop(list(islice(known, excess))).unused)

    def hold_quota(self, namespace: str, newest: str = "") -> int:
        """Shorten or remove nodes of a namespace until it is within its quota, some of them in one
        call; returns how many.

        The newest is removed only if it alone is over the quota. With a shared catalogue only nodes
        go that no machine has used for a while.
        """
        gone = 0
        with self.lock:
            while gone < _STEPS and self._over_quota(namespace):
                victims = filter(self._quiet, self.tree.victims(namespace))
                victim = next((node for node in victims if node.id != newest), None)
                if victim is not None:
                    self._give_up(victim)
                elif newest in self.tree and not self._shared:
                    self._metrics.error(NoSpaceError.kind)
                    self.remove([newest])
                else:
                    break  # what is left is pinned, or others may be using it
                gone += 1
        return gone

    def _give_up(self, victim: Node) -> None:
        """Shorten a node by what its namespace has too many bytes, or else remove it."""
        quota = self.limits.of(self.namespaces.get(victim.namespace)).namespace_bytes
        excess = self.tree.bytes_of(victim.namespace) - quota
        if not quota or excess <= 0:
            self.remove([victim.id])
            return
        change = self.shorten(victim, excess)
        self.queue.put(self.removal(change.nodes))

    def _over_quota(self, namespace: str) -> bool:
        limits = self.limits.of(self.namespaces.get(namespace))
        nbytes, count = limits.namespace_bytes, limits.namespace_nodes
        too_large = 0 < nbytes < self.tree.bytes_of(namespace)
        return too_large or 0 < count < self.tree.count_of(namespace)

    def _quiet(self, node: Node) -> bool:
        """Whether it is certain that no machine used the node lately: uses are written down
        late."""
        return not self._late_s or self.tree.idle_for(node.id) >= self._late_s

    # --- other machines ----------------------------------------------------------------------

    def learn(
        self,
        namespaces: Iterable[Namespace],
        rows: Iterable[tuple[Node, Vectors]],
        known: Mapping[str, int],
        used: Mapping[str, float] = _NOTHING,
    ) -> None:
        """Rows that others have committed to a shared catalogue: from now on they can be donors.

        A node that is here takes the form of its row if it has the stamp that the row had before
        (`known`). Otherwise a change of this machine is on its way to the catalogue, and so is the
        removal of a row that this machine gave up. The others were last `used` at these moments
        (seconds since 1970), or when they were made.
        """
        with self.lock:
            self.namespaces.recorded(namespaces)
            for node, vectors in rows:
                here = self.tree.get(node.id)
                ours = here is not None and here.stamp != known.get(node.id)
                if not ours and not self._is_leaving(node) and self._open(node):
                    last = max(node.created, used.get(node.id, 0.0))
                    idle = time.time() - last if here is None else self.tree.idle_for(node.id)
                    self._adopt(node, vectors, max(0.0, idle))
            self._hold_count()

    def _is_leaving(self, node: Node) -> bool:
        """Whether the row of a node, in this form, is about to be removed."""
        return (node.id, node.stamp) in self._leaving or (node.id, _ANY) in self._leaving

    def _open(self, node: Node) -> bool:
        return node.namespace not in self.namespaces.closed

    def take_back(self, rows: Iterable[tuple[Node, Vectors]]) -> None:
        """Nodes whose place another one took, and could not keep, are here again."""
        with self.lock:
            for node, vectors in rows:
                if node.id not in self.tree and self._open(node):
                    self._adopt(node, vectors, 0.0)
            self._hold_count()

    def _adopt(self, node: Node, vectors: Vectors, idle: float) -> None:
        """The row counts: what this machine had of the node is dropped."""
        unused = self.drop([node.id]).unused
        self.blocks.expect(node.blocks, node.namespace)
        self._insert(node, vectors, idle)
        self.remove_unused(unused)

    def learn_removals(self, gone: Mapping[str, int]) -> None:
        """Rows (stamps by id) that others have removed. This machine's nodes go too, unless they
        were saved again meanwhile."""
        with self.lock:
            here = [i for i, stamp in gone.items() if (n := self.tree.get(i)) and n.stamp == stamp]
            unused = self.drop(here).unused
            self.blocks.doubt_shared(unused)
            self.remove_unused(unused)


def _rows_of(removal: Removal) -> Iterable[tuple[str, int]]:
    """Ids and stamps of the rows that go."""
    return zip(removal.nodes, removal.stamps or repeat(_ANY), strict=False)


def _take_off(counts: Counter[T], items: Iterable[T]) -> None:
    """Count each of the items once less, and forget those of which none is left."""
    items = list(items)
    counts.subtract(items)
    for item in {item for item in items if counts[item] <= 0}:
        del counts[item]
