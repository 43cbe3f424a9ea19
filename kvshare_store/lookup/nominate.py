"""Which stored prompts may be donors: immutable nodes, looked up under the store's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain

from kvshare_store.namespace import Namespace
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.grams import Hashes, anchors
from kvshare_store.nodes.index import NamespaceIndex
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import Vector

_ANCHORS = 256
"""Anchors of a request that are looked up, at most."""
_FLOOR = 0.02
"""Lexical cosines below this are chance."""

Rank = Callable[[Node], int]
"""Of two donors that seem to have about as much the planner takes the first: that of the lower
number."""


class Nominator:
    """The donors of one namespace. Each question holds the lock only while it looks ids up; hashes
    are computed before. Nodes do not change, so whoever has one needs no lock."""

    def __init__(
        self,
        tree: DeltaTree,
        index: NamespaceIndex | None,
        lock: threading.RLock | None = None,
        rank: Rank | None = None,
    ) -> None:
        """`index`: None for a namespace without nodes. `lock`: None where one thread does all.
        `rank`: which nodes are named before others."""
        self._tree = tree
        self._index = index
        self._lock = lock or threading.RLock()
        self._rank = rank
        self._asked: tuple[Vector | None, int, list[tuple[str, float]]] = None, 0, []
        """The last vector, how many were asked for, and the nearest."""

    def __bool__(self) -> bool:
        """Whether there is any node."""
        return self._index is not None and len(self._index) > 0

    def rank(self, node: Node) -> int:
        """The node's rank; 0 where all are alike."""
        return 0 if self._rank is None else self._rank(node)

    def by_prefix(self, tokens: Tokens, policies: Collection[str] = ()) -> list[Node]:
        """Nodes that may share the longest prefix with `tokens`, the newest first: of exact rows,
        and for each of `policies` of rows that were made under it."""
        index = self._index
        if index is None:
            return []
        hashes = index.chain.hashes(tokens)
        with self._lock:
            edited = [chain for name in policies if (chain := index.edited.get(name)) is not None]
            found = [chain.nominate(hashes) for chain in (index.chain, *edited)]
            return self._nodes(dict.fromkeys(node_id for ids in found for node_id in ids))

    def by_passages(self, hashes: Hashes, count: int) -> list[Node]:
        """Long prompts with the same passages, that with most of them first. `hashes`: of the grams
        of what is sought, of which only anchors count."""
        if self._index is None or not len(self._index.passages):
            return []
        keys = anchors(hashes)
        keys = keys[:: 1 + len(keys) // _ANCHORS]
        with self._lock:
            return self._nodes(self._index.passages.most_often(keys, count, count))

    def by_words(self, vector: Vector, count: int, most: int = 0) -> list[Node]:
        """Nodes with similar token n-grams, the most similar first. Who may ask for more with the
        same vector says how many at most: all vectors are compared only once."""
        if self._index is None:
            return []
        if vector is not self._asked[0] or count > self._asked[1]:
            most = max(count, most)
            self._asked = vector, most, self._index.lexical.nearest(vector, most)
        found = self._asked[2][:count]
        with self._lock:
            return self._nodes([node_id for node_id, cosine in found if cosine >= _FLOOR])

    def by_text(self, like: Sequence[Node], count: int) -> list[Node]:
        """Nodes whose text is near that of the first of `like` that has a text vector.

        A request has no text vector of its own: making one would take longer than a plan may. The
        stored prompt that shares most words with it stands in for it.
        """
        index = self._index
        if index is None or not len(index.semantic):
            return []
        with self._lock:
            vectors = (index.semantic.get(node.id) for node in like)
            vector = next((each for each in vectors if each is not None), None)
        if vector is None:
            return []
        found = index.semantic.nearest(vector, count)
        with self._lock:
            return self._nodes([node_id for node_id, _ in found])

    def _nodes(self, ids: Iterable[str]) -> list[Node]:
        found = (self._tree.get(node_id) for node_id in ids)
        return _ranked([node for node in found if node is not None], self._rank)


def _ranked(nodes: list[Node], rank: Rank | None) -> list[Node]:
    return nodes if rank is None else sorted(nodes, key=rank)


class WithPools(Nominator):
    """The donors of a namespace, and behind them those of pools, `count` of each: of two that are
    as good the planner takes the first."""

    def __init__(self, own: Nominator, pools: Sequence[Nominator], rank: Rank | None) -> None:
        """`rank`: which of all go before others, but for a prefix, which is the same in all."""
        self._each = (own, *pools)
        self._rank = rank

    def __bool__(self) -> bool:
        return any(self._each)

    def by_prefix(self, tokens: Tokens, policies: Collection[str] = ()) -> list[Node]:
        """As `Nominator`."""
        return [node for one in self._each for node in one.by_prefix(tokens, policies)]

    def by_passages(self, hashes: Hashes, count: int) -> list[Node]:
        """As `Nominator`."""
        return self._all(one.by_passages(hashes, count) for one in self._each)

    def by_words(self, vector: Vector, count: int, most: int = 0) -> list[Node]:
        """As `Nominator`."""
        return self._all(one.by_words(vector, count, most) for one in self._each)

    def by_text(self, like: Sequence[Node], count: int) -> list[Node]:
        """As `Nominator`."""
        return self._all(one.by_text(like, count) for one in self._each)

    def _all(self, found: Iterable[list[Node]]) -> list[Node]:
        return _ranked(list(chain.from_iterable(found)), self._rank)


def with_pools(
    namespace: Namespace, pools: Iterable[str], make: Callable[[str], Nominator], rank: Rank | None
) -> Nominator:
    """The donors of a namespace and of those of its pools that are named. `make`: the donors of the
    namespace with this digest; `rank`: that of each."""
    own, *others = (make(space.digest) for space in (namespace, *map(namespace.in_pool, pools)))
    return WithPools(own, others, rank) if others else own
