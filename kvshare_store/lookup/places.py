"""Where stored prompts have which grams: found by hash, in time that does not depend on how long a
prompt is. Hashes nominate; tokens decide."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.grams import GRAM, Hashes, gram_hashes
from kvshare_store.nodes.index import LONG
from kvshare_store.nodes.node import Node
from kvshare_store.plan.spans import Run

Positions = npt.NDArray[np.int64]

_LOOKED_AT = 1 << 14
"""Of prompts with more grams only so many, at most, have a place in the table."""
_GUESSED_FROM = 1 << 11
"""So many grams of a request, at most, say how much of it a donor has."""
_FIRST_OF_MANY, _FIRST_ONE_OF = 512, 8
"""Of a request that long one gram in eight is looked up first."""
_REMEMBERED_BYTES = 32 << 20
"""Tables of 2,000 to 4,000 prompts of 1,000 tokens, or of 130 to 260 of 64,000."""


class Sample(NamedTuple):
    """Some of a request's grams."""

    at: Positions
    """Where they begin, ascending."""
    hashes: Hashes


class Sought:
    """A request whose grams are looked up in many donors: hashed once."""

    def __init__(self, tokens: Tokens, start: int = 0) -> None:
        """`start`: what stands before it is not sought."""
        self.tokens = tokens
        self.start = start
        self._samples: dict[int, Sample] = {}
        self._inside: tuple[Sequence[Run], int, Sample] | None = None

    @cached_property
    def _hashes(self) -> Hashes:
        return gram_hashes(self.tokens[self.start :])

    def sample(self, one_of: int) -> Sample:
        """The grams that a table has which takes one of so many."""
        known = self._samples.get(one_of)
        if known is None:
            at, hashes = _sample(self._hashes, one_of)
            known = self._samples[one_of] = Sample(at + self.start, hashes)
        return known

    def inside(self, gaps: Sequence[Run], one_of: int) -> Sample:
        """Those of `sample` that lie inside one of the gaps, which ascend. The last answer is
        remembered: the same is asked of one donor after the other."""
        if self._inside is None or self._inside[:2] != (gaps, one_of):
            self._inside = gaps, one_of, self._cut(gaps, self.sample(one_of))
        return self._inside[2]

    def _cut(self, gaps: Sequence[Run], sample: Sample) -> Sample:
        bounds = np.asarray([(gap.start, gap.stop - GRAM + 1) for gap in gaps], np.int64)
        parts = [slice(*each) for each in sample.at.searchsorted(bounds).tolist()]
        chosen = (np.concatenate([each[:0], *(each[part] for part in parts)]) for each in sample)
        return Sample(*chosen)


class Places:
    """Where a donor has its grams, by their hashes; nothing is sorted.

    One place for each: that of the first of equal grams. A gram may lack its place, because another
    has the same slot of the table; of long donors only grams whose hash says so are taken, so that
    both sides take the same. A passage has many grams, and one that is found is enough.
    """

    def __init__(self, tokens: Tokens) -> None:
        hashes = gram_hashes(tokens)
        self.one_of = 1 << (len(hashes) // _LOOKED_AT).bit_length()
        at, hashes = _sample(hashes, self.one_of)
        at, hashes = at[::-1], hashes[::-1]  # the last that is put into a slot stays there
        bits = max(1, len(at).bit_length())
        self._shift = np.uint64(64 - bits)
        slots = (hashes >> self._shift).view(np.int64)
        self._places = np.full(1 << bits, -1, np.int32)
        self._places[slots] = at
        self._tags = np.zeros(1 << bits, np.uint32)
        self._tags[slots] = hashes.astype(np.uint32)

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return self._places.nbytes + self._tags.nbytes

    def has_any(self, hashes: Hashes) -> bool:
        """Whether `find` finds a place for any of the grams."""
        slots = (hashes >> self._shift).view(np.int64)
        same = self._tags[slots] == hashes.astype(np.uint32)
        return bool(np.count_nonzero(same)) and int(self._places[slots[same]].max()) >= 0

    def find(self, hashes: Hashes) -> npt.NDArray[np.int32]:
        """The place of each gram, or -1. Not yet verified."""
        slots = (hashes >> self._shift).view(np.int64)
        return np.where(
            self._tags.take(slots) == hashes.astype(np.uint32), self._places.take(slots), -1
        )


def guess(ours: Sought, theirs: Places, length: int) -> int:
    """About how many of the tokens that are sought the first `length` tokens of a donor have in
    runs of some length. 0: they have no gram in common."""
    sought = len(ours.tokens) - ours.start
    if _FIRST_OF_MANY <= sought < LONG:
        # most candidates of a new short prompt have none of a few grams, and a passage worth its
        # seam has several of the few
        few = ours.sample(_FIRST_ONE_OF * theirs.one_of)
        if not theirs.has_any(few.hashes):
            return 0
    one_of = max(theirs.one_of, 1 << (sought // _GUESSED_FROM).bit_length())
    at, hashes = ours.sample(one_of)
    places = theirs.find(hashes)
    found = (places.view(np.uint32) <= length - GRAM).nonzero()[0]  # -1 is the greatest number
    if not len(found):
        return 0
    starts, sources = at[found], places[found]
    steps = starts[1:] - starts[:-1]
    goes_on = sources[1:] - sources[:-1] == steps
    # what lies between two grams that go on from one another is most likely the same too
    near = GRAM if one_of == 1 else 2 * GRAM * one_of
    return GRAM + int(steps[goes_on & (steps <= near)].sum())


def _sample(hashes: Hashes, one_of: int) -> tuple[Positions, Hashes]:
    if one_of == 1:
        return np.arange(len(hashes)), hashes
    at = np.flatnonzero(hashes & np.uint64(one_of - 1) == 0)
    return at, hashes[at]


class KnownPlaces:
    """Tables of the stored prompts that were looked at last. Thread-safe."""

    def __init__(self, nbytes: int = _REMEMBERED_BYTES) -> None:
        """`nbytes`: memory of all tables together."""
        self._left = nbytes
        self._tables: OrderedDict[str, Places] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, node: Node) -> bool:
        """Whether `of` has only to look it up."""
        return node.id in self._tables

    def of(self, node: Node) -> Places:
        """The table of a node."""
        with self._lock:
            known = self._tables.get(node.id)
            if known is not None:
                self._tables.move_to_end(node.id)
                return known
        made = Places(node.tokens)
        with self._lock:
            if node.id not in self._tables:
                self._tables[node.id] = made
                self._left -= made.nbytes
            while self._left < 0:
                self._left += self._tables.popitem(last=False)[1].nbytes
        return made
