"""Archives: what is exported is imported elsewhere unchanged, and a damaged file changes
nothing."""

from __future__ import annotations

import errno
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.chores import do_chore
from kvshare_store.daemon.protocol import Export, Import
from kvshare_store.errors import (
    ConfigError,
    CorruptBlockError,
    FullDiskError,
    KVShareError,
    ShortBlockError,
    StorageError,
)
from kvshare_store.maintenance import moving
from kvshare_store.maintenance.archive import Writer, block_at, verified
from kvshare_store.maintenance.moving import export_nodes, import_nodes
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import encode_node
from kvshare_store.store import Store
from kvshare_store.tensors.frame import Block
from tests.support.neighbours import Machine
from tests.support.oracle import Driver
from tests.support.stores import Open
from tests.support.tiers import disk_level

Config = Callable[..., StoreConfig]


def prompt(seed: int = 1, length: int = 100) -> Tokens:
    return np.random.default_rng(seed).integers(0, 30_000, length).astype(np.int32)


def edited(tokens: Tokens) -> Tokens:
    changed = tokens.copy()
    changed[40:43] = (40_001, 40_002, 40_003)
    return changed


def filled(engine: Driver) -> list[str]:
    """An exact prompt, an edit of it, and another tenant's prompt."""
    ids = [engine.save(prompt())]
    plan = engine.plan(edited(prompt()))
    engine.finish(plan)
    ids.append(engine.save(edited(prompt()), plan))
    ids.append(
        Driver(engine.store, engine.namespace.for_tenant("alice"), engine.book).save(prompt(2))
    )
    engine.store.flush()
    assert all(ids)
    return [str(each) for each in ids]


def exported(engine: Driver, path: Path, **how: Any) -> Any:
    nodes = list(engine.store.tree)
    return export_nodes(engine.store.repository, nodes, path, plain=how.get("plain", False))


LONGEST = 255
"""Bytes that the name of a file may have."""


@pytest.fixture
def archive(driver: Open, tmp_path: Path) -> Path:
    """An archive of three nodes."""
    engine = driver()
    filled(engine)
    exported(engine, tmp_path / "a.kv")
    return tmp_path / "a.kv"


@pytest.fixture
def other(config: Config, tmp_path: Path) -> Callable[..., Store]:
    """`other(field=value)` opens the store of another home."""
    return lambda **changes: Store(config(home=str(tmp_path / "other"), **changes))


# --- there and back -------------------------------------------------------------------------------


def test_nodes_are_imported_as_they_were(
    driver: Open, other: Callable[..., Store], tmp_path: Path
) -> None:
    engine = driver()
    ids = filled(engine)
    path = tmp_path / "a.kv"
    found = exported(engine, path)
    blocks = {name for node in engine.store.tree for name in node.blocks}
    assert (found.nodes, found.blocks, found.skipped) == (3, len(blocks), ())
    assert found.nbytes == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob("*.part")) == []
    before = {node.id: node for node in engine.store.tree}
    with other() as store:
        result = import_nodes(store.repository, path)
        assert (sorted(result.nodes), result.known, result.skipped) == (sorted(ids), 0, ())
        assert import_nodes(store.repository, path).known == 3
        for node in store.tree:
            same = before[node.id]
            assert (node.generation, node.exact_rows, node.policy) == (
                same.generation, same.exact_rows, same.policy)  # fmt: skip
            assert (node.token_bytes, list(node.blocks)) == (same.token_bytes, list(same.blocks))
            assert node.contexts == same.contexts
            assert node.stamp != same.stamp
        store.flush()
    with other() as store:  # durable, and every row is what was saved
        assert {node.id for node in store.tree} == set(ids)
        there = Driver(store, engine.namespace, engine.book)
        assert there.serve(prompt()).exact == 99
        assert there.serve(edited(prompt())).reused > 90
        mine = Driver(store, engine.namespace.for_tenant("alice"), engine.book)
        assert mine.serve(prompt(2)).exact == 99
        assert mine.serve(prompt()).exact == 0


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_kill_leaves_nothing_of_an_archive(
    driver: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    """As long as it is written it has no name, where the file system can do that."""
    engine = driver()
    filled(engine)
    seen, write, open_ = list[int](), Writer.put, os.open

    def put(*args: Any) -> None:
        seen.append(len(list(tmp_path.glob("*.part"))))
        write(*args)

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return open_(path, flags, *args, **options)

    monkeypatch.setattr(Writer, "put", put)
    if not unnamed:
        monkeypatch.setattr(os, "open", refuse)
    for _ in range(2):  # the second one takes the place of the first
        assert exported(engine, tmp_path / "a.kv").nodes == 3
    assert set(seen) == {0 if unnamed else 1}
    assert list(tmp_path.glob("*.part")) == []
    with (tmp_path / "a.kv").open("rb") as file:
        assert len(verified(file, tmp_path / "a.kv").nodes) == 3


def test_rows_that_others_share_are_not_copied_twice(
    driver: Open, other: Callable[..., Store], tmp_path: Path
) -> None:
    engine = driver()
    filled(engine)
    exported(engine, tmp_path / "a.kv")
    with other() as store:
        Driver(store, engine.namespace, engine.book).save(prompt())
        count = store.tree.block_count
        result = import_nodes(store.repository, tmp_path / "a.kv")
        assert (len(result.nodes), result.known) == (2, 1)
        assert store.tree.block_count == engine.store.tree.block_count > count


def test_lossy_rows_are_left_out(driver: Open, tmp_path: Path) -> None:
    """Their name does not verify them, so the importing store could not either."""
    engine = driver(disk_codec="int8")
    engine.save(prompt())
    engine = driver(disk_codec="int8")  # read from disk, where a codec has changed the rows
    found = export_nodes(
        engine.store.repository, list(engine.store.tree), tmp_path / "a.kv", plain=False
    )
    assert (found.nodes, len(found.skipped)) == (0, 1)


def test_where_there_is_no_room(archive: Path, other: Callable[..., Store]) -> None:
    with other(disk=False, host_bytes=8 << 10) as store:
        result = import_nodes(store.repository, archive)
        assert result.skipped
        assert {node.id for node in store.tree} <= set(result.nodes)
        assert not store.blocks.pool.filling()


def test_a_small_machine_stores_more_than_it_has_in_memory(archive: Path, machine: Machine) -> None:
    """With a shared catalogue the rows stay for the others."""
    small = machine("small", max_nodes=1, sync_seconds=3600.0, gc_seconds=0.0)
    imported = import_nodes(small.store.repository, archive)
    assert (len(imported.nodes), imported.skipped) == (3, ())
    assert len(small.store.tree) == 1


def test_a_disk_that_refuses_is_an_error_and_one_that_is_full_is_none(
    archive: Path, other: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def put(*_: object) -> None:
        raise reason

    with other() as store:
        monkeypatch.setattr(disk_level(store).tier, "put", put)
        reason: KVShareError = FullDiskError("the disk is full")
        assert len(import_nodes(store.repository, archive).skipped) == 3
        reason = StorageError("Input/output error")
        with pytest.raises(StorageError, match=r"3 prompts were not stored .* Input/output error"):
            import_nodes(store.repository, archive)
        assert not len(store.tree)
        assert not store.blocks.pool.filling()


def test_nothing_of_a_tenant_comes_back_that_is_purged_meanwhile(
    driver: Open, other: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver()
    alice = Driver(engine.store, engine.namespace.for_tenant("alice"), engine.book)
    ids = [alice.save(prompt(seed, 8)) for seed in range(4)]  # a block each
    exported(engine, tmp_path / "a.kv")
    read: list[str] = []

    def purging(*which: Any) -> Block:
        read.append(which[-1])
        if len(read) == 3:
            assert not store.purge(tenant="alice")[0].remaining
        return block_at(*which)

    with other() as store:
        monkeypatch.setattr(moving, "block_at", purging)
        found = import_nodes(store.repository, tmp_path / "a.kv")
        assert (found.nodes, found.known, found.skipped) == ((), 0, ())
        assert sorted(found.purged) == sorted(map(str, ids))
        assert not len(store.tree)
        assert not store.blocks.pool.filling()
        again = import_nodes(store.repository, tmp_path / "a.kv")
        assert sorted(again.nodes) == sorted(map(str, ids)), "it was asked for after the purge"


# --- what is refused ------------------------------------------------------------------------------


def refused(store: Store, path: Path) -> KVShareError:
    with pytest.raises(KVShareError) as error:
        import_nodes(store.repository, path)
    assert len(store.tree) == store.tree.block_count == 0
    assert not store.blocks.pool.filling()
    return error.value


def test_a_damaged_archive_changes_nothing(
    archive: Path, other: Callable[..., Store], tmp_path: Path
) -> None:
    whole, chance = archive.read_bytes(), random.Random(4)
    bad = tmp_path / "bad.kv"
    with other() as store:
        for at in [*range(60), *(chance.randrange(len(whole)) for _ in range(60))]:
            bad.write_bytes(
                whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
            )
            assert isinstance(refused(store, bad), (ConfigError, CorruptBlockError))
        for length in [0, 5, 18, 20, 30, *(chance.randrange(len(whole)) for _ in range(40))]:
            bad.write_bytes(whole[:length])
            kind = ConfigError if length < 18 else ShortBlockError
            assert isinstance(refused(store, bad), kind)
        bad.write_bytes(whole + b"x")
        assert isinstance(refused(store, bad), CorruptBlockError)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_what_is_no_archive(other: Callable[..., Store], tmp_path: Path) -> None:
    file = tmp_path / "no.kv"
    with other() as store:
        assert "cannot be read" in str(refused(store, file))
        for content in (b"", b"PK\3\4", pickle.dumps(_Bomb()), bytes(100)):
            file.write_bytes(content)
            assert "no archive" in str(refused(store, file))


def test_a_node_whose_fields_disagree(
    driver: Open, other: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of the archive is right, but the node in it is not valid."""
    engine = driver()
    engine.save(prompt())
    encoded = "kvshare_store.maintenance.moving.encode_node"
    wrong = {b"exact_rows": b"exact_row5", prompt().tobytes(): prompt(3).tobytes()}
    for old, new in wrong.items():
        monkeypatch.setattr(
            encoded, lambda node, old=old, new=new: encode_node(node).replace(old, new)
        )
        exported(engine, tmp_path / "a.kv")
        with other() as store:
            assert isinstance(refused(store, tmp_path / "a.kv"), CorruptBlockError)


def test_an_encrypted_store_is_exported_only_when_that_is_said(
    driver: Open, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    engine = driver(encryption_key=f"file:{key}")
    engine.save(prompt())
    with pytest.raises(ConfigError, match="--plain"):
        exported(engine, tmp_path / "a.kv")
    assert not (tmp_path / "a.kv").exists()
    assert exported(engine, tmp_path / "a.kv", plain=True).nodes == 1


@pytest.mark.parametrize("letter", ["a", "é"])
def test_a_file_may_have_any_name_and_so_may_what_is_in_it(
    driver: Open, other: Callable[..., Store], tmp_path: Path, letter: str
) -> None:
    size = len(letter.encode())
    engine = driver()
    named = msgspec.structs.replace(
        engine.namespace, model=letter * (4096 // size), tenant=letter * (1024 // size)
    )
    assert not named.too_long
    assert Driver(engine.store, named, engine.book).save(prompt())
    path = tmp_path / (letter * (LONGEST // size))
    assert exported(engine, path).nodes == 1
    with other() as store:
        assert len(import_nodes(store.repository, path).nodes) == 1
        assert Driver(store, named, engine.book).serve(prompt()).exact == 99


def test_a_file_that_cannot_be_written(driver: Open, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        exported(driver(), tmp_path / "no" / "a.kv")


def test_no_archive_takes_the_place_of_what_is_no_regular_file(
    driver: Open, tmp_path: Path
) -> None:
    engine = driver()
    engine.save(prompt())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "loose").symlink_to(tmp_path / "nothing")
    for name in ("pipe", "link", "loose"):
        before = (tmp_path / name).lstat()
        with pytest.raises(ConfigError, match=f"{name} is no regular file"):
            exported(engine, tmp_path / name)
        assert (tmp_path / name).lstat() == before
    with pytest.raises(ConfigError, match="is a folder"):
        exported(engine, tmp_path)
    (tmp_path / "a.kv").write_bytes(b"the one before")
    assert exported(engine, tmp_path / "a.kv").nodes == 1


@pytest.mark.parametrize("name", ["quality", "lock", "new.kv", "catalog/../quality"])
def test_no_archive_lies_in_the_home(driver: Open, tmp_path: Path, name: str) -> None:
    engine = driver()
    engine.save(prompt())
    home = engine.store.config.home_path
    (home / "quality").write_bytes(b"learned")
    (tmp_path / "way").symlink_to(home)
    before = sorted(home.iterdir())
    for path in (home / name, tmp_path / "way" / name):
        with pytest.raises(ConfigError, match="in the home of this store"):
            exported(engine, path)
    assert sorted(home.iterdir()) == before
    assert (home / "quality").read_bytes() == b"learned"


@pytest.mark.parametrize("message", [Export, Import])
def test_paths_are_refused_for_the_reason_that_is_true(
    driver: Open, tmp_path: Path, message: type[Export | Import]
) -> None:
    store = driver().store
    for path, words in [
        ("a.kv", "not an absolute path"),
        ("/a\0b", "NUL"),
        (str(tmp_path), f"^{tmp_path} is a folder"),
    ]:
        with pytest.raises(ConfigError, match=words):
            do_chore(store, message(path))


def forged(engine: Driver, tmp_path: Path, **fields: object) -> Path:
    """An archive of one node with wrong values in some fields."""
    engine.save(prompt())
    (node,) = engine.store.tree
    lie = msgspec.structs.replace(node, **fields)
    path = tmp_path / "forged.kv"
    export_nodes(engine.store.repository, [lie], path, plain=False)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"block_bytes": ()},
        {"block_bytes": (1,)},
        {"created": float("nan")},
        {"policy": "no such policy"},
    ],
    ids=str,
)
def test_a_node_that_lies_is_refused(
    driver: Open, other: Callable[..., Store], tmp_path: Path, fields: dict[str, object]
) -> None:
    path = forged(driver(), tmp_path, **fields)
    with other() as store:
        assert isinstance(refused(store, path), CorruptBlockError)
        assert not len(store.tree)
