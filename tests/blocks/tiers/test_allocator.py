"""The allocator: compared with a byte map, and after long churn with almost nothing free."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.blocks.tiers.allocator import SLIDE, Allocator, Move

Steps = list[tuple[str, int, int]]


def free_runs(taken: list[int]) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(taken):
        stop = at
        while stop < len(taken) and not taken[stop]:
            stop += 1
        if stop > at:
            yield at, stop - at
        at = max(stop, at + 1)


def copied(taken: list[int], move: Move) -> None:
    """Moves and clears bytes as the allocator orders."""
    rows = taken[move.source : move.source + move.size]
    taken[move.source : move.source + move.size] = [0] * move.size
    taken[move.target : move.target + move.size] = rows


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["allocate", "allocate", "free", "gather"]),
            st.integers(1, 40),
            st.integers(0, 50),
        ),
        max_size=120,
    )
)
def test_the_allocator_against_a_byte_map(steps: Steps) -> None:
    """The bytes of every slot carry its number through all allocations, frees and moves."""
    allocator, taken, held = Allocator(200), [0] * 200, dict[int, tuple[int, int]]()
    for number, (step, size, which) in enumerate(steps, 1):
        if step == "allocate":
            fitting = [run for run in free_runs(taken) if run[1] >= size]
            offset = allocator.allocate(size)
            assert (offset is None) == (not fitting)
            if offset is not None:
                assert (offset, min(length for _, length in fitting)) in fitting, "best fit"
                taken[offset : offset + size] = [number] * size
                held[offset] = (number, size)
        elif step == "free" and held:
            offset = sorted(held)[which % len(held)]
            allocator.free(offset)
            taken[offset : offset + held.pop(offset)[1]] = [0] * taken.count(taken[offset])
        elif step == "gather":
            gathered(allocator, taken, held, size, which)
        assert allocator.used == sum(map(bool, taken))
        assert allocator.free_ranges() == list(free_runs(taken))
        for offset, (owner, length) in held.items():
            assert taken[offset : offset + length] == [owner] * length
    for offset in held:
        allocator.free(offset)
    assert (allocator.used, allocator.free_ranges()) == (0, [(0, 200)])
    assert allocator.allocate(200) == 0


def gathered(
    allocator: Allocator,
    taken: list[int],
    held: dict[int, tuple[int, int]],
    size: int,
    pinned: int,
) -> None:
    """Slide slots together; those with every `pinned`th number must stay where they are."""
    stay = {offset for offset, (number, _) in held.items() if pinned and number % pinned == 0}
    moves = allocator.moves(size, lambda offset: offset not in stay)
    for move in moves:
        assert move.source not in stay
        assert 0 <= move.target < move.source
        held[move.target] = held.pop(move.source)
        copied(taken, move)
        allocator.moved(move)
    if moves:
        assert sum(move.size for move in moves) <= SLIDE * size
        assert any(length >= size for _, length in free_runs(taken))
    elif not stay and allocator.free_bytes >= 200 // (SLIDE + 1) + size:
        assert any(length >= size for _, length in allocator.free_ranges()), (
            "the bound that the module promises"
        )


def test_freeing_twice_is_an_error() -> None:
    allocator = Allocator(100)
    offset = allocator.allocate(10)
    assert offset is not None
    allocator.free(offset)
    with pytest.raises(KeyError):
        allocator.free(offset)


def test_the_cheapest_window_is_chosen() -> None:
    """Two holes with a small slot between them, two with a large one: the small one moves."""
    allocator = Allocator(1000)
    sizes = [50, 300, 50, 200, 50, 20, 50, 280]
    slots = [allocator.allocate(size) for size in sizes]
    for index in (0, 2, 4, 6):
        allocator.free(slots[index] or 0)
    small = Move(slots[5] or 0, slots[4] or 0, 20)
    assert allocator.moves(100, lambda offset: True) == [small]
    around = allocator.moves(100, lambda offset: offset != small.source)
    assert [move.source for move in around] == [slots[3]], "the next best, when that must stay"
    assert allocator.moves(100, lambda offset: False) == []


# --- a week of churn --------------------------------------------------------------------------


ROW = 4
LARGEST = 64 * ROW + 1
ARENA = 300 * LARGEST
EPOCH = 10_000


class FirstFit:
    """A simple allocator to compare with: the lowest free range that is large enough; nothing
    moves."""

    def __init__(self, nbytes: int) -> None:
        self.free_bytes = nbytes
        self._free = [(0, nbytes)]
        """Offset and bytes of every free range, ascending."""
        self._sizes: dict[int, int] = {}

    def allocate(self, size: int) -> int | None:
        for at, (start, free) in enumerate(self._free):
            if free >= size:
                self._free[at : at + 1] = [(start + size, free - size)] if free > size else []
                self._sizes[start] = size
                self.free_bytes -= size
                return start
        return None

    def free(self, offset: int) -> None:
        size = self._sizes.pop(offset)
        self.free_bytes += size
        at = bisect_left(self._free, (offset, 0))
        if at < len(self._free) and self._free[at][0] == offset + size:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == offset:
            at -= 1
            offset, before = self._free.pop(at)
            size += before
        self._free.insert(at, (offset, size))

    def moves(self, size: int, movable: Callable[[int], bool]) -> list[Move]:
        return []

    def moved(self, move: Move) -> None:
        raise AssertionError("nothing moves")


class Live:
    """Offsets of the slots in use; a random one is found in constant time."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._at: dict[int, int] = {}

    def add(self, offset: int) -> None:
        self._at[offset] = len(self._offsets)
        self._offsets.append(offset)

    def rename(self, old: int, new: int) -> None:
        at = self._at[new] = self._at.pop(old)
        self._offsets[at] = new

    def pop(self, chance: float) -> int:
        at = int(chance * len(self._offsets))
        offset, last = self._offsets[at], self._offsets.pop()
        if last != offset:
            self._offsets[at] = last
            self._at[last] = at
        del self._at[offset]
        return offset


class Churned(NamedTuple):
    most_free: float
    """The largest free share of the arena when a block found no room."""
    moved: float
    """Bytes moved for each byte placed."""


def placed(allocator: Allocator | FirstFit, size: int, live: Live) -> tuple[int | None, int]:
    """The offset for a slot and the bytes that moved for it, as in the host tier."""
    offset, moved = allocator.allocate(size), 0
    if offset is None:
        for move in allocator.moves(size, lambda offset: True):
            allocator.moved(move)
            live.rename(move.source, move.target)
            moved += move.size
        offset = allocator.allocate(size)
    return offset, moved


def churn(allocator: Allocator | FirstFit, allocations: int, live: Live) -> Churned:
    """Blocks of 1 to 64 rows are placed; until one fits, others are evicted by chance.

    Epochs take turns: small blocks, all sizes, large ones only. What is left of one lies scattered
    in the way of the next.
    """
    chance = random.Random(7)
    total = moved = most_free = 0
    for number in range(allocations):
        most_rows = (6, 64, 64)[number // EPOCH % 3]
        large = number // EPOCH % 3 == 2 or (most_rows == 64 and chance.random() < 0.5)
        size = ROW * (64 if large else int(chance.random() * most_rows) + 1) + 1
        while True:
            offset, bytes_moved = placed(allocator, size, live)
            moved += bytes_moved
            if offset is not None:
                break
            most_free = max(most_free, allocator.free_bytes)
            allocator.free(live.pop(chance.random()))
        live.add(offset)
        total += size
    return Churned(most_free / ARENA, moved / total)


def free_up(allocator: Allocator | FirstFit, nbytes: int, live: Live) -> None:
    """Evict random slots until `wanted` bytes are free in all."""
    chance = random.Random(8)
    while allocator.free_bytes < nbytes:
        allocator.free(live.pop(chance.random()))


BOUND = ARENA // (SLIDE + 1) + LARGEST
"""The promise of the module: with so many bytes free, the largest block finds room."""


def test_long_churn_leaves_room_for_the_largest_block() -> None:
    allocator, live = Allocator(ARENA), Live()
    churned = churn(allocator, 9 * EPOCH, live)
    assert churned.most_free <= BOUND / ARENA
    free_up(allocator, BOUND, live)
    while allocator.free_bytes >= BOUND:
        assert placed(allocator, LARGEST, live)[0] is not None
    assert churned.moved < 1, "more work moving than writing"


def test_the_churn_is_one_that_first_fit_does_not_survive() -> None:
    allocator, live = FirstFit(ARENA), Live()
    assert churn(allocator, 3 * EPOCH, live).most_free > 3 * BOUND / ARENA
    allocator, live = FirstFit(ARENA), Live()
    churn(allocator, EPOCH, live)  # small blocks only
    free_up(allocator, BOUND, live)
    assert placed(allocator, LARGEST, live)[0] is None
