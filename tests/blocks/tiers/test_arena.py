"""The arena: memory without a name that only its owner can write, and labels that protect
readers."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.blocks.tiers.host import arena as arena_module
from kvshare_store.blocks.tiers.host import huge_pages, memory
from kvshare_store.blocks.tiers.host.arena import Arena, Arenas, ArenaView, Label, slot_bytes
from kvshare_store.errors import HomeError, KVShareError, LeaseError, NoSpaceError, StorageError
from kvshare_store.plan import BlockRef

NAME, OTHER = "ab" * 32, "cd" * 32
PAGE = mmap.PAGESIZE


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(16 * PAGE)
    yield arena
    arena.close()


@given(st.integers(0, 10_000))
def test_a_slot_holds_its_label_and_rows(nbytes: int) -> None:
    assert slot_bytes(nbytes) % 64 == 0
    assert slot_bytes(nbytes) >= 64 + nbytes
    assert slot_bytes(nbytes) < 64 + nbytes + 64


# --- the file -----------------------------------------------------------------------------------


def test_it_has_no_name_that_anybody_could_open_or_take(arena: Arena) -> None:
    """There is no name at which two daemons with the same home path, or an attacker, could meet."""
    assert os.fstat(arena.descriptor).st_nlink == 0
    other = Arena.create(16 * PAGE)
    assert other.id != arena.id
    other.set_label(0, NAME)
    assert arena.label(0) == Label()
    other.close()


def test_nobody_but_its_owner_writes(arena: Arena) -> None:
    """The descriptor that clients get allows no write, neither by a call nor by any kind of
    mapping."""
    arena.rows(0, 5)[:] = b"owner"
    received = os.dup(arena.descriptor)
    with pytest.raises(PermissionError):
        os.pwrite(received, b"other", 64)
    with pytest.raises(PermissionError):
        mmap.mmap(received, arena.nbytes)
    for nbytes in (0, PAGE, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(received, nbytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(received, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    again = os.open(f"/proc/self/fd/{received}", os.O_RDWR)  # with the rights of the same user
    with pytest.raises(PermissionError):
        mmap.mmap(again, arena.nbytes)
    view = ArenaView.attach(received)
    with pytest.raises(TypeError):
        view.rows(0, 5)[:] = b"other"
    for descriptor in (received, again):
        os.close(descriptor)
    assert bytes(arena.rows(0, 5)) == b"owner"


def test_what_the_owner_writes_its_readers_see(arena: Arena) -> None:
    view = ArenaView.attach(arena.descriptor)
    arena.rows(128, 5)[:] = b"hello"
    seq = arena.set_label(128, NAME, lossy=True)
    assert view.label(128) == Label(NAME, seq, True)
    assert bytes(view.rows(128, 5)) == b"hello"


def test_more_than_the_machine_has() -> None:
    with pytest.raises(HomeError, match="lower host_bytes, or raise the memory limit"):
        Arena.create(1 << 60)


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.EFBIG, "limits"), (errno.ENOMEM, "limits"), (errno.EINVAL, "5.1")]
)
def test_what_the_system_refuses_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    """A limit of this process is no matter of the kernel's release."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(HomeError) as refused:
        Arena.create(PAGE)
    assert [word for word in ("limits", "5.1") if word in str(refused.value)] == [advice]


def test_a_slot_outside_the_file_has_no_memory(arena: Arena) -> None:
    arena.ensure(0, 1024)
    with pytest.raises(NoSpaceError):
        arena.ensure(-64, 1024)


def test_closing_it_frees_its_memory() -> None:
    arena = Arena.create(PAGE)
    link = f"/proc/self/fd/{arena.descriptor}"
    inode = os.stat(link).st_ino
    arena.close()
    arena.close()
    with pytest.raises(StorageError, match="closed"):
        arena.label(0)
    for name in os.listdir("/proc/self/fd"):
        try:
            assert os.stat(f"/proc/self/fd/{name}").st_ino != inode
        except FileNotFoundError:
            continue
    assert f":{inode} " not in Path("/proc/self/maps").read_text()


# --- a client's mapping -------------------------------------------------------------------------


def no_arena(kind: str) -> int:
    """A descriptor that a broken or killed daemon might pass on."""
    if kind == "socket":
        one, other = socket.socketpair()
        other.close()
        return one.detach()
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, {"empty": 0, "too small": 64, "not sealed": 4096}[kind])
    if kind != "not sealed":
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return descriptor


@pytest.mark.parametrize("kind", ["empty", "too small", "not sealed", "socket"])
def test_what_is_no_arena_is_a_miss_and_not_a_crash(kind: str) -> None:
    """An empty file cannot be mapped; a file that can shrink would crash its readers."""
    arenas = Arenas()
    descriptor = no_arena(kind)
    with pytest.raises(KVShareError, match="shared memory"):
        arenas.add("id", descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(LeaseError):
        arenas.at("id")


def test_a_process_maps_the_arena_of_the_daemon_of_now(arena: Arena) -> None:
    arenas = Arenas()
    arenas.add(arena.id, os.dup(arena.descriptor))
    mapped = arenas.at(arena.id)
    arenas.add(arena.id, os.dup(arena.descriptor))
    assert arenas.at(arena.id) is mapped
    other = Arena.create(8192)
    arenas.add(other.id, os.dup(other.descriptor))
    assert arenas.at(other.id).nbytes == 8192
    with pytest.raises(LeaseError, match="another daemon"):
        arenas.at(arena.id)
    other.close()


def test_mapped_arenas_leave_no_descriptors_behind() -> None:
    arenas, before = Arenas(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        arena = Arena.create(4096)
        arenas.add(arena.id, os.dup(arena.descriptor))
        arena.close()
    assert len(os.listdir("/proc/self/fd")) < before + 5


# --- labels -------------------------------------------------------------------------------------


def test_a_reader_is_told_when_the_block_has_left(arena: Arena) -> None:
    reader = ArenaView.attach(arena.descriptor)
    ref = BlockRef(NAME, 1, 128, 256, arena.set_label(256, NAME))
    reader.check(ref)
    arena.clear_label(256)
    with pytest.raises(LeaseError):
        reader.check(ref)
    arena.set_label(256, OTHER)
    with pytest.raises(LeaseError):
        reader.check(ref)


def test_the_same_block_in_the_same_place_again_is_another_copy(arena: Arena) -> None:
    """Other rows may have been there in between, while a slow reader was copying."""
    reader = ArenaView.attach(arena.descriptor)
    ref = BlockRef(NAME, 1, 128, 256, arena.set_label(256, NAME))
    arena.clear_label(256)
    again = arena.set_label(256, NAME)
    assert again != ref.seq
    with pytest.raises(LeaseError):
        reader.check(ref)
    reader.check(BlockRef(NAME, 1, 128, 256, again))


def test_rounded_rows_are_not_the_exact_ones_that_were_planned(arena: Arena) -> None:
    reader = ArenaView.attach(arena.descriptor)
    seq = arena.set_label(256, NAME, lossy=True)
    reader.check(BlockRef(NAME, 1, 128, 256, seq, True))
    with pytest.raises(LeaseError):
        reader.check(BlockRef(NAME, 1, 128, 256, seq, False))


@pytest.mark.parametrize("offset", [-1, -64, 16 * PAGE, 16 * PAGE - 96, 1 << 40])
def test_a_place_outside_the_arena_is_refused(arena: Arena, offset: int) -> None:
    with pytest.raises(LeaseError):
        arena.check(BlockRef(NAME, 1, 128, offset))


# --- wiping -------------------------------------------------------------------------------------


def backed(arena: Arena) -> int:
    """Bytes of memory that the arena takes."""
    return os.fstat(arena.descriptor).st_blocks * 512


def test_wiping_zeroes_what_was_written_and_takes_no_memory_for_the_rest(arena: Arena) -> None:
    arena.rows(2 * PAGE, 100)[:] = b"s" * 100
    arena.rows(9 * PAGE, 2 * PAGE)[:] = b"t" * (2 * PAGE)
    before = backed(arena)
    assert before < 16 * PAGE
    arena.wipe(PAGE, 14 * PAGE)
    assert backed(arena) == before
    view = ArenaView.attach(arena.descriptor)
    assert bytes(view.rows(0, 15 * PAGE)) == bytes(15 * PAGE)


def test_wiping_stays_within_its_range(arena: Arena) -> None:
    arena.rows(0, 300)[:] = b"x" * 300
    arena.wipe(164, 100)
    assert bytes(arena.rows(0, 300)) == b"x" * 100 + bytes(100) + b"x" * 100


# --- how much memory there is -------------------------------------------------------------------


def groups(folder: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "own").write_text(own)
    monkeypatch.setattr(memory, "_CGROUPS", folder)
    monkeypatch.setattr(memory, "_OWN", folder / "own")


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (
            "0::/pod/box\n",
            {
                "pod/memory.max": "9000000\n",
                "pod/memory.current": "4000000\n",
                "pod/memory.stat": "anon 1\ninactive_file 1000000\n",
                "pod/box/memory.max": "max\n",
                "pod/box/memory.current": "4000000\n",
            },
        ),
        (
            "3:cpu:/x\n2:memory:/box\n0::/\n",
            {
                "memory/box/memory.limit_in_bytes": "9000000\n",
                "memory/box/memory.usage_in_bytes": "4000000\n",
                "memory/box/memory.stat": "inactive_file 7\ntotal_inactive_file 1000000\n",
            },
        ),
    ],
    ids=["version 2, a limit above", "version 1"],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]
) -> None:
    groups(tmp_path, monkeypatch, own, files)
    assert memory.available_bytes() == 6_000_000
    Arena.create(5_000_000).close()
    with pytest.raises(HomeError, match="6,000,000 bytes of memory are available"):
        Arena.create(7_000_000)


def test_without_cgroups_the_machine_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups(tmp_path, monkeypatch, "0::/\n", {})
    assert memory.available_bytes() > 1 << 24
    (tmp_path / "own").unlink()
    assert memory.available_bytes() > 1 << 24


# --- huge pages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "offered"),
    [("always", True), ("within_size", True), ("advise", True), ("force", True),
     ("never", False), ("deny", False)],
)  # fmt: skip
def test_the_system_says_whether_there_are_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, offered: bool
) -> None:
    words = ["always", "within_size", "advise", "never", "deny", "force"]
    setting = " ".join(f"[{word}]" if word == chosen else word for word in words)
    (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path / "enabled")
    assert huge_pages.offered() is offered
    (tmp_path / "enabled").unlink()
    assert not huge_pages.offered()


@pytest.mark.parametrize("offered", [True, False])
def test_an_arena_works_with_huge_pages_or_without(
    monkeypatch: pytest.MonkeyPatch, offered: bool
) -> None:
    monkeypatch.setattr(huge_pages, "offered", lambda: offered)
    arena = Arena.create(1 << 22, huge=True)
    assert offered or not arena.huge_pages
    arena.ensure(1 << 20, 5)
    arena.rows(1 << 20, 5)[:] = b"hello"
    assert bytes(ArenaView.attach(arena.descriptor).rows(1 << 20, 5)) == b"hello"
    arena.close()
    assert not Arena.create(1 << 22).huge_pages


def test_a_system_without_seals_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_SEALS", 1 << 30)  # as on an older kernel
    with pytest.raises(HomeError, match=r"Linux 5\.1 or later"):
        Arena.create(4096)
