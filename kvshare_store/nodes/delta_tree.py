"""The DELTA tree in memory: nodes, their children, and which nodes use which block."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import msgspec

from kvshare_store.nodes.block_users import BlockUsers
from kvshare_store.nodes.last_uses import LastUses
from kvshare_store.nodes.node import Node

_SAME_S = 1.0
"""Uses that lie no further apart are one: what this machine wrote down comes back by another
clock."""


class DeltaTree:
    """Metadata only. Not thread-safe by itself: the Store holds its lock."""

    def __init__(self, *, quotas: bool = True) -> None:
        """`quotas`: whether victims of a single namespace are asked for."""
        self.clock: Callable[[], float] = time.monotonic
        self._nodes: dict[str, Node] = {}
        self._children: defaultdict[str, set[str]] = defaultdict(set)
        self._blocks = BlockUsers(self._nodes.get)
        self._counts: Counter[str] = Counter()
        """Nodes of each namespace."""
        self._used = LastUses()
        """By `clock`; least recently used first."""
        self._used_in: dict[str, LastUses] | None = None
        """The same order within each namespace."""
        if quotas:
            self._used_in = defaultdict(LastUses)
        self._inherited: set[str] = set()
        """Beginnings that have the last use of the node whose place they took, until it is written
        down under their own ids."""

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._nodes

    def __iter__(self) -> Iterator[Node]:
        """The least recently used node first."""
        return iter([self._nodes[node_id] for node_id in self._used])

    def get(self, node_id: str) -> Node | None:
        """The node, or None."""
        return self._nodes.get(node_id)

    # --- changes -----------------------------------------------------------------------------

    def add(self, node: Node, idle: float = 0.0) -> None:
        """Insert a node that was last used `idle` seconds ago; a known one is only used again."""
        if node.id in self._nodes:
            self.touch(node.id)
            return
        self._blocks.enter(node)
        self._nodes[node.id] = node
        self._counts[node.namespace] += 1
        at = self.clock() - idle
        self._used.add(node.id, at)
        if self._used_in is not None:
            self._used_in[node.namespace].add(node.id, at)
        if node.parent is not None:
            self._children[node.parent].add(node.id)

    def fill(self, nodes: Iterable[tuple[Node, float]]) -> None:
        """Insert the first nodes, with the seconds since their last use. Of several with the same
        id the first one counts."""
        now = self.clock()
        used: dict[str, float] = {}
        for node, idle in nodes:
            if self._nodes.setdefault(node.id, node) is node:
                self._counts[node.namespace] += 1
                used[node.id] = now - idle
        for node_id in sorted(used, key=used.__getitem__):
            self._used.add(node_id, used[node_id])
        for node_id in self._used:
            self._nodes[node_id] = self.rooted(self._nodes[node_id])
        found = list(self)
        for node in found:
            if node.parent is not None:
                self._children[node.parent].add(node.id)
            if self._used_in is not None:
                self._used_in[node.namespace].add(node.id, used[node.id])
        self._blocks.fill(found)

    def rooted(self, node: Node) -> Node:
        """The node, without its parent if that descends from it.

        Ids come from prompts. A node that was evicted and is saved again from what was once its own
        child would otherwise be its own ancestor.
        """
        seen: set[str] = set()
        at = node.parent
        while at is not None and at not in seen:
            if at == node.id:
                return msgspec.structs.replace(node, parent=None, edits=())
            seen.add(at)
            above = self._nodes.get(at)
            at = above.parent if above is not None else None
        return node

    def remove(self, node_id: str) -> tuple[Node, list[str]] | None:
        """Remove a node; returns it, and the blocks that no node uses any more."""
        node = self._nodes.pop(node_id, None)
        if node is None:
            return None
        self._inherited.discard(node_id)
        self._used.remove(node_id)
        if self._used_in is not None:
            self._used_in[node.namespace].remove(node_id)
        self._counts[node.namespace] -= 1
        if not self._counts[node.namespace]:
            del self._counts[node.namespace]
            if self._used_in is not None:
                del self._used_in[node.namespace]
        if node.parent is not None:
            self._children[node.parent].discard(node_id)
            if not self._children[node.parent]:
                del self._children[node.parent]
        self._blocks.forget(node_id)
        return node, self._blocks.leave(node)

    def replace(self, node: Node) -> list[str]:
        """Replace a node by one with the same id, parent and prompt. Returns the blocks that no
        node uses any more. `KeyError` if there is no such node."""
        old = self._nodes[node.id]
        self._blocks.enter(node)
        self._nodes[node.id] = node
        return self._blocks.leave(old, set(node.blocks))

    def shorten(self, node_id: str, beginning: Node) -> list[str]:
        """Let the beginning of a node take its place, as long unused. Returns the blocks that no
        node uses any more. `KeyError` if there is no such node."""
        self.add(beginning)
        self._used.swap(node_id, beginning.id)
        if self._used_in is not None:
            self._used_in[beginning.namespace].swap(node_id, beginning.id)
        self._inherited.add(beginning.id)
        removed = self.remove(node_id)
        return removed[1] if removed is not None else []

    def touch(self, node_id: str) -> None:
        """The node was used just now."""
        node = self._nodes.get(node_id)
        if node is not None:
            self._use(node, self.clock())

    def _use(self, node: Node, at: float) -> None:
        self._used.use(node.id, at)
        if self._used_in is not None:
            self._used_in[node.namespace].use(node.id, at)

    # --- who goes first ----------------------------------------------------------------------

    def order_namespaces(self) -> None:
        """From now on somebody asks for the victims of one namespace."""
        if self._used_in is None:
            self._used_in = defaultdict(LastUses)
            for node_id, at in self._used.items():
                self._used_in[self._nodes[node_id].namespace].add(node_id, at)

    def victims(self, namespace: str | None = None) -> Iterator[Node]:
        """Nodes in the order in which they should be forgotten: those used longest ago first,
        pinned ones never. Change nothing while you walk. Of one namespace: only with `quotas`."""
        ids: Iterable[str] = self._used
        if namespace is not None:
            ids = (self._used_in or {}).get(namespace, ())
        found = (self._nodes[node_id] for node_id in ids)
        return (node for node in found if not node.pinned)

    def idle(self, seconds: float) -> list[str]:
        """Nodes that were not used for so long, except pinned ones."""
        before = self.clock() - seconds
        return [i for i, at in self._used.items() if at <= before and not self._nodes[i].pinned]

    def idle_for(self, node_id: str) -> float:
        """Seconds since the node was last used; negative if it is not here or is pinned."""
        node = self._nodes.get(node_id)
        return -1.0 if node is None or node.pinned else self.clock() - self._used.of(node_id)

    def used_within(self, seconds: float) -> list[tuple[Node, float]]:
        """Nodes that were used in the last `seconds`, and how long ago; and beginnings that took
        the place of another node, until that is `written_down`."""
        now = self.clock()
        since, new = now - seconds, self._inherited
        found = [(i, at) for i, at in self._used.items() if at > since or i in new]
        return [(self._nodes[i], now - at) for i, at in found]

    def written_down(self, ids: Iterable[str]) -> None:
        """The last uses of these nodes are known to whoever starts next."""
        self._inherited.difference_update(ids)

    def used_before(self, node_id: str, idle: float) -> None:
        """Another machine used the node `idle` seconds ago."""
        at = self.clock() - idle
        node = self._nodes.get(node_id)
        if node is not None and self._used.of(node_id) < at - _SAME_S:
            self._use(node, at)

    def bytes_of(self, namespace: str) -> int:
        """Bytes of the rows in the blocks of a namespace, each block once."""
        return self._blocks.bytes[namespace]

    def count_of(self, namespace: str) -> int:
        """Nodes of a namespace, pinned ones too."""
        return self._counts[namespace]

    def namespaces(self) -> list[str]:
        """Digests of the namespaces that have blocks."""
        return [digest for digest, nbytes in self._blocks.bytes.items() if nbytes]

    # --- questions ---------------------------------------------------------------------------

    def children(self, node_id: str) -> list[str]:
        """Nodes with this parent, even if the parent itself is gone."""
        return sorted(self._children.get(node_id, ()))

    def users(self, block: str) -> set[str]:
        """Nodes with rows in the block."""
        return set(self._blocks.of(block))

    def user_count(self, block: str) -> int:
        """How many nodes have rows in the block."""
        return len(self._blocks.of(block))

    def uses(self, block: str) -> bool:
        """Whether any node has rows in the block."""
        return bool(self._blocks.of(block))

    def blocks(self) -> set[str]:
        """Blocks that any node uses."""
        return {name for node in list(self._nodes.values()) for name in node.blocks}

    @property
    def block_count(self) -> int:
        """Number of blocks that any node uses."""
        return len(self._blocks)

    def newest(self, count: int) -> list[Node]:
        """The most recently used nodes, newest first."""
        newest = islice(reversed(self._used), max(0, min(count, len(self._used))))
        return [self._nodes[node_id] for node_id in newest]

    def path(self, node_id: str) -> list[Node]:
        """The chain from the oldest ancestor that is still here down to the node."""
        seen: dict[str, Node] = {}
        at = self._nodes.get(node_id)
        while at is not None and at.id not in seen:
            seen[at.id] = at
            at = self._nodes.get(at.parent) if at.parent is not None else None
        return list(seen.values())[::-1]

    def chain(self, node_id: str) -> int:
        """Number of edited nodes in the chain that ends here, since rows were last merged."""
        length = 0
        for node in reversed(self.path(node_id)):
            if node.exact or node.merged:
                break
            length += 1
        return length
