"""What counts against `disk_bytes`, and a file system that is full before the budget is."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvshare_store.catalog.sync import SyncedFolder
from kvshare_store.config import StoreConfig
from kvshare_store.errors import StorageError
from kvshare_store.maintenance.check import check_tree
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.needs import need
from tests.support.oracle import Driver, prompt

pytestmark = pytest.mark.fault

Open = Callable[..., Driver]

BUDGET = 600_000
ONE_COMMIT = 80_000
"""Bytes by which the last commit may exceed the budget."""


@pytest.fixture
def namespace() -> Namespace:
    """Rows of 8 KB, so that a prompt of 40 tokens is larger than the commit of its row."""
    return Namespace("model", KVLayout(4, 4, 64, "float32"))


def test_the_catalogue_counts_in_the_budget_of_the_disk(driver: Open, home: Path) -> None:
    engine = driver(disk_bytes=4_000_000, host_bytes=1 << 24)
    for seed in range(15):
        saved = engine.save(prompt(seed, 40))
        engine.store.flush()
    for turn in range(40):  # each of these commits leaves a version of the catalogue
        engine.store.pin(str(saved), turn % 2 == 0)
        engine.store.flush()
    engine.save(prompt(15, 40))
    engine.store.flush()
    stats = engine.store.stats()
    files = [f.stat().st_size for f in (home / "catalog").rglob("*") if f.is_file()]
    blocks = [f.stat().st_size for f in (home / "blocks").rglob("*") if f.is_file()]
    assert stats["catalog_bytes"] == sum(files) > 0
    assert stats["tiers"]["disk"]["bytes"] == sum(files) + sum(blocks)
    assert sum(files) + sum(blocks) <= 4_000_000 + 150_000, "but for the last commit"
    assert 8 < stats["nodes"] < 15, "old versions are dropped rather than prompts"
    assert engine.serve([*prompt(15, 40), 5]).exact == 40, "what came last is kept"


def bytes_in(home: Path) -> int:
    """Bytes of all files that count against the budget."""
    found = [*(home / "catalog").rglob("*"), *(home / "blocks").rglob("*")]
    return sum(file.stat().st_size for file in found if file.is_file())


def test_files_stay_in_the_budget_while_the_catalogue_is_written_anew(
    config: Callable[..., StoreConfig], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compaction writes new files before it removes the old ones. The home is measured at every
    fsync, when a change is on disk. Rows are small here, so the catalogue makes up most of the
    home."""
    seen: list[int] = []
    sync = SyncedFolder.sync

    def measured(folder: SyncedFolder) -> None:
        seen.append(bytes_in(home))
        sync(folder)

    monkeypatch.setattr(SyncedFolder, "sync", measured)
    with Store(config(disk_bytes=BUDGET)) as store:
        engine = Driver(store, Namespace("model", KVLayout(2, 1, 4, "float32")))
        for seed in range(80):
            saved = engine.save(prompt(seed, 20))
            store.flush()
            if seed % 10 == 0:
                store.pin(str(saved), True)
                store.pin(str(saved), False)
                store.collect()
        assert max(seen) > 0.9 * BUDGET, "the budget is used"
        assert max(seen) <= BUDGET + ONE_COMMIT
        assert store.stats()["tiers"]["disk"]["bytes"] == bytes_in(home)
        assert engine.serve([*prompt(79, 20), 5]).exact == 20


@pytest.fixture(params=["size=6m", "nr_inodes=260"])
def small_disk(request: pytest.FixtureRequest, home: Path) -> Iterator[Path]:
    """A home on a file system of its own, with little room or few inodes."""
    need(os.geteuid() == 0, "root, to mount a file system")
    home.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(home)]
    need(subprocess.run(mount, check=False).returncode == 0, "the right to mount a file system")
    yield home
    subprocess.run(["umount", "--lazy", str(home)], check=True)


def test_a_full_file_system_makes_room_as_a_full_budget_does(
    driver: Open, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file system is smaller than `disk_bytes`. Saving goes on, and reports what it evicts."""
    engine = driver(host_bytes=1 << 24)
    with caplog.at_level(logging.WARNING, "kvshare"):
        for seed in range(40):
            engine.save(prompt(seed, 40))
            engine.store.flush()
            assert engine.serve([*prompt(seed, 40), 5]).exact == 40, seed
    assert any("there is no space" in record.message for record in caplog.records)
    nodes = len(engine.store.tree)
    assert 5 < nodes < 40
    again = driver()
    assert len(again.store.tree) == nodes
    assert again.store.stats()["errors"] == {}
    assert check_tree(again.store.repository, repair=False).problems == ()
    again.store.close()


@pytest.mark.parametrize("small_disk", ["size=6m"], indirect=True)
def test_a_crash_while_a_full_file_system_makes_room(
    driver: Open, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are gone, but the rows that name them are not: the next start drops those nodes."""
    engine = driver(host_bytes=1 << 24)
    catalog = engine.store.repository.catalog
    assert catalog is not None
    forgotten: list[str] = []

    def crash(ids: list[str]) -> None:
        forgotten.extend(ids)
        raise StorageError("the machine is off")

    monkeypatch.setattr(catalog, "delete", crash)
    saved: dict[str, int] = {}
    while not forgotten:
        saved[str(engine.save(prompt(len(saved), 40)))] = len(saved)
        engine.store.flush()
    again = driver(host_bytes=1 << 24)
    assert again.store.stats()["errors"] == {"missing": len(forgotten)}
    for node, seed in saved.items():
        found = again.serve([*prompt(seed, 40), 5]).exact
        assert found == (0 if node in forgotten else 40), seed
    assert check_tree(again.store.repository, repair=False).problems == ()
    again.store.close()
