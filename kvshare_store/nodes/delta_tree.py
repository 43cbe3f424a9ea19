"""The DELTA tree in memory: nodes, their children, and which nodes use which block."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import msgspec

from kvshare_store.blocks.eviction import LRU, EvictionPolicy
from kvshare_store.nodes.block_users import BlockUsers
from kvshare_store.nodes.node import Node


class DeltaTree:
    """Metadata only. Not thread-safe by itself: the Store holds its lock."""

    def __init__(
        self,
        make_policy: Callable[[], EvictionPolicy] = LRU,
        clock: Callable[[], float] = time.monotonic,
        *,
        quotas: bool = True,
    ) -> None:
        """`quotas`: whether anybody asks for the victims of one namespace."""
        self.clock = clock
        self._nodes: dict[str, Node] = {}
        self._children: defaultdict[str, set[str]] = defaultdict(set)
        self._blocks = BlockUsers(self._nodes.get)
        self._used: dict[str, float] = {}
        """When each node was last used, by `clock`, the longest ago first."""
        self._order = make_policy()
        self._orders: defaultdict[str, EvictionPolicy] | None = None
        """The same order within each namespace."""
        if quotas:
            self._orders = defaultdict(make_policy)

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
        sharing = self._blocks.enter(node)
        self._nodes[node.id] = node
        self._used[node.id] = self.clock() - idle
        if node.parent is not None:
            self._children[node.parent].add(node.id)
        self._rank_again(sharing)
        self._rank(node)

    def fill(self, nodes: Iterable[tuple[Node, float]]) -> None:
        """Insert the first nodes, with the seconds since their last use. Of several with one id
        the first counts."""
        now = self.clock()
        used: dict[str, float] = {}
        for node, idle in nodes:
            if self._nodes.setdefault(node.id, node) is node:
                used[node.id] = now - idle
        for node_id in sorted(used, key=used.__getitem__):
            self._used[node_id] = used[node_id]
        for node_id in self._used:
            self._nodes[node_id] = self.rooted(self._nodes[node_id])
        found = list(self)
        for node in found:
            if node.parent is not None:
                self._children[node.parent].add(node.id)
        for node, freed in zip(found, self._blocks.fill(found), strict=True):
            for order in self._orders_of(node):
                order.add(node.id, freed, _cost(node, freed))

    def rooted(self, node: Node) -> Node:
        """The node, without its parent where that descends from it.

        Ids come from the prompts: one that was evicted and is saved again from what was once its
        own child would else be its own ancestor.
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
        """Take a node out; returns it and the blocks that nobody uses any more."""
        node = self._nodes.pop(node_id, None)
        if node is None:
            return None
        del self._used[node_id]
        self._unrank(node)
        if node.parent is not None:
            self._children[node.parent].discard(node_id)
            if not self._children[node.parent]:
                del self._children[node.parent]
        self._blocks.forget(node_id)
        unused, alone = self._blocks.leave(node)
        self._rank_again(alone)
        return node, unused

    def replace(self, node: Node) -> list[str]:
        """Let a node of the same id, parent and prompt take the place of the one that is here.

        Returns the blocks that nobody uses any more. `KeyError` if no such node is here.
        """
        old = self._nodes[node.id]
        sharing = self._blocks.enter(node)
        self._nodes[node.id] = node
        unused, alone = self._blocks.leave(old, set(node.blocks))
        self._rank_again(sharing | alone)
        if node.pinned:
            self._unrank(old)
        self._rank(node)
        return unused

    def touch(self, node_id: str) -> None:
        """The node was used just now."""
        node = self._nodes.get(node_id)
        if node is not None:
            self._use(node, self.clock())

    def _use(self, node: Node, at: float) -> None:
        self._used.pop(node.id)
        self._used[node.id] = at  # last
        for order in self._orders_of(node):
            order.touch(node.id)

    # --- who goes first ----------------------------------------------------------------------

    def freed(self, node: Node) -> int:
        """Bytes of the blocks that only this node uses."""
        return self._blocks.freed(node)

    def _orders_of(self, node: Node) -> Iterator[EvictionPolicy]:
        if not node.pinned:
            yield self._order
            if self._orders is not None:
                yield self._orders[node.namespace]

    def _rank(self, node: Node) -> None:
        """What forgetting it loses, against the bytes that it frees."""
        freed = 0 if node.pinned else self.freed(node)
        for order in self._orders_of(node):
            order.add(node.id, freed, _cost(node, freed))

    def _rank_again(self, ids: Iterable[str]) -> None:
        for node_id in ids:
            if node_id in self._order:
                self._rank(self._nodes[node_id])

    def _unrank(self, node: Node) -> None:
        self._order.remove(node.id)
        if self._orders is not None:
            self._orders[node.namespace].remove(node.id)
            if not len(self._orders[node.namespace]):
                del self._orders[node.namespace]

    def victims(self, namespace: str | None = None) -> Iterator[Node]:
        """Nodes in the order in which they should be forgotten; pinned ones never are. Of one
        namespace: only with `quotas`."""
        order: EvictionPolicy | None = self._order
        if namespace is not None:
            order = None if self._orders is None else self._orders.get(namespace)
        return (self._nodes[node_id] for node_id in (order.victims() if order is not None else ()))

    def idle(self, seconds: float) -> list[str]:
        """Nodes that nobody used for so long; no pinned ones."""
        before = self.clock() - seconds
        return [i for i, at in self._used.items() if at <= before and not self._nodes[i].pinned]

    def idle_for(self, node_id: str) -> float:
        """Seconds since the node was last used; less than zero if it is not here or pinned."""
        node = self._nodes.get(node_id)
        return -1.0 if node is None or node.pinned else self.clock() - self._used[node_id]

    def used_within(self, seconds: float) -> list[tuple[Node, float]]:
        """Nodes that were used in the last `seconds`, and how long ago."""
        now = self.clock()
        since = now - seconds
        return [(self._nodes[i], now - at) for i, at in self._used.items() if at > since]

    def used_before(self, node_id: str, idle: float) -> None:
        """The node was used `idle` seconds ago, by somebody else."""
        at = self.clock() - idle
        if self._used.get(node_id, at) < at:
            self._use(self._nodes[node_id], at)

    def bytes_of(self, namespace: str) -> int:
        """Bytes of the rows in the blocks of a namespace, each block once."""
        return self._blocks.bytes[namespace]

    def size(self, block: str) -> int | None:
        """Bytes of the rows of a block; None if no node uses it."""
        return self._blocks.size(block)

    def namespaces(self) -> list[str]:
        """Digests of the namespaces that have blocks."""
        return [digest for digest, nbytes in self._blocks.bytes.items() if nbytes]

    # --- questions ---------------------------------------------------------------------------

    def children(self, node_id: str) -> list[str]:
        """Nodes whose parent this is, also when the parent itself is gone."""
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
        """Blocks that some node points at."""
        return {name for node in list(self._nodes.values()) for name in node.blocks}

    @property
    def block_count(self) -> int:
        """How many blocks some node points at."""
        return len(self._blocks)

    def newest(self, count: int) -> list[Node]:
        """The nodes used last, the newest first."""
        newest = islice(reversed(self._used), max(0, min(count, len(self._used))))
        return [self._nodes[node_id] for node_id in newest]

    def path(self, node_id: str) -> list[Node]:
        """From the oldest ancestor that is still here down to the node."""
        seen: dict[str, Node] = {}
        at = self._nodes.get(node_id)
        while at is not None and at.id not in seen:
            seen[at.id] = at
            at = self._nodes.get(at.parent) if at.parent is not None else None
        return list(seen.values())[::-1]

    def chain(self, node_id: str) -> int:
        """How many edited nodes in a row end here, up to where rows were last gathered."""
        length = 0
        for node in reversed(self.path(node_id)):
            if node.exact or node.merged:
                break
            length += 1
        return length


def _cost(node: Node, freed: int) -> float:
    """What is lost with a node: its rows that no other node uses, each as dear as any other. Where
    others use all of them it frees nothing, and they go first."""
    return float(freed or node.length)
