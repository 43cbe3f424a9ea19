"""The arena: its file, and the labels that guard readers."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.blocks import huge_pages
from kvshare_store.blocks.arena import Arena, Arenas, remove_abandoned, slot_bytes
from kvshare_store.errors import HomeError, LeaseError, NoSpaceError
from kvshare_store.plan import BlockRef

NAME, OTHER = "ab" * 32, "cd" * 32


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


# --- huge pages ---------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the system says about shared memory, in files of the test's."""
    (tmp_path / "enabled").write_text("always within_size [advise] never deny force\n")
    mounts = [
        "22 1 0:20 / / rw - ext4 /dev/root rw",
        f"31 22 0:27 / {tmp_path} rw,nosuid - tmpfs tmpfs rw,size=1g,huge=advise",
        f"32 22 0:28 / {tmp_path}/plain rw - tmpfs tmpfs rw",
    ]
    (tmp_path / "mounts").write_text("\n".join(mounts))
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path / "enabled")
    monkeypatch.setattr(huge_pages, "_MOUNTS", tmp_path / "mounts")
    return tmp_path


def test_huge_pages_are_offered_by_the_mount_or_forced_by_the_system(system: Path) -> None:
    assert huge_pages.offered(system)
    assert huge_pages.offered(system / "folder")
    assert not huge_pages.offered(system / "plain")
    assert not huge_pages.offered(Path("/elsewhere"))
    for word, everywhere in (("force", True), ("deny", False)):
        (system / "enabled").write_text(f"always [{word}]")
        assert huge_pages.offered(system) is everywhere
        assert huge_pages.offered(system / "plain") is everywhere
    (system / "enabled").unlink()
    assert not huge_pages.offered(system)


def test_an_arena_works_with_huge_pages_or_without(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for offered in (True, False):
        monkeypatch.setattr(huge_pages, "offered", lambda folder, offered=offered: offered)
        arena = Arena.create(system / "arena", 1 << 22, huge=True)
        assert offered or not arena.huge_pages
        arena.ensure(1 << 20, 5)
        arena.rows(1 << 20, 5)[:] = b"hello"
        arena.close(unlink=True)
    assert not Arena.create(system / "arena", 1 << 22).huge_pages


def test_memory_that_cannot_be_had_is_an_error_with_huge_pages_too(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena.create(system / "arena", 1 << 22, huge=True)
    if not arena.huge_pages:
        pytest.skip("the system has no huge pages for shared memory")
    os.truncate(arena.path, 1 << 20)  # what lies behind the end of the file cannot be backed
    arena.ensure(0, 5)
    with pytest.raises(NoSpaceError):
        arena.ensure(1 << 21, 5)
    arena.close(unlink=True)
