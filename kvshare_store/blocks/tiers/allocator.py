"""Ranges of the arena: best fit, neighbours joined, and slots that slide together when they must.

What is free may lie in pieces too small for the next block. Then a *window* is chosen: slots and
free ranges side by side with enough free bytes in all, whose slots slide to its beginning. Slides
are cheap or not done: nothing moves before 1 / `SPARE` of the arena is free, and at most `SLIDE`
bytes move for each byte that is asked for.

The bound on waste: with S bytes asked for, A bytes in all and nothing pinned, S are found as soon
as A / (SLIDE + 1) + S are free. For, cut the arena into stretches of S free bytes each; there are
at least free / S - 1 of them, and the one with the fewest taken bytes has at most SLIDE * S.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import NamedTuple

SLIDE = 16
SPARE = 32
"""Below this share of free bytes, slides would be long and happen at nearly every allocation."""


class Move(NamedTuple):
    """A slot moves to a lower offset; the two ranges may overlap."""

    source: int
    target: int
    size: int


class Allocator:
    """Offsets and sizes in bytes. An allocation costs a few bisections of the free ranges."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used = 0
        self._taken: dict[int, int] = {}
        self._starts = [0]
        """Offsets of the free ranges, ascending; `_free` has their sizes."""
        self._free = {0: nbytes}
        self._by_size = [(nbytes, 0)]

    @property
    def free_bytes(self) -> int:
        """Free bytes in total."""
        return self.nbytes - self.used

    def allocate(self, size: int) -> int | None:
        """Offset of `size` bytes at the start of the smallest free range that has them, or None."""
        at = bisect_left(self._by_size, (size, 0))
        if at == len(self._by_size):
            return None
        free, start = self._by_size[at]
        if free == size:
            self._take_range(start)
        else:
            self._cut(start, size)
        self._taken[start] = size
        self.used += size
        return start

    def _cut(self, start: int, size: int) -> None:
        """Take the beginning of a free range."""
        free = self._free.pop(start)
        self._free[start + size] = free - size
        self._starts[bisect_left(self._starts, start)] = start + size
        del self._by_size[bisect_left(self._by_size, (free, start))]
        insort(self._by_size, (free - size, start + size))

    def free(self, offset: int) -> None:
        """Give a slot back; `KeyError` if it is not allocated."""
        size = self._taken.pop(offset)
        self.used -= size
        if offset + size in self._free:
            size += self._take_range(offset + size)
        at = bisect_left(self._starts, offset)
        if at and self._starts[at - 1] + self._free[self._starts[at - 1]] == offset:
            offset = self._starts[at - 1]
            size += self._take_range(offset)
        self._give_range(offset, size)

    def _take_range(self, offset: int) -> int:
        size = self._free.pop(offset)
        del self._starts[bisect_left(self._starts, offset)]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        return size

    def _give_range(self, offset: int, size: int) -> None:
        self._free[offset] = size
        insort(self._starts, offset)
        insort(self._by_size, (size, offset))

    def size_of(self, offset: int) -> int:
        """Bytes of the slot at an offset; `KeyError` if it is not allocated."""
        return self._taken[offset]

    def free_ranges(self) -> list[tuple[int, int]]:
        """Offset and bytes of everything that is free, ascending."""
        return [(start, self._free[start]) for start in self._starts]

    # --- moving -------------------------------------------------------------------------------

    def moves(self, size: int, movable: Callable[[int], bool]) -> list[Move]:
        """The cheapest moves after which `size` bytes lie free in a row; empty if there are none.

        `movable` says of a slot's offset whether it may move. Each move is to be copied, and told
        to `moved`, in this order.
        """
        if self.free_bytes < max(size, self.nbytes // SPARE):
            return []
        for _, start, stop in sorted(self._windows(size)):
            slots = list(self._slots(start, stop))
            if all(movable(slot) for slot in slots):
                return self._slide(start, slots)
        return []

    def _windows(self, size: int) -> Iterator[tuple[int, int, int]]:
        """(taken bytes, start, stop) from one free range to another: for each last range the
        shortest window with `size` free bytes, so any that would do has one of these inside."""
        starts, sizes = self._starts, [self._free[start] for start in self._starts]
        free = first = 0
        for last, start in enumerate(starts):
            free += sizes[last]
            while free - sizes[first] >= size:
                free -= sizes[first]
                first += 1
            taken = start + sizes[last] - starts[first] - free
            if free >= size and taken <= SLIDE * size:
                yield taken, starts[first], start + sizes[last]

    def _slots(self, start: int, stop: int) -> Iterator[int]:
        at = start
        while at < stop:
            if at in self._free:
                at += self._free[at]
            else:
                yield at
                at += self._taken[at]

    def _slide(self, start: int, slots: list[int]) -> list[Move]:
        found = []
        for slot in slots:
            found.append(Move(slot, start, self._taken[slot]))
            start += self._taken[slot]
        return found

    def moved(self, move: Move) -> None:
        """Tell the allocator that the bytes of a move were copied."""
        self.free(move.source)
        self._cut(move.target, move.size)
        self._taken[move.target] = move.size
        self.used += move.size
