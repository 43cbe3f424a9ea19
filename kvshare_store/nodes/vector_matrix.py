"""The vectors of a namespace, and the nearest ones to a vector. Exact and in memory; LanceDB has
their durable copy (catalog/catalog.py)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS

Rows = npt.NDArray[np.void]

_PLANES = 768
_SHORTLIST = 1_024
"""Sketched vectors that are compared in full: at 100,000 nodes 99 % of those with a cosine of 0.3
to one of the eight nearest are among them."""
_ONE = 32_000
_ROW = np.dtype([("numbers", np.int16, VECTOR_DIMENSIONS), ("unit", np.float32)])
"""A vector: its numbers, times about `_ONE`, and what one of them stands for."""
_FIRST_ROWS = 4
"""Rows of a matrix with one vector: most tenants have few prompts."""
_NOT_SKETCHED = 512
"""So many vectors are compared without sketches before they get theirs, all at once."""


class VectorMatrix:
    """Unit vectors by node id; the best by cosine is one pass over the matrix away.

    Of a large matrix most rows have a sketch: on which side of 768 random planes the vector lies, a
    bit each. Vectors with a high cosine lie on the same side of most, so counting differing bits,
    which are a sixteenth of the bytes, gives a shortlist, and only that is compared in full. A
    search compares row by row and multiplies no matrices: the threads of BLAS would wait for the
    cores that an engine beside it computes on.

    `add` and `remove` must not run at once. `nearest` may run beside them: a row that changes at
    that moment may be missed or get another's cosine, which costs a nomination and no more.
    """

    def __init__(self) -> None:
        self._rows: Rows = np.zeros(0, _ROW)
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
            self.extend([node_id], vector[None])
            return
        self._put(at, _packed(vector[None])[0])

    def _put(self, at: int, row: npt.NDArray[np.void]) -> None:
        self._rows[at] = row
        if at < self._sketched:
            self._sketches[:, at] = _sketch(_unpacked(self._rows[at : at + 1]))[:, 0]

    def extend(self, ids: Sequence[str], vectors: npt.NDArray[np.float32]) -> None:
        """Insert many that are not here yet."""
        at = len(self._ids)
        end = at + len(ids)
        if end > len(self._rows):
            rows = np.zeros(max(2 * at, end, _FIRST_ROWS), _ROW)
            rows[:at] = self._rows[:at]  # the others take no memory yet
            self._rows = rows
        self._rows[at:end] = _packed(vectors)
        self._ids.extend(ids)
        self._at.update(zip(ids, range(at, end), strict=True))
        if end - self._sketched > _NOT_SKETCHED:
            self._sketch_the_rest()

    def get(self, node_id: str) -> npt.NDArray[np.float32] | None:
        """A copy of the node's vector, or None."""
        at = self._at.get(node_id)
        return None if at is None else _unpacked(self._rows[at : at + 1])[0]

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
            self._put(at, self._rows[len(self._ids)])

    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[tuple[str, float]]:
        """The `count` best ids with their cosines, best first."""
        size = len(self._ids)
        sketched = min(self._sketched, size)
        rows = self._rows[:size]
        if not len(rows):
            return []
        if sketched <= max(count, _SHORTLIST):
            places, scores = None, _products(rows, vector)
        else:
            listed = _shortlist(self._sketches[:, :sketched], vector, max(count, _SHORTLIST))
            places = np.concatenate((listed, np.arange(sketched, len(rows))))
            scores = _products(rows[places], vector)
        count = min(count, len(scores))
        best = np.argpartition(scores, -count)[-count:]
        best = best[np.argsort(-scores[best])]
        at = (best if places is None else places[best]).tolist()
        found = zip(at, scores[best].tolist(), strict=True)
        ids = self._ids
        return [(ids[place], score) for place, score in found if place < len(ids)]

    def _sketch_the_rest(self) -> None:
        """In one go, which is much faster; until then these rows are all compared."""
        fresh = _sketch(_unpacked(self._rows[self._sketched : len(self._ids)]))
        if self._sketches.shape[1] < len(self._rows):  # grows with the rows, not with each batch
            larger = np.zeros((len(self._sketches), len(self._rows)), np.uint64)
            larger[:, : self._sketched] = self._sketches[:, : self._sketched]
            self._sketches = larger
        self._sketches[:, self._sketched : len(self._ids)] = fresh
        self._sketched = len(self._ids)


def _shortlist(
    sketches: npt.NDArray[np.uint64], vector: npt.NDArray[np.float32], count: int
) -> npt.NDArray[np.intp]:
    """At least `count` rows: those whose sketches differ least from the vector's, and those that
    differ as much as the last of them."""
    differing = np.zeros(sketches.shape[1], np.uint16)
    bits = np.empty(len(differing), np.uint64)  # written over and over: fresh pages cost more
    counts = np.empty(len(differing), np.uint8)
    for theirs, ours in zip(sketches, _sketch(vector[None])[:, 0], strict=True):
        np.bitwise_xor(theirs, ours, out=bits)
        np.bitwise_count(bits, out=counts)
        np.add(differing, counts, out=differing)
    # counted, not sorted: of so few possible differences a histogram tells where to cut
    up_to = np.cumsum(np.bincount(differing, minlength=_PLANES + 1))
    return np.flatnonzero(differing <= np.searchsorted(up_to, count))


def _products(rows: Rows, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    products: npt.NDArray[np.float32] = np.vecdot(rows["numbers"], vector)
    products *= rows["unit"]
    return products


def _packed(vectors: npt.NDArray[np.float32]) -> Rows:
    """Half the bytes. The unit keeps the length of a vector: rounding turns it by 0.0001 at most
    and changes a cosine by less."""
    rows = np.zeros(len(vectors), _ROW)
    numbers = np.rint(vectors * np.float32(_ONE))
    lengths = np.sqrt(np.einsum("ij,ij->i", numbers, numbers))
    rows["numbers"] = numbers
    rows["unit"] = np.sqrt(np.einsum("ij,ij->i", vectors, vectors)) / np.maximum(lengths, 1)
    return rows


def _unpacked(rows: Rows) -> npt.NDArray[np.float32]:
    vectors: npt.NDArray[np.float32] = rows["numbers"] * rows["unit"][:, None]
    return vectors


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
