"""The DELTA tree in memory: nodes, their children, and which nodes use which block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from kvshare_store.blocks.eviction import LRU
from kvshare_store.tree.node import Node


class DeltaTree:
    """Metadata only. Not thread-safe by itself: the Store holds its lock."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._children: defaultdict[str, set[str]] = defaultdict(set)
        self._users: defaultdict[str, set[str]] = defaultdict(set)
        self._order = LRU()

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._nodes

    def __iter__(self) -> Iterator[Node]:
        """The least recently used node first."""
        return iter([self._nodes[node_id] for node_id in self._order])

    def get(self, node_id: str) -> Node | None:
        """The node, or None."""
        return self._nodes.get(node_id)

    def add(self, node: Node) -> None:
        """Insert a node; adding it again only counts as a use."""
        self._order.touch(node.id)
        if node.id in self._nodes:
            return
        self._nodes[node.id] = node
        if node.parent is not None:
            self._children[node.parent].add(node.id)
        for name in node.blocks:
            self._users[name].add(node.id)

    def remove(self, node_id: str) -> tuple[Node, list[str]] | None:
        """Take a node out; returns it and the blocks that nobody uses any more."""
        node = self._nodes.pop(node_id, None)
        if node is None:
            return None
        self._order.remove(node_id)
        if node.parent is not None:
            self._children[node.parent].discard(node_id)
            if not self._children[node.parent]:
                del self._children[node.parent]
        unused = []
        for name in dict.fromkeys(node.blocks):
            self._users[name].discard(node_id)
            if not self._users[name]:
                del self._users[name]
                unused.append(name)
        return node, unused

    def touch(self, node_id: str) -> None:
        """The node was used just now."""
        if node_id in self._nodes:
            self._order.touch(node_id)

    def children(self, node_id: str) -> list[str]:
        """Nodes whose parent this is, also when the parent itself is gone."""
        return sorted(self._children.get(node_id, ()))

    def users(self, block: str) -> set[str]:
        """Nodes with rows in the block."""
        return set(self._users.get(block, ()))

    def blocks(self) -> set[str]:
        """Blocks that some node points at."""
        return set(self._users)

    def path(self, node_id: str) -> list[Node]:
        """From the oldest ancestor that is still here down to the node."""
        path: list[Node] = []
        at = self._nodes.get(node_id)
        while at is not None and at not in path:
            path.append(at)
            at = self._nodes.get(at.parent) if at.parent is not None else None
        return path[::-1]
