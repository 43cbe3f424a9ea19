"""The arena: its allocator against a byte map, its file, and the labels that guard readers."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.blocks.arena import Allocator, Arena, Arenas, remove_abandoned, slot_bytes
from kvshare_store.errors import HomeError, LeaseError, NoSpaceError
from kvshare_store.plan import BlockRef

NAME, OTHER = "ab" * 32, "cd" * 32


# --- allocator ----------------------------------------------------------------------------------


def free_runs(taken: list[bool]) -> list[tuple[int, int]]:
    found, at = [], 0
    while at < len(taken):
        stop = at
        while stop < len(taken) and not taken[stop]:
            stop += 1
        if stop > at:
            found.append((at, stop - at))
        at = max(stop, at + 1)
    return found


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 50)), max_size=120))
def test_the_allocator_against_a_byte_map(steps: list[tuple[bool, int, int]]) -> None:
    allocator = Allocator(200)
    taken = [False] * 200
    held: list[tuple[int, int]] = []
    for allocates, size, which in steps:
        if allocates:
            offset = allocator.allocate(size)
            fitting = [start for start, length in free_runs(taken) if length >= size]
            assert (offset is None) == (not fitting)
            if offset is not None:
                assert offset == fitting[0]
                assert not any(taken[offset : offset + size])
                taken[offset : offset + size] = [True] * size
                held.append((offset, size))
        elif held:
            offset, size = held.pop(which % len(held))
            allocator.free(offset)
            taken[offset : offset + size] = [False] * size
        assert allocator.used == sum(taken)
        assert allocator.largest == max((length for _, length in free_runs(taken)), default=0)
    for offset, _ in held:
        allocator.free(offset)
    assert (allocator.used, allocator.largest) == (0, 200)
    assert allocator.allocate(200) == 0


def test_freeing_twice_is_an_error() -> None:
    allocator = Allocator(100)
    offset = allocator.allocate(10)
    assert offset is not None
    allocator.free(offset)
    with pytest.raises(KeyError):
        allocator.free(offset)


@given(st.integers(0, 10_000))
def test_a_slot_holds_its_label_and_rows(nbytes: int) -> None:
    assert slot_bytes(nbytes) % 64 == 0
    assert slot_bytes(nbytes) >= 64 + nbytes
    assert slot_bytes(nbytes) < 64 + nbytes + 64


# --- the file -----------------------------------------------------------------------------------


def test_only_the_owner_can_open_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        arena = Arena.create(tmp_path / "arena", 4096)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(arena.path).st_mode) == 0o600
    arena.close(unlink=True)
    assert not arena.path.exists()


def test_an_arena_open_to_others_is_not_mapped(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path / "arena", 4096)
    arena.path.chmod(0o640)
    with pytest.raises(HomeError, match="open to other users"):
        Arena.attach(arena.path)
    arena.close()


def test_an_arena_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="cannot be mapped"):
        Arena.attach(tmp_path / "arena")


def test_more_than_the_machine_has(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="lower host_bytes"):
        Arena.create(tmp_path / "arena", 1 << 60)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(HomeError):
        Arena.create(tmp_path / "no such folder" / "arena", 4096)


def test_a_slot_outside_the_file_has_no_memory(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path / "arena", 4096)
    arena.ensure(0, 1024)
    with pytest.raises(NoSpaceError):
        arena.ensure(-64, 1024)
    arena.close()


def test_a_new_owner_makes_a_new_file(tmp_path: Path) -> None:
    first = Arena.create(tmp_path / "arena", 4096)
    first.set_label(0, NAME)
    second = Arena.create(tmp_path / "arena", 4096)
    assert (first.current, second.current) == (False, True)
    assert (first.label(0), second.label(0)) == (NAME, "")
    first.close()
    second.close(unlink=True)
    assert not second.current


def test_mapped_arenas_follow_the_file(tmp_path: Path) -> None:
    path, arenas = tmp_path / "arena", Arenas()
    first = Arena.create(path, 4096)
    mapped = arenas.at(str(path))
    assert arenas.at(str(path)) is mapped
    second = Arena.create(path, 8192)
    again = arenas.at(str(path))
    assert again is not mapped
    assert again.nbytes == 8192
    for arena in (first, second):
        arena.close()
    arenas.close()


def test_mapped_arenas_leave_no_descriptors_behind(tmp_path: Path) -> None:
    path, arenas = tmp_path / "arena", Arenas()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        arena = Arena.create(path, 4096)
        arenas.at(str(path))
        arena.close()
        del arena
    arenas.close()
    assert len(os.listdir("/proc/self/fd")) < before + 10


# --- labels -------------------------------------------------------------------------------------


def test_what_one_side_writes_the_other_reads(tmp_path: Path) -> None:
    owner = Arena.create(tmp_path / "arena", 4096)
    reader = Arena.attach(tmp_path / "arena")
    owner.rows(128, 5)[:] = b"hello"
    owner.set_label(128, NAME)
    assert reader.label(128) == NAME
    assert bytes(reader.rows(128, 5)) == b"hello"
    reader.rows(128, 5)[:] = b"adieu"
    assert bytes(owner.rows(128, 5)) == b"adieu"
    owner.close()
    reader.close()


def test_a_reader_is_told_when_the_block_has_left(tmp_path: Path) -> None:
    owner = Arena.create(tmp_path / "arena", 4096)
    reader = Arena.attach(tmp_path / "arena")
    ref = BlockRef(NAME, 1, 128, 256)
    owner.set_label(256, NAME)
    reader.check(ref)
    for label in ("", OTHER):
        owner.set_label(256, label)
        with pytest.raises(LeaseError):
            reader.check(ref)
    owner.set_label(256, NAME)
    reader.check(ref)
    owner.close()
    reader.close()


@pytest.mark.parametrize("offset", [-1, -64, 4096, 4000, 1 << 40])
def test_a_place_outside_the_arena_is_refused(tmp_path: Path, offset: int) -> None:
    arena = Arena.create(tmp_path / "arena", 4096)
    with pytest.raises(LeaseError):
        arena.check(BlockRef(NAME, 1, 128, offset))
    arena.close()


def test_an_arena_goes_with_its_owner_even_when_that_was_killed(tmp_path: Path) -> None:
    """The lock of a living owner keeps its arena; a dead owner's is found and removed."""
    living = Arena.create(tmp_path / "kvshare-living", 4096)
    (tmp_path / "kvshare-dead").write_bytes(bytes(4096))  # nobody holds its lock
    (tmp_path / "other-file").write_bytes(b"x")
    remove_abandoned(tmp_path, "kvshare-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kvshare-living", "other-file"]
    living.close(unlink=True)
