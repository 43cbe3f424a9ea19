"""What nominates donors in one namespace: the exact-prefix chain and two matrices of vectors.

The matrices are exact and live in memory; LanceDB is their durable copy (catalog/catalog.py).
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from itertools import islice

import blake3
import numpy as np
import numpy.typing as npt

from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.grams import anchors, gram_hashes
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.postings import Keys, Postings
from kvshare_store.nodes.vectors import MIX, VECTOR_DIMENSIONS, Vectors

Counts = npt.NDArray[np.int64]
Rows = npt.NDArray[np.void]

CHAIN_RUN = 16
"""Tokens of a run of the prefix chain: as many as a block of vLLM has, so that a prefix which its
own cache would find is always nominated."""
_CHAIN_FANOUT = 8
"""Nodes looked at per chain entry: they share the run, only one of them can be the longest."""

LONG = 1 << 11
"""Prompts of so many tokens and more are also known by their anchors."""

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


class PrefixChain:
    """A hash chain over runs of `run` tokens: entry i stands for the first (i + 1) · run tokens.

    Its hashes have 64 bits and are fast, not strong: two prompts that collide cost a nomination,
    since donors are verified by their tokens. They are sums of products with numbers that each
    process draws, so nobody can make prompts that collide.
    """

    def __init__(self, run: int) -> None:
        self._run = run
        self._nodes = Postings()

    def hashes(self, tokens: Tokens) -> Keys:
        """The chain of a prompt: one hash for each whole run."""
        hashes = self._run_hashes([tokens])
        return _mixed((hashes * _factors(len(hashes))).cumsum(dtype=np.uint64))

    def _run_hashes(self, prompts: Sequence[Tokens]) -> Keys:
        """Of each whole run of each prompt."""
        whole = [tokens[: len(tokens) // self._run * self._run] for tokens in prompts]
        runs = np.concatenate(whole).astype(np.uint64).reshape(-1, self._run)
        return _mixed(runs @ _factors(self._run))

    def _chains(self, prompts: Sequence[Tokens]) -> tuple[Keys, Counts]:
        """As `hashes`, of many prompts one behind the other, and how many each has."""
        counts = np.asarray([len(tokens) // self._run for tokens in prompts])
        starts = counts.cumsum() - counts
        hashes = self._run_hashes(prompts)
        place = np.arange(len(hashes)) - starts.repeat(counts)
        sums = np.zeros(len(hashes) + 1, np.uint64)
        (hashes * _factors(int(counts.max(initial=0)))[place]).cumsum(out=sums[1:])
        return _mixed(sums[1:] - sums[starts].repeat(counts)), counts

    def add(self, node_id: str, tokens: Tokens) -> None:
        """Index a node under these of its leading tokens."""
        if node_id not in self._nodes:
            self._nodes.add(node_id, self.hashes(tokens).tolist())

    def extend(self, nodes: Sequence[tuple[str, Tokens]]) -> None:
        """Index many nodes."""
        new = [entry for entry in nodes if entry[0] not in self._nodes]
        if not new:
            return
        keys, counts = self._chains([tokens for _, tokens in new])
        self._nodes.extend([node for node, _ in new], keys, np.arange(len(new)).repeat(counts))

    def settle(self) -> None:
        """Do now what the first question after `extend` would wait for."""
        self._nodes.settle()

    def remove(self, node_id: str) -> None:
        """Forget the node."""
        self._nodes.remove(node_id)

    def nominate(self, hashes: Keys) -> list[str]:
        """Nodes that share the longest part of a chain, the newest first. Not yet verified."""
        low, high = 0, len(hashes)  # an entry implies every shorter one of the same node
        while low < high:
            middle = (low + high + 1) // 2
            if next(self._nodes.find(int(hashes[middle - 1])), None) is not None:
                low = middle
            else:
                high = middle - 1
        return list(islice(self._nodes.find(int(hashes[low - 1])), _CHAIN_FANOUT)) if low else []


def _factors(count: int) -> Keys:
    """Odd numbers that this process has drawn; the first of more are the same."""
    return _drawn(count.bit_length())[:count]


@functools.cache
def _drawn(bits: int) -> Keys:
    drawn = blake3.blake3(_SECRET).digest(length=8 << bits)
    return np.frombuffer(drawn, np.uint64) | np.uint64(1)


_SECRET = secrets.token_bytes(32)


def _mixed(words: Keys) -> Keys:
    """Every bit of a word changes the lower half of them."""
    return (words ^ (words >> np.uint64(32))) * MIX


class VectorMatrix:
    """Unit vectors by node id; the best by cosine is one pass over the matrix away.

    Of a large matrix most rows have a sketch: on which side of 768 random planes the vector lies, a
    bit each. Vectors with a high cosine lie on the same side of most, so counting differing bits,
    which are a sixteenth of the bytes, gives a shortlist, and only that is compared in full. A
    search calls no BLAS: its threads would wait for the cores that an engine beside it computes on.

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
        self._rows[at] = _packed(vector[None])[0]
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
            self._rows[at] = self._rows[len(self._ids)]
            if at < self._sketched:
                self._sketches[:, at] = _sketch(_unpacked(self._rows[at : at + 1]))[:, 0]

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
    products: npt.NDArray[np.float32] = np.einsum("ij,j->i", rows["numbers"], vector)
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


class NamespaceIndex:
    """Everything that nominates donors inside one namespace."""

    def __init__(self, run: int = CHAIN_RUN) -> None:
        self._run = run
        self.chain = PrefixChain(run)
        """Of exact rows."""
        self.edited: dict[str, PrefixChain] = {}
        """Of all rows of edited nodes, by the policy that they were made under."""
        self.passages = Postings()
        """Long prompts by their anchors: long prompts have much the same words, whoever wrote them,
        and so much the same vectors."""
        self.lexical = VectorMatrix()
        self.semantic = VectorMatrix()

    def add(self, node: Node, vectors: Vectors) -> None:
        """Index a node."""
        self.chain.add(node.id, node.tokens[: node.exact_rows])
        if not node.exact:
            self._edited(node.policy).add(node.id, node.tokens)
        if node.length >= LONG and node.id not in self.passages:
            self.passages.add(node.id, anchors(gram_hashes(node.tokens)).tolist())
        self.lexical.add(node.id, vectors.lexical)
        if vectors.semantic is not None:
            self.semantic.add(node.id, vectors.semantic)

    def extend(self, nodes: Sequence[tuple[Node, Vectors]]) -> None:
        """Index many nodes that are not here yet."""
        self.chain.extend([(node.id, node.tokens[: node.exact_rows]) for node, _ in nodes])
        for policy in {node.policy for node, _ in nodes if not node.exact}:
            same = [n for n, _ in nodes if not n.exact and n.policy == policy]
            self._edited(policy).extend([(node.id, node.tokens) for node in same])
        self._extend_passages([node for node, _ in nodes if node.length >= LONG])
        lexical = np.stack([vectors.lexical for _, vectors in nodes])
        self.lexical.extend([node.id for node, _ in nodes], lexical)
        text = {node.id: each.semantic for node, each in nodes if each.semantic is not None}
        if text:
            self.semantic.extend(list(text), np.stack(list(text.values())))

    def _extend_passages(self, nodes: Sequence[Node]) -> None:
        new = [node for node in nodes if node.id not in self.passages]
        if new:
            keys = [anchors(gram_hashes(node.tokens)) for node in new]
            whose = np.arange(len(new)).repeat([len(each) for each in keys])
            self.passages.extend([node.id for node in new], np.concatenate(keys), whose)

    def settle(self) -> None:
        """Do now what the first question after `extend` would wait for."""
        for chain in (self.chain, *self.edited.values()):
            chain.settle()
        self.passages.settle()

    def _edited(self, policy: str) -> PrefixChain:
        return self.edited.setdefault(policy, PrefixChain(self._run))

    def remove(self, node: Node) -> None:
        """Forget a node."""
        for chain in (self.chain, *self.edited.values()):
            chain.remove(node.id)
        self.passages.remove(node.id)
        self.lexical.remove(node.id)
        self.semantic.remove(node.id)

    def __len__(self) -> int:
        return len(self.lexical)
