"""The lineage of a node: the node, and what was computed behind its rows.

A row says nothing of the text before it. The nodes that have it do: a row in the exact prefix of a
node was computed behind the tokens of that node. All other rows are of whoever has them first.
docs/design/security.md says what is found, and what cannot be.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple

import numpy as np

from kvshare_store.nodes.grams import gram_hashes
from kvshare_store.nodes.node import Node

_SLACK_S = 600.0
"""A node that was stored so long before another cannot be made of its rows: an answer that extends
a node makes it newer, and clocks of machines differ."""


class Lineage(NamedTuple):
    """What goes with a node."""

    certain: tuple[Node, ...]
    """The node itself, nodes that go on from it, and those with rows computed behind its rows."""
    unsure: tuple[Node, ...]
    """Edited nodes with text of it, of which nobody knows any more whose rows they have."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All of them."""
        return (*self.certain, *self.unsure)


def lineage_of(root: Node, nodes: Iterable[Node]) -> Lineage:
    """The lineage of `root` among the `nodes` of its namespace.

    Exact nodes with other text stay, settled ones too: none of their rows was computed behind text
    that they do not have.
    """
    others = [node for node in nodes if node.id != root.id]
    behind = {root.id: root} | {n.id: n for n in others if _goes_on(n, root)}
    search = _Search(root, [node for node in others if node.id not in behind], set(behind))
    for node in behind.values():
        search.soil(node)
    certain = (*behind.values(), *search.spread())
    unsure: list[Node] = []
    while more := [node for node in search.left() if search.doubtful(node)]:
        for node in more:
            search.take(node)
        unsure += [*more, *search.spread()]
    return Lineage(certain, tuple(unsure))


class _Search:
    """Follows blocks from node to node."""

    def __init__(self, root: Node, rest: Sequence[Node], behind: set[str]) -> None:
        """`rest`: the nodes that do not go on from `root`; `behind`: ids of those that do."""
        self._root = root
        self._grams = np.unique(gram_hashes(root.tokens))
        self._first = _first_exact(rest)
        self._gone = set(behind)
        self._here = behind | {node.id for node in rest}
        self._edited = {node.id: node for node in rest if not node.exact}
        self._users: defaultdict[str, list[Node]] = defaultdict(list)
        self._oldest: dict[str, float] = {}
        for node in self._edited.values():
            for name in _blocks(node, node.exact_rows, node.length):
                self._users[name].append(node)
                self._oldest[name] = min(node.created, self._oldest.get(name, node.created))
        self._dirty: set[str] = set()
        self._new: deque[str] = deque()
        self._copied = False
        """A node that goes was merged: its blocks are not those that others took rows from."""

    def soil(self, node: Node) -> None:
        """Nobody may have rows of `node`, but for those behind text that an older node has too."""
        self._copied |= node.merged
        exact = set(_blocks(node, 0, node.exact_rows))
        for name in exact:
            if self._first.get(name, inf) >= self._root.created:
                self._add(name)
        self._add_own(node, set(node.blocks) - exact)

    def take(self, node: Node) -> None:
        """`node` goes, and nobody may have its approximate rows."""
        self._copied |= node.merged
        self._gone.add(node.id)
        self._edited.pop(node.id, None)
        self._add_own(node, set(_blocks(node, node.exact_rows, node.length)))

    def spread(self) -> list[Node]:
        """Take the nodes that have approximate rows in blocks that were added."""
        found: list[Node] = []
        while self._new:
            for node in self._users.pop(self._new.popleft(), ()):
                if node.id in self._edited:
                    found.append(node)
                    self.take(node)
        return found

    def left(self) -> list[Node]:
        """Edited nodes that stay so far."""
        return list(self._edited.values())

    def doubtful(self, node: Node) -> bool:
        """Whether rows of `node` may be of the lineage although no block says so: its parent is
        gone, or rows were copied when a node was merged."""
        lost = self._copied or node.merged or node.parent not in self._here
        if not lost or node.created < self._root.created - _SLACK_S:
            return False
        if node.parent in self._gone:
            return True
        return bool(np.isin(gram_hashes(node.tokens[node.exact_rows :]), self._grams).any())

    def _add_own(self, node: Node, names: Iterable[str]) -> None:
        """Of the blocks with approximate rows of a node those that no other node had before: in its
        exact prefix, or as long ago as `_SLACK_S`."""
        for name in names:
            older = self._oldest.get(name, inf) < node.created - _SLACK_S
            if name not in self._first and not older:
                self._add(name)

    def _add(self, name: str) -> None:
        if name not in self._dirty:
            self._dirty.add(name)
            self._new.append(name)


def _goes_on(node: Node, root: Node) -> bool:
    return node.token_bytes.startswith(root.token_bytes)


def _first_exact(nodes: Iterable[Node]) -> Mapping[str, float]:
    """Blocks in the exact prefixes of nodes, and when the oldest of these was stored."""
    first: dict[str, float] = {}
    for node in nodes:
        for name in _blocks(node, 0, node.exact_rows):
            first[name] = min(node.created, first.get(name, node.created))
    return first


def _blocks(node: Node, start: int, stop: int) -> Iterator[str]:
    """Blocks with rows of the positions `start … stop-1`; they may repeat."""
    names = tuple(node.blocks)
    return (names[s.block] for s in node.segments if s.start < stop and s.stop > start)
