"""Ids by 64-bit keys, packed: 12 bytes an entry, where a dictionary of Python takes 100."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]

_FEW = 4_096
_SHARE = 16
"""Entries are merged into the sorted ones when they are more than `_FEW`, and more than this
part of those: like the growth of a dictionary, rare and the rarer the more there are."""


class Postings:
    """Which ids were added with a key. Keys are hashes: whoever finds an id verifies it.

    Most entries lie in two arrays, sorted by key; what came lately is in a dictionary. An id has a
    number here. That of one that was removed stands for nobody, and its entries go with the next
    merge. Not thread-safe.
    """

    def __init__(self) -> None:
        self._keys: Keys = np.empty(0, np.uint64)
        self._numbers: Numbers = np.empty(0, np.uint32)
        """Of one key in the order in which they were added."""
        self._recent: dict[int, list[int]] = {}
        self._recent_count = 0
        self._batches: list[tuple[Keys, Numbers]] = []
        """What `extend` brought, until the next question."""
        self._ids: list[str | None] = []
        """By number."""
        self._number: dict[str, int] = {}

    def __len__(self) -> int:
        """How many ids there are."""
        return len(self._number)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._number

    def add(self, node_id: str, keys: Iterable[int]) -> None:
        """More keys of an id."""
        self.settle()
        number = self._number_of(node_id)
        for key in keys:
            self._recent.setdefault(key, []).append(number)
            self._recent_count += 1
        if self._recent_count > max(_FEW, len(self._keys) // _SHARE):
            self._merge()

    def extend(self, ids: Sequence[str], keys: Keys, whose: npt.NDArray[np.integer]) -> None:
        """Many keys at once: `keys[i]` is one of `ids[whose[i]]`."""
        numbers = np.fromiter(map(self._number_of, ids), np.uint32, len(ids))
        self._batches.append((keys, numbers[whose]))

    def remove(self, node_id: str) -> None:
        """Forget an id; unknown ones are ignored."""
        number = self._number.pop(node_id, None)
        if number is not None:
            self._ids[number] = None

    def find(self, key: int) -> Iterator[str]:
        """The ids of a key, the one added last first."""
        self.settle()
        found = self._found(key)
        return (node_id for number in found if (node_id := self._ids[number]) is not None)

    def _found(self, key: int) -> Iterator[int]:
        yield from reversed(self._recent.get(key, ()))
        if len(self._keys):
            sought = np.uint64(key)  # a Python number would be compared as a float
            at = int(self._keys.searchsorted(sought))
            if at < len(self._keys) and self._keys[at] == sought:
                end = int(self._keys.searchsorted(sought, "right"))
                yield from map(int, self._numbers[at:end][::-1])

    def settle(self) -> None:
        """Do now what the next question would wait for."""
        if self._batches:
            self._merge()

    def _number_of(self, node_id: str) -> int:
        number = self._number.setdefault(node_id, len(self._ids))
        if number == len(self._ids):
            self._ids.append(node_id)
        return number

    def _merge(self) -> None:
        """Entries of ids that left go, and the others are numbered anew."""
        counts = np.fromiter(map(len, self._recent.values()), np.int64, len(self._recent))
        keys = np.fromiter(self._recent.keys(), np.uint64, len(self._recent)).repeat(counts)
        flat = (number for numbers in self._recent.values() for number in numbers)
        numbers = np.fromiter(flat, np.uint32, self._recent_count)
        parts = [(self._keys, self._numbers), (keys, numbers), *self._batches]
        self._recent, self._recent_count, self._batches = {}, 0, []
        self._keys = np.concatenate([part[0] for part in parts])
        self._numbers = np.concatenate([part[1] for part in parts])
        if len(self._number) < len(self._ids):
            self._renumber()
        order = self._keys.argsort(kind="stable")
        self._keys, self._numbers = self._keys[order], self._numbers[order]

    def _renumber(self) -> None:
        here = np.fromiter((i is not None for i in self._ids), np.bool_, len(self._ids))
        kept = here[self._numbers]
        self._keys = self._keys[kept]
        self._numbers = (here.cumsum(dtype=np.uint32) - 1)[self._numbers[kept]]
        self._ids = [node_id for node_id in self._ids if node_id is not None]
        self._number = {str(node_id): at for at, node_id in enumerate(self._ids)}
