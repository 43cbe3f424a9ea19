"""What nominates donors in one namespace: the exact-prefix chain and two matrices of vectors.

The matrices are exact and live in memory; LanceDB is their durable copy (tree/catalog.py).
"""

from __future__ import annotations

from collections import defaultdict

import blake3
import numpy as np
import numpy.typing as npt

from kvshare_store.tree.catalog import VECTOR_DIMENSIONS, Vectors
from kvshare_store.tree.edits import Tokens
from kvshare_store.tree.node import Node

_CHAIN_FANOUT = 8
"""Nodes looked at per chain entry: they share the run, only one of them can be the longest."""


class PrefixChain:
    """A hash chain over runs of `run` tokens: entry i stands for the first (i + 1) · run tokens."""

    def __init__(self, run: int) -> None:
        self._run = run
        self._entries: defaultdict[bytes, dict[str, None]] = defaultdict(dict)

    def _hashes(self, tokens: Tokens) -> list[bytes]:
        hasher = blake3.blake3()
        hashes = []
        for start in range(0, len(tokens) - self._run + 1, self._run):
            hasher.update(tokens[start : start + self._run].tobytes())
            hashes.append(hasher.digest(length=16))
        return hashes

    def add(self, node: Node) -> None:
        """Index the node's exact rows."""
        for digest in self._hashes(node.tokens[: node.exact_rows]):
            self._entries[digest][node.id] = None

    def remove(self, node: Node) -> None:
        """Forget the node."""
        for digest in self._hashes(node.tokens[: node.exact_rows]):
            self._entries[digest].pop(node.id, None)
            if not self._entries[digest]:
                del self._entries[digest]

    def nominate(self, tokens: Tokens) -> list[str]:
        """Nodes that share the longest chain with `tokens`, the newest first. Not yet verified."""
        hashes = self._hashes(tokens)
        low, high = (
            0,
            len(hashes),
        )  # an entry implies every shorter one of the same node
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in self._entries:
                low = middle
            else:
                high = middle - 1
        return list(self._entries[hashes[low - 1]])[: -_CHAIN_FANOUT - 1 : -1] if low else []


class VectorMatrix:
    """Unit vectors by node id; the best by cosine is one matrix product away."""

    def __init__(self) -> None:
        self._rows = np.zeros((64, VECTOR_DIMENSIONS), np.float32)
        self._ids: list[str] = []
        self._at: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, node_id: str, vector: npt.NDArray[np.float32]) -> None:
        """Insert or replace."""
        at = self._at.get(node_id)
        if at is None:
            at = self._at[node_id] = len(self._ids)
            self._ids.append(node_id)
            if at == len(self._rows):
                self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)))
        self._rows[at] = vector

    def remove(self, node_id: str) -> None:
        """Forget a node; the last row takes its place."""
        at = self._at.pop(node_id, None)
        if at is None:
            return
        last = self._ids.pop()
        if last != node_id:
            self._rows[at] = self._rows[len(self._ids)]
            self._ids[at] = last
            self._at[last] = at

    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[tuple[str, float]]:
        """The `count` best ids with their cosines, best first."""
        if not self._ids:
            return []
        scores = self._rows[: len(self._ids)] @ vector
        count = min(count, len(scores))
        best = np.argpartition(scores, -count)[-count:]
        best = best[np.argsort(-scores[best])]
        return [(self._ids[at], float(scores[at])) for at in best]


class NamespaceIndex:
    """Everything that nominates donors inside one namespace."""

    def __init__(self, run: int) -> None:
        self.chain = PrefixChain(run)
        self.lexical = VectorMatrix()
        self.semantic = VectorMatrix()

    def add(self, node: Node, vectors: Vectors) -> None:
        """Index a node."""
        self.chain.add(node)
        self.lexical.add(node.id, vectors.lexical)
        if vectors.semantic is not None:
            self.semantic.add(node.id, vectors.semantic)

    def remove(self, node: Node) -> None:
        """Forget a node."""
        self.chain.remove(node)
        self.lexical.remove(node.id)
        self.semantic.remove(node.id)

    def __len__(self) -> int:
        return len(self.lexical)
