"""Restarts, budgets, damage: what the storage holds and how the store recovers."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvshare_store.commit.home import FORMAT
from kvshare_store.commit.queue import Addition
from kvshare_store.config import StoreConfig
from kvshare_store.errors import (
    BusyError,
    CorruptBlockError,
    FullDiskError,
    HomeError,
    NoSpaceError,
    PlanError,
    StorageError,
)
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.save.staging import Buffer
from kvshare_store.store import Store
from kvshare_store.testing.tiers import damage_file
from tests.support.faulty import FaultyTier, SlowTier
from tests.support.oracle import Driver, prompt
from tests.support.tiers import disk_level

Open = Callable[..., Driver]
Config = Callable[..., StoreConfig]
SLOT = 64 + 8 * 64
"""Bytes of shared memory for a block of eight rows."""


def files(home: Path) -> set[str]:
    """Names of the blocks on disk."""
    return {file.stem for file in (home / "blocks").glob("*/*")}


def faulty(store: Store) -> FaultyTier:
    """Put a tier that can fail in front of the disk tier."""
    level = disk_level(store)
    level.tier = tier = FaultyTier(level.tier)
    return tier


def agrees(engine: Driver, home: Path) -> None:
    """Files, tree and catalogue must agree."""
    engine.store.repository.queue.settle()
    catalog = engine.store.repository.catalog
    assert catalog is not None
    assert files(home) == engine.store.tree.blocks()
    assert {node.id for node, _ in catalog.load()} == {node.id for node in engine.store.tree}


# --- restart ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["none", "zstd", "planes"])
def test_a_restart_finds_everything(driver: Open, home: Path, codec: str) -> None:
    engine = driver(disk_codec=codec)
    tokens = prompt(1, 80)
    engine.save(tokens)
    engine.serve_and_save([*tokens[:30], 7, *tokens[31:]])
    engine.save(prompt(2, 20))
    before = [
        (node.id, node.parent, node.edits, node.segments, node.blocks, node.generation)
        for node in engine.store.tree
    ]
    engine = driver(disk_codec=codec)
    after = [
        (node.id, node.parent, node.edits, node.segments, node.blocks, node.generation)
        for node in engine.store.tree
    ]
    assert sorted(after) == sorted(before)
    assert engine.serve(tokens).exact == 79
    assert engine.serve([*tokens[:30], 7, *tokens[31:]]).reused == 79
    assert engine.serve(prompt(2, 20)).exact == 19
    assert engine.serve([*tokens[:50], 9, *tokens[51:]]).generation == 1
    agrees(engine, home)


def test_what_was_compressed_is_read_without_compression(driver: Open) -> None:
    driver(disk_codec="zstd").save(prompt(1, 40))
    assert driver(disk_codec="none").serve(prompt(1, 40)).exact == 39


def test_a_home_of_another_model_is_no_use_and_no_harm(driver: Open, namespace: Namespace) -> None:
    driver().save(prompt(1, 40))
    engine = driver()
    other = Driver(engine.store, Namespace("another", namespace.layout))
    assert other.plan(prompt(1, 40)).declined == "empty_store"
    assert engine.serve(prompt(1, 40)).exact == 39


def test_nothing_survives_without_a_disk(driver: Open, home: Path) -> None:
    engine = driver(disk=False)
    engine.save(prompt(1, 40))
    assert engine.serve(prompt(1, 40)).exact == 39
    assert set(engine.store.stats()["tiers"]) == {"host"}
    engine = driver(disk=False)
    assert engine.plan(prompt(1, 40)).declined == "empty_store"
    assert not (home / "blocks").exists()


# --- the host budget ----------------------------------------------------------------------------


def test_blocks_are_demoted_and_come_back_from_disk(driver: Open) -> None:
    engine = driver(host_bytes=10 * SLOT)
    for seed in range(4):
        engine.save(prompt(seed, 40))
        engine.store.flush()
    level = disk_level(engine.store)
    level.tier = counting = FaultyTier(level.tier)
    stats = engine.store.stats()
    assert stats["nodes"] == 4
    assert stats["tiers"]["host"]["blocks"] == 10
    assert stats["tiers"]["disk"]["blocks"] == 20
    engine.serve(prompt(2, 40))
    engine.serve(prompt(3, 40))
    assert counting.calls["get"] == 0, "the newest are in memory"
    assert engine.serve(prompt(0, 40)).exact == 39
    assert counting.calls["get"] == 5
    assert engine.serve(prompt(0, 40)).exact == 39
    assert counting.calls["get"] == 5
    assert engine.serve(prompt(3, 40)).exact == 39
    assert counting.calls["get"] == 5, "prompt 2 was the least recently used"


def test_memory_full_of_rows_in_use_refuses_saves_and_goes_on(driver: Open) -> None:
    engine = driver(host_bytes=10 * SLOT)
    for seed in range(2):
        engine.save(prompt(seed, 40))
        engine.store.flush()
    held = [engine.plan(prompt(seed, 40)) for seed in range(2)]
    with pytest.raises(NoSpaceError):
        engine.save(prompt(5, 16))
    assert engine.store.stats()["errors"] == {"no_space": 1}
    for seed, plan in enumerate(held):
        engine.check(prompt(seed, 40), plan)
        engine.finish(plan)
    assert engine.save(prompt(5, 16))
    assert engine.serve(prompt(0, 40)).exact == 39


def test_rows_that_are_only_in_memory_do_not_leave_it(driver: Open) -> None:
    engine = driver(host_bytes=6 * SLOT)
    store = engine.store
    level = disk_level(store)
    level.tier = SlowTier(level.tier, put=0.3)
    engine.save(prompt(1, 40))
    with pytest.raises(NoSpaceError):
        engine.save(prompt(2, 40))
    store.flush()
    assert engine.save(prompt(2, 40)), "what is durable makes room"
    store.flush()
    assert [engine.serve(prompt(seed, 40)).exact for seed in (1, 2)] == [39, 39]


def test_a_save_that_does_not_fit_gives_back_what_it_got(driver: Open) -> None:
    engine = driver(host_bytes=4 * SLOT)
    with pytest.raises(NoSpaceError, match="raise host_bytes"):
        engine.store.stage(prompt(1, 40), engine.namespace)  # before anything is copied
    staged = engine.store.stage(prompt(1, 32), engine.namespace)
    with pytest.raises(PlanError, match="fewer rows"):
        engine.store.commit(staged.id, Buffer(bytes(31 * engine.namespace.layout.row_bytes)))
    assert engine.store.stats()["tiers"]["host"]["bytes"] == 0
    assert engine.save(prompt(1, 32))


def test_a_plan_that_does_not_fit_in_memory_is_declined(driver: Open) -> None:
    driver(host_bytes=20 * SLOT).save(prompt(1, 80))
    engine = driver(host_bytes=5 * SLOT)
    assert engine.plan(prompt(1, 80)).declined == "not_resident"
    assert engine.store.stats()["leases"] == 0
    assert engine.serve(prompt(1, 80)[:30]).exact == 29


def test_without_a_disk_the_oldest_nodes_go(driver: Open) -> None:
    engine = driver(disk=False, host_bytes=10 * SLOT)
    for seed in range(4):
        engine.save(prompt(seed, 40))
    engine.store.flush()
    assert engine.store.stats()["nodes"] == 2
    assert [engine.serve(prompt(seed, 40)).exact for seed in range(4)] == [0, 0, 39, 39]
    assert engine.store.stats()["tiers"]["host"]["blocks"] == 10


# --- the disk budget ----------------------------------------------------------------------------


def test_the_disk_budget_is_kept_by_forgetting_the_oldest(driver: Open, home: Path) -> None:
    budget = 150_000
    engine = driver(disk_bytes=budget)
    for seed in range(40):
        engine.save(prompt(seed, 40))
        agrees(engine, home)
        assert sum(file.stat().st_size for file in (home / "blocks").glob("*/*")) <= budget
    kept = engine.store.stats()["nodes"]
    assert 1 < kept < 40
    found = [engine.serve(prompt(seed, 40)).exact == 39 for seed in range(40)]
    assert found == [seed >= 40 - kept for seed in range(40)]
    assert engine.store.stats()["errors"] == {}
    assert driver(disk_bytes=budget).serve(prompt(39, 40)).exact == 39


def test_nodes_leave_lookup_before_their_blocks_leave_the_disk(driver: Open, home: Path) -> None:
    engine = driver(disk_bytes=60_000)
    tier = faulty(engine.store)
    delete, seen = tier.inner.delete, []

    async def watched(name: str) -> bool:
        seen.append(engine.store.tree.users(name))
        return await delete(name)

    tier.inner.delete = watched  # type: ignore[method-assign]
    for seed in range(20):
        engine.save(prompt(seed, 40))
    engine.store.flush()
    assert seen
    assert seen == [set()] * len(seen)


def test_a_node_that_left_for_another_of_its_batch_gets_no_row(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is gone has the batch written one by one, and each makes room for itself alone."""
    store = (engine := driver()).store
    names = [engine.save(prompt(seed, 40)) for seed in range(3)]
    store.flush()
    gone, left, stays = [node for name in names if (node := store.tree.get(name or ""))]
    catalog, durable = store.repository.catalog, store.repository.durable
    assert catalog is not None
    catalog.delete([node.id for node in store.tree])
    store.nodes.drop([gone.id])
    write = durable.write

    def making_room(nodes: Sequence[Node]) -> None:
        write(nodes)
        if stays in nodes:
            store.nodes.shorten(left, 1)

    monkeypatch.setattr(durable, "write", making_room)
    work = [Addition(node, Vectors(lexical_vector(node.tokens), None)) for node in (left, stays)]
    work.insert(0, work[0]._replace(node=gone))
    ended = store.repository.queue.run(lambda: durable.store(work))
    assert [error is None for error in ended] == [False, False, True]
    store.flush()
    assert {node.id for node, _ in catalog.load()} == {node.id for node in store.tree}


def test_a_prompt_larger_than_the_disk_pushes_nobody_out(driver: Open, home: Path) -> None:
    engine = driver(disk_bytes=60_000)
    engine.save(prompt(1, 40))
    engine.store.flush()
    engine.save(prompt(2, 8 * 40))
    agrees(engine, home)
    assert engine.store.stats()["errors"] == {"no_space": 1}
    assert engine.serve(prompt(1, 40)).exact == 39
    assert engine.plan(prompt(2, 8 * 40)).declined == "no_donor"


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["first", "middle", "last", "truncated", "empty", "gone"])
def test_a_damaged_block_is_a_miss_and_its_nodes_are_forgotten(
    driver: Open, home: Path, damage: str
) -> None:
    engine = driver()
    tokens = prompt(1, 80)
    engine.save(tokens)
    engine.serve_and_save([*tokens[:60], 7, *tokens[61:]])
    engine.save(prompt(2, 40))
    first = next(node for node in engine.store.tree if node.exact and node.length == 80).blocks[0]
    engine = driver()
    file = home / "blocks" / first[:2] / f"{first}.kvb"
    if damage == "gone":
        file.unlink()
    else:
        damage_file(file, damage)
    assert engine.plan(tokens).declined == "not_resident"
    stats = engine.store.stats()
    kinds = {"gone": "missing", "truncated": "short", "empty": "short"}
    assert stats["errors"] == {kinds.get(damage, "corrupt"): 1}
    assert stats["nodes"] == 1, "both nodes with rows in that block are gone"
    agrees(engine, home)
    assert engine.plan(tokens).declined == "no_donor"
    assert engine.serve(prompt(2, 40)).exact == 39
    assert engine.save(tokens), "computed again, it is stored again"
    assert driver().serve(tokens).exact == 79


def test_a_loss_that_no_plan_waited_for_takes_its_nodes_along_later(
    driver: Open, home: Path
) -> None:
    """The read that finds the loss ends after its plan did; the next check of leases reports it."""
    driver().save(prompt(1, 40))
    engine = driver()
    level = disk_level(engine.store)
    assert len(level.tier.names()) == 5
    for file in (home / "blocks").glob("*/*"):
        file.unlink()
    level.tier = SlowTier(level.tier, get=0.3)
    plan = engine.store.plan(prompt(1, 40), engine.namespace, deadline_ms=1.0)
    assert plan.declined == "not_resident"
    deadline = time.monotonic() + 30
    while len(engine.store.tree) and time.monotonic() < deadline:
        time.sleep(0.05)
        engine.store.reap()
    assert len(engine.store.tree) == 0


def test_a_block_that_is_in_memory_outlives_its_file_until_a_restart(
    driver: Open, home: Path
) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    engine.store.flush()
    shutil.rmtree(home / "blocks")
    assert engine.serve(prompt(1, 40)).exact == 39
    engine = driver()
    assert engine.plan(prompt(1, 40)).declined == "empty_store"
    assert engine.store.stats()["errors"] == {"missing": 1}
    assert engine.save(prompt(1, 40))


def test_blocks_that_no_node_needs_are_collected_at_the_start(driver: Open, home: Path) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    engine.store.flush()
    some = sorted((home / "blocks").glob("*/*"))[0]
    stray = home / "blocks" / "ab" / ("ab" * 32 + ".kvb")
    engine.store.close()
    stray.parent.mkdir(exist_ok=True)
    shutil.copy(some, stray)
    (home / "tmp" / "unfinished").write_bytes(b"half")
    engine = driver(gc_seconds=3600.0)
    deadline = time.monotonic() + 30
    while stray.exists():
        assert time.monotonic() < deadline, "the first pass comes by itself"
        time.sleep(0.01)
    agrees(engine, home)
    assert list((home / "tmp").iterdir()) == []


# --- a disk that does not do as it is told ------------------------------------------------------


def test_a_full_disk_stops_saving_not_serving(driver: Open, home: Path) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    engine.store.flush()
    disk = faulty(engine.store)
    disk.fail_always("put", FullDiskError("No space left on device"))
    assert engine.save(prompt(2, 40)), "it can be used at once"
    engine.store.flush()
    assert engine.plan(prompt(2, 40)).declined == "empty_store", "and is forgotten when that fails"
    assert engine.store.stats()["errors"] == {"no_space": 1}
    assert engine.store.stats()["nodes"] == 0, "what there was had to make room, in vain"
    agrees(engine, home)
    disk.fail_always("put", None)
    assert engine.save(prompt(2, 40))
    agrees(engine, home)
    assert engine.serve(prompt(2, 40)).exact == 39


def test_every_block_is_written_or_none_counts(driver: Open, home: Path) -> None:
    for failing in range(5):
        engine = driver()
        disk = faulty(engine.store)
        disk.fail("put", StorageError("Input/output error"), skip=failing)
        engine.save(prompt(10 + failing, 40))
        agrees(engine, home)
        assert disk.calls["put"] == 5
        assert engine.plan(prompt(10 + failing, 40)).declined == "empty_store"
        assert engine.store.stats()["errors"] == {"storage": 1}
        assert engine.store.stats()["tiers"]["host"]["bytes"] == 0


def test_a_failed_save_is_over_when_its_last_write_is(driver: Open, home: Path) -> None:
    """Rows are written in place, so their slots must not be given away while a write goes on."""
    engine = driver()
    store = engine.store
    level = disk_level(store)
    level.tier = disk = FaultyTier(SlowTier(level.tier, put=0.3))
    disk.fail("put", NoSpaceError("full"))
    engine.save(prompt(1, 40))
    store.flush()
    engine.save(prompt(2, 40))
    agrees(engine, home)
    assert engine.serve(prompt(2, 40)).exact == 39
    assert driver().serve(prompt(2, 40)).exact == 39
    assert len(files(home)) == 5


def test_a_disk_that_cannot_read_is_a_miss_until_it_can(driver: Open) -> None:
    driver().save(prompt(1, 40))
    engine = driver()
    disk = faulty(engine.store)
    disk.fail_always("get", StorageError("Input/output error"))
    assert engine.plan(prompt(1, 40)).declined == "not_resident"
    assert engine.store.stats()["nodes"] == 1, "the block may be there the next time"
    disk.fail_always("get", None)
    assert engine.serve(prompt(1, 40)).exact == 39


def test_a_disk_that_cannot_delete_leaves_garbage_for_the_next_start(
    driver: Open, home: Path
) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    engine.store.flush()
    disk = faulty(engine.store)
    disk.fail_always("delete", StorageError("Read-only file system"))
    engine.store.evict(nodes=1)
    engine.store.flush()
    assert len(files(home)) == 5
    assert engine.store.stats()["errors"] == {"storage": 5}
    assert engine.plan(prompt(1, 40)).declined == "empty_store"
    engine = driver()
    assert engine.store.collect().blocks == 5
    agrees(engine, home)
    assert files(home) == set()


@pytest.mark.parametrize("lost", ["catalog/nodes.lance", "catalog", "tmp"])
def test_folders_that_were_removed_are_no_secret(driver: Open, home: Path, lost: str) -> None:
    """Nothing can be stored any more: `flush` and `health` say so, and saves are refused."""
    engine = driver()
    engine.save(prompt(1, 40))
    engine.store.flush()
    shutil.rmtree(home / lost)
    for seed in range(2, 5):
        engine.save(prompt(seed, 40))
        with pytest.raises(StorageError, match="prompts were not stored"):
            engine.store.flush()
    assert engine.store.stats()["health"]["state"] == "degraded"
    with pytest.raises(StorageError, match="nothing can be stored at present"):
        engine.save(prompt(5, 40))
    assert engine.serve(prompt(1, 40)).exact == 39, "what is here is served"


@pytest.mark.parametrize("call", ["add", "delete", "compact"])
def test_a_catalogue_that_refuses_does_not_stop_the_store(
    driver: Open, monkeypatch: pytest.MonkeyPatch, home: Path, call: str
) -> None:
    engine = driver()
    catalog = engine.store.repository.catalog
    assert catalog is not None

    def refuse(*_: object) -> None:
        raise StorageError("catalogue refused: no space left")

    with monkeypatch.context() as broken:
        broken.setattr(catalog, call, refuse)
        engine.save(prompt(1, 40))
        with pytest.raises(StorageError) if call == "add" else contextlib.nullcontext():
            engine.store.flush()
        engine.store.evict(nodes=1)
        engine.store.repository.queue.settle()
        with contextlib.suppress(StorageError):
            engine.store.collect()
    assert engine.save(prompt(2, 40))
    engine.store.flush()
    assert engine.serve(prompt(2, 40)).exact == 39
    engine = driver()
    assert engine.serve(prompt(2, 40)).exact == 39
    agrees(engine, home)


# --- the home -----------------------------------------------------------------------------------


def test_a_home_has_one_owner(driver: Open, config: Config) -> None:
    driver()
    with pytest.raises(BusyError, match="belongs to a running store"):
        Store(config())


def test_another_process_cannot_open_it_either(driver: Open, home: Path) -> None:
    driver()
    code = (
        "import sys\nfrom kvshare_store.config import StoreConfig\n"
        "from kvshare_store.store import Store\n"
        "from kvshare_store.errors import BusyError\n"
        "try:\n    Store(StoreConfig(home=sys.argv[1], host_bytes=4096, semantic='never'))\n"
        "except BusyError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(home)]
    environment = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert "belongs to a running store" in answer.stdout


def test_a_closed_home_is_free_again(driver: Open, home: Path) -> None:
    for opened in range(3):
        engine = driver()
        assert len(engine.store.tree) == opened
        engine.save(prompt(opened, 40))
        engine.store.close()


def test_everything_in_it_is_the_owners(driver: Open, home: Path) -> None:
    before = os.umask(0)
    try:
        engine = driver()
        engine.save(prompt(1, 40))
        engine.store.flush()
    finally:
        os.umask(before)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for file in (home / "blocks").glob("*/*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for name in ("blocks", "tmp", "quarantine", "catalog"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o700


def test_a_home_of_another_format_is_refused(driver: Open, config: Config, home: Path) -> None:
    driver().store.close()
    (home / "format").write_text("99")
    with pytest.raises(HomeError, match="format '99'"):
        Store(config())
    (home / "format").write_text(FORMAT)
    driver()


def test_a_start_that_was_cut_short_is_no_other_format(home: Path, driver: Open) -> None:
    home.mkdir()
    (home / "format").touch()
    assert driver().save(prompt(1, 40))


def test_a_home_that_cannot_be(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(HomeError) as caught:
            Store(config(home=str(home)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["blocks", "tmp", "quarantine"])
def test_a_file_where_a_folder_should_be(driver: Open, home: Path, folder: str) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    engine.store.close()
    shutil.rmtree(home / folder)
    (home / folder).write_bytes(b"")
    with pytest.raises(HomeError, match=f"{folder} cannot be used: Not a directory; repair it"):
        driver()
    (home / folder).unlink()
    driver()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "socket"])
def test_what_is_no_regular_file_is_no_block(driver: Open, home: Path, kind: str) -> None:
    """Reading a pipe would block for ever, and closing the store would wait for the reader."""
    engine = driver()
    engine.save(prompt(1, 40))
    engine.store.close()
    block = sorted((home / "blocks").glob("*/*"))[0]
    block.rename(home.parent / "aside")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(block.parent):
        make: dict[str, Callable[[], object]] = {
            "pipe": lambda: os.mkfifo(block),
            "link": lambda: block.symlink_to(home.parent / "aside"),
            "folder": block.mkdir,
            "socket": lambda: listener.bind(block.name),
        }
        make[kind]()
    engine = driver()
    assert engine.serve(prompt(1, 40)).exact == 0
    engine.store.close()
    assert (home / "quarantine" / block.stem).exists() or kind == "link"


def test_too_little_shared_memory_for_the_budget(config: Config, home: Path) -> None:
    with pytest.raises(HomeError, match="lower host_bytes"):
        Store(config(host_bytes=1 << 60))
    Store(config()).close()


def test_rows_are_verified_where_they_are_read(driver: Open, home: Path) -> None:
    """The bytes of a damaged block never reach shared memory."""
    driver().save(prompt(1, 40))
    engine = driver()
    for file in (home / "blocks").glob("*/*"):
        damage_file(file, "last")
    engine.plan(prompt(1, 40))
    assert engine.store.blocks.host.names() == []
    assert engine.store.stats()["errors"] == {CorruptBlockError.kind: 5}
    assert len(list((home / "quarantine").iterdir())) == 5
