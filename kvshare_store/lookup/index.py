"""What nominates donors in one namespace: the exact-prefix chain and two matrices of vectors.

The matrices are exact and live in memory; LanceDB is their durable copy (tree/catalog.py).
"""

from __future__ import annotations

import functools

import blake3
import numpy as np
import numpy.typing as npt

from kvshare_store.tree.catalog import VECTOR_DIMENSIONS, Vectors
from kvshare_store.tree.edits import Tokens
from kvshare_store.tree.node import Node

_CHAIN_FANOUT = 8
"""Nodes looked at per chain entry: they share the run, only one of them can be the longest."""

_PLANES = 768
_SHORTLIST = 1_024
"""Sketched vectors that are compared in full: at 100,000 nodes 99 % of those with a cosine of 0.3
to one of the eight nearest are among them."""
_NOT_SKETCHED = 512
"""So many vectors are compared without sketches before they get theirs, all at once."""


class PrefixChain:
    """A hash chain over runs of `run` tokens: entry i stands for the first (i + 1) · run tokens."""

    def __init__(self, run: int) -> None:
        self._run = run
        self._entries: dict[bytes, str | dict[str, None]] = {}
        """The nodes of an entry, the oldest first; most have one."""

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
            there = self._entries.setdefault(digest, node.id)
            if isinstance(there, dict):
                there[node.id] = None
            elif there != node.id:
                self._entries[digest] = {there: None, node.id: None}

    def remove(self, node: Node) -> None:
        """Forget the node."""
        for digest in self._hashes(node.tokens[: node.exact_rows]):
            there = self._entries.get(digest)
            if isinstance(there, dict):
                there.pop(node.id, None)
            if not there or there == node.id:
                self._entries.pop(digest, None)

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
        there = self._entries[hashes[low - 1]] if low else ()
        return [there] if isinstance(there, str) else list(there)[: -_CHAIN_FANOUT - 1 : -1]


class VectorMatrix:
    """Unit vectors by node id; the best by cosine is one pass over the matrix away.

    Of a large matrix most rows have a sketch: on which side of 768 random planes the vector lies, a
    bit each. Vectors with a high cosine lie on the same side of most, so counting differing bits,
    which are a sixteenth of the bytes, gives a shortlist, and only that is compared in full. A
    search calls no BLAS: its threads would wait for the cores that an engine beside it computes on.
    """

    def __init__(self) -> None:
        self._rows = np.zeros((64, VECTOR_DIMENSIONS), np.float32)
        self._sketches = np.zeros((_PLANES // 64, 0), np.uint64)
        """Column n is the sketch of row n, for the first `_sketched` rows."""
        self._sketched = 0
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
        if at < self._sketched:
            self._sketches[:, at] = _sketch(vector[None])[:, 0]
        elif at - self._sketched >= _NOT_SKETCHED:
            self._sketch_the_rest()

    def get(self, node_id: str) -> npt.NDArray[np.float32] | None:
        """A copy of the node's vector, or None."""
        at = self._at.get(node_id)
        return None if at is None else self._rows[at].copy()

    def remove(self, node_id: str) -> None:
        """Forget a node; the last row takes its place."""
        at = self._at.pop(node_id, None)
        if at is None:
            return
        last = self._ids.pop()
        self._sketched = min(self._sketched, len(self._ids))
        if last != node_id:
            self._at[last] = at
            self._ids[at] = last
            self._rows[at] = self._rows[len(self._ids)]
            if at < self._sketched:
                self._sketches[:, at] = _sketch(self._rows[at][None])[:, 0]

    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[tuple[str, float]]:
        """The `count` best ids with their cosines, best first."""
        if not self._ids:
            return []
        listed = self._shortlist(vector, max(count, _SHORTLIST))
        rest = self._rows[self._sketched : len(self._ids)]
        scores = np.concatenate((_products(self._rows[listed], vector), _products(rest, vector)))
        count = min(count, len(scores))
        best = np.argpartition(scores, -count)[-count:]
        best = best[np.argsort(-scores[best])]
        places = np.concatenate((listed, np.arange(self._sketched, len(self._ids))))
        return [(self._ids[places[at]], float(scores[at])) for at in best]

    def _shortlist(self, vector: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
        """At least `count` sketched rows, or all: those whose sketches differ least from the
        vector's, and those that differ as much as the last of them."""
        if count >= self._sketched:
            return np.arange(self._sketched)
        differing = np.zeros(self._sketched, np.uint16)
        bits = np.empty(self._sketched, np.uint64)  # written over and over: fresh pages cost more
        counts = np.empty(self._sketched, np.uint8)
        for theirs, ours in zip(self._sketches, _sketch(vector[None])[:, 0], strict=True):
            np.bitwise_xor(theirs[: self._sketched], ours, out=bits)
            np.bitwise_count(bits, out=counts)
            np.add(differing, counts, out=differing)
        # counted, not sorted: of so few possible differences a histogram tells where to cut
        up_to = np.cumsum(np.bincount(differing, minlength=_PLANES + 1))
        return np.flatnonzero(differing <= np.searchsorted(up_to, count))

    def _sketch_the_rest(self) -> None:
        """In one go, which is much faster; until then these rows are all compared."""
        fresh = _sketch(self._rows[self._sketched : len(self._ids)])
        if self._sketches.shape[1] < len(self._rows):  # grows with the rows, not with each batch
            larger = np.zeros((len(self._sketches), len(self._rows)), np.uint64)
            larger[:, : self._sketched] = self._sketches[:, : self._sketched]
            self._sketches = larger
        self._sketches[:, self._sketched : len(self._ids)] = fresh
        self._sketched = len(self._ids)


def _products(
    rows: npt.NDArray[np.float32], vector: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    products: npt.NDArray[np.float32] = np.einsum("ij,j->i", rows, vector)
    return products


def _sketch(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """On which side of each plane each row lies: uint64 [planes / 64, rows]."""
    # BLAS is worth waiting for only where there are many rows, which is once in thousands of adds
    projected = rows @ _planes() if len(rows) > 1 else np.einsum("ij,jp->ip", rows, _planes())
    return np.packbits(projected > 0, axis=1).view(np.uint64).T


@functools.cache
def _planes() -> npt.NDArray[np.float32]:
    """Normals of random planes, the same in every process: float32 [dimensions, planes]."""
    normals = np.random.default_rng(768).standard_normal((VECTOR_DIMENSIONS, _PLANES))
    return normals.astype(np.float32)


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
