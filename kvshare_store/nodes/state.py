"""The nodes in memory: the DELTA tree, what nominates donors, and the namespaces.

Nothing here knows a disk, a thread or a block's bytes. A change says what it has left to do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from kvshare_store.nodes.beginning import beginning
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.index import NamespaceIndex
from kvshare_store.nodes.namespaces import Namespaces
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.prefix_chain import CHAIN_RUN
from kvshare_store.nodes.vectors import Vector, Vectors, lexical_vector


class Change(NamedTuple):
    """What a change has left to do: the nodes that are gone, or were there before in another form,
    and the blocks that no node uses any more."""

    nodes: tuple[Node, ...] = ()
    unused: tuple[str, ...] = ()


class NodeState:
    """Nodes of every namespace. Whoever changes them, or looks twice, holds `lock`."""

    def __init__(self, block_tokens: int, *, quotas: bool = True) -> None:
        """`quotas`: whether anybody asks for the victims of one namespace."""
        self.lock = threading.RLock()
        self.tree = DeltaTree(quotas=quotas)
        self.namespaces = Namespaces()
        self._run = min(block_tokens, CHAIN_RUN)
        self._indexes: dict[str, NamespaceIndex] = {}

    # --- questions ---------------------------------------------------------------------------

    def index(self, namespace: str) -> NamespaceIndex | None:
        """What nominates donors in a namespace; None for one without nodes, which costs nothing."""
        return self._indexes.get(namespace)

    def vectors(self, node: Node) -> Vectors | None:
        """The vectors of a node; None if it is not here."""
        index = self.index(node.namespace)
        lexical = None if index is None else index.lexical.get(node.id)
        if index is None or lexical is None:
            return None
        return Vectors(lexical, index.semantic.get(node.id))

    def users(self, block: str) -> list[Node]:
        """Nodes with rows in a block."""
        found = (self.tree.get(user) for user in self.tree.users(block))
        return [node for node in found if node is not None]

    def of_namespace(self, namespace: str) -> list[Node]:
        """Every node of a namespace."""
        return [node for node in self.tree if node.namespace == namespace]

    # --- changes -----------------------------------------------------------------------------

    def insert(self, node: Node, vectors: Vectors, idle: float = 0.0) -> Node:
        """Offer a node, last used `idle` seconds ago, to lookups; returns it as it is here."""
        node = self.tree.rooted(node)
        self.tree.add(node, idle)
        self._index_of(node.namespace).add(node, vectors)
        return node

    def fill(self, rows: Mapping[str, Sequence[tuple[Node, Vectors]]]) -> None:
        """Index rows by namespace, of the first nodes; `settle` and `enter` follow."""
        for namespace, some in rows.items():
            self._index_of(namespace).extend(some)

    def settle(self) -> None:
        """Do now what the first question after `fill` would wait for."""
        for index in self._indexes.values():
            index.settle()

    def enter(self, nodes: Iterable[tuple[Node, float]]) -> None:
        """The nodes that `fill` brought the rows of, and the seconds since their last use. May run
        beside `settle`."""
        self.tree.fill(nodes)

    def _index_of(self, namespace: str) -> NamespaceIndex:
        index = self._indexes.get(namespace)
        if index is None:
            index = self._indexes[namespace] = NamespaceIndex(self._run)
        return index

    def describe(self, vectors: Mapping[str, Vector]) -> None:
        """Text vectors of nodes, by id; those of nodes that left are ignored."""
        for node_id, vector in vectors.items():
            node = self.tree.get(node_id)
            index = None if node is None else self.index(node.namespace)
            if index is not None:
                index.semantic.add(node_id, vector)

    def remove(self, ids: Iterable[str]) -> Change:
        """Take nodes out; those that are not here are ignored."""
        removed: list[Node] = []
        unused: list[str] = []
        for node_id in ids:
            gone = self.tree.remove(node_id)
            if gone is not None:
                removed.append(gone[0])
                unused += gone[1]
                self._unindex(gone[0])
        return Change(tuple(removed), tuple(unused))

    def shorten(self, node: Node, nbytes: int, least: int) -> tuple[Change, Node | None]:
        """Free so many bytes of rows at the end of an exact node, as a prefix cache does: its
        beginning, which is returned too, takes its place. The node is removed if it is not exact,
        if its beginning would have fewer than `least` rows, or none that others lack."""
        shorter = beginning(node, nbytes, self.tree.user_count) if node.exact else None
        if shorter is None or shorter.length < least or shorter.id in self.tree:
            return self.remove([node.id]), None
        unused = self.tree.shorten(node.id, shorter)
        self._unindex(node)
        vectors = Vectors(lexical_vector(shorter.tokens), None)
        self._index_of(node.namespace).add(shorter, vectors)
        return Change((node,), tuple(unused)), shorter

    def _unindex(self, node: Node) -> None:
        index = self._indexes.get(node.namespace)
        if index is not None:
            index.remove(node)
            if not len(index):
                del self._indexes[node.namespace]

    def replace(self, node: Node, changed: Node) -> Change:
        """Let another form of a node take its place: the same id, parent and prompt."""
        return Change((node,), tuple(self.tree.replace(changed)))

    def remove_namespace(self, digest: str) -> None:
        """Nothing of the namespace is left."""
        with self.lock:
            self.namespaces.remove(digest)
            self._indexes.pop(digest, None)
