"""Ids by 64-bit keys, packed: 12 bytes per entry, where a Python dictionary takes 100."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import blake3
import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]

_FEW = 4_096
_SHARE = 16
"""New entries are merged into the sorted ones when there are more than `_FEW`, and more than this
share of the sorted ones: rare, and rarer as they grow, like the growth of a dictionary."""


class _Entries(NamedTuple):
    keys: Keys
    """Ascending."""
    numbers: Numbers
    """For equal keys, in the order in which they were added."""
    recent: dict[int, list[int]]
    """Entries that were added since the arrays were made."""
    ids: list[str | None]
    """By number."""


class Postings:
    """Which ids were added with a key. Keys are hashes, so callers verify the ids they find.

    Most entries are in two arrays, sorted by key; recent ones are in a dictionary. Each id has a
    number here. The number of a removed id stands for no id, and its entries go with a later merge.
    Changes must not run concurrently; `find` may run beside them.
    """

    def __init__(self) -> None:
        self._entries = _Entries(np.empty(0, np.uint64), np.empty(0, np.uint32), {}, [])
        """Replaced as a whole, so that a concurrent `find` sees one state."""
        self._recent_count = 0
        self._batches: list[tuple[Keys, Numbers]] = []
        """Entries from `extend`, each batch sorted by key, until the next question."""
        self._number: dict[str, int] = {}

    def __len__(self) -> int:
        """Number of ids."""
        return len(self._number)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._number

    def add(self, node_id: str, keys: Iterable[int]) -> None:
        """More keys of an id."""
        self.settle()
        number = self._number_of(node_id)
        for key in keys:
            self._entries.recent.setdefault(key, []).append(number)
            self._recent_count += 1
        if self._recent_count > max(_FEW, len(self._entries.keys) // _SHARE):
            self._merge()

    def extend(self, ids: Sequence[str], keys: Keys, whose: npt.NDArray[np.integer]) -> None:
        """Add many keys at once: `keys[i]` is one of `ids[whose[i]]`."""
        numbers = np.fromiter(map(self._number_of, ids), np.uint32, len(ids))
        self._batches.append(_sorted(keys, numbers[whose]))

    def remove(self, node_id: str) -> None:
        """Forget an id; unknown ones are ignored."""
        number = self._number.pop(node_id, None)
        if number is not None:
            self._entries.ids[number] = None

    def find(self, key: int) -> Iterator[str]:
        """The ids of a key, most recently added first."""
        self.settle()
        entries = self._entries
        found = (entries.ids[number] for number in _numbers(entries, key))
        return (node_id for node_id in found if node_id is not None)

    def most_often(self, keys: Keys, each: int, count: int) -> list[str]:
        """The `count` ids that have most of the keys, best first; of equals, the most recently
        added first. Only the last `each` ids of each key count."""
        self.settle()
        entries = self._entries
        last = entries.keys.searchsorted(keys, "right")
        first = np.maximum(entries.keys.searchsorted(keys), last - each)
        lengths = last - first
        at = np.arange(lengths.sum()) + (first - lengths.cumsum() + lengths).repeat(lengths)
        recent = [n for key in keys.tolist() for n in entries.recent.get(key, ())[-each:]]
        both = np.concatenate((entries.numbers[at], np.asarray(recent, np.uint32)))
        numbers, votes = np.unique(both, return_counts=True)
        order = np.lexsort((numbers, votes))[::-1]
        ids = (entries.ids[number] for number in numbers[order].tolist())
        return list(islice((node_id for node_id in ids if node_id is not None), count))

    def known(self, keys: Sequence[int]) -> list[bool]:
        """For each key whether `find` may find an id; False if it finds none."""
        self.settle()
        packed, _, recent, _ = self._entries
        if not len(packed):
            return [key in recent for key in keys]
        sought = np.asarray(keys, np.uint64)
        there = packed.take(packed.searchsorted(sought), mode="clip") == sought
        return [sure or key in recent for key, sure in zip(keys, there.tolist(), strict=True)]

    def settle(self) -> None:
        """Do the work now that the next question would wait for."""
        if self._batches:
            self._merge()

    def _number_of(self, node_id: str) -> int:
        ids = self._entries.ids
        number = self._number.setdefault(node_id, len(ids))
        if number == len(ids):
            ids.append(node_id)
        return number

    def _merge(self) -> None:
        """Merge into the arrays, without entries of removed ids if there are many."""
        keys, numbers, recent, ids = self._entries
        counts = np.fromiter(map(len, recent.values()), np.int64, len(recent))
        late = np.fromiter(recent.keys(), np.uint64, len(recent)).repeat(counts)
        flat = (number for each in recent.values() for number in each)
        added = _sorted(late, np.fromiter(flat, np.uint32, self._recent_count))
        parts = [added, *self._batches]
        if _SHARE * (len(ids) - len(self._number)) > len(ids):
            ids, parts = _without_gaps(ids, [(keys, numbers), *parts])
            keys, numbers = parts.pop(0)
            self._number = {str(node_id): at for at, node_id in enumerate(ids)}
        both = (np.concatenate(each) for each in zip((keys, numbers), *parts, strict=True))
        self._entries = _Entries(*_sorted(*both), {}, ids)
        self._recent_count, self._batches = 0, []


def factors(count: int) -> Keys:
    """Odd numbers that this process has drawn; the first of more are the same. Keys that are sums
    of products with them collide by chance only: nobody else knows them."""
    return _drawn(count.bit_length())[:count]


@functools.cache
def _drawn(bits: int) -> Keys:
    drawn = blake3.blake3(_SECRET).digest(length=8 << bits)
    return np.frombuffer(drawn, np.uint64) | np.uint64(1)


_SECRET = secrets.token_bytes(32)


def _sorted(keys: Keys, numbers: Numbers) -> tuple[Keys, Numbers]:
    """By key; equal keys stay in their order. Parts that are sorted already are only merged, which
    takes a third of the time."""
    order = keys.argsort(kind="stable")
    return keys[order], numbers[order]


def _numbers(entries: _Entries, key: int) -> Iterator[int]:
    """The ids of a key, most recent first."""
    yield from reversed(entries.recent.get(key, ()))
    keys, sought = entries.keys, np.uint64(key)  # a Python number would be compared as a float
    at = int(keys.searchsorted(sought))
    if at < len(keys) and keys[at] == sought:
        several = at + 1 < len(keys) and keys[at + 1] == sought
        end = int(keys.searchsorted(sought, "right")) if several else at + 1
        yield from map(int, entries.numbers[at:end][::-1])


def _without_gaps(
    ids: list[str | None], parts: list[tuple[Keys, Numbers]]
) -> tuple[list[str | None], list[tuple[Keys, Numbers]]]:
    """Renumber the remaining ids and drop the entries of the others."""
    here = np.fromiter((node_id is not None for node_id in ids), np.bool_, len(ids))
    number = here.cumsum(dtype=np.uint32) - np.uint32(1)
    kept = [(keys, numbers, here[numbers]) for keys, numbers in parts]
    left = [node_id for node_id in ids if node_id is not None]
    return [*left], [(keys[those], number[numbers[those]]) for keys, numbers, those in kept]
