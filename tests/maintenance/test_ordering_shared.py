"""What a crash of one machine leaves for the others: one remote, one catalogue, two machines.

The home of the machine that crashes, the remote and the catalogue are copied after each step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.remotes.objects import ObjectRemote
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.config import StoreConfig
from kvshare_store.maintenance.check import check_tree
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.commit.test_ordering_tiers import after_calls
from tests.support.crashes import NEW, OLD, Crashes
from tests.support.neighbours import collect_all
from tests.support.oracle import Driver
from tests.support.stores import SMALL

pytestmark = pytest.mark.fault

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))


class Site:
    """Two machines' homes and what they share, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, machine: str) -> StoreConfig:
        shared = {
            "remote": f"file://{self.folder / 'remote'}",
            "remote_write": "through",
            "remote_timeout_ms": 5_000.0,
            "catalog": str(self.folder / "catalog"),
            "sync_seconds": 3600.0,  # when the test says so
        }
        return StoreConfig(**{"home": str(self.folder / machine)} | SMALL | shared)

    def open(self, machine: str) -> Store:
        return Store(self.config(machine))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def learn(store: Store) -> None:
    """Read the changes in the catalogue now."""
    assert store.sharing is not None
    store.sharing.sync()


def both_are_sound(folder: Path, engine: Driver, check: Callable[[Driver, str], None]) -> None:
    """Each machine opens on a copy. What it serves is checked, and its tree has no problem."""
    for machine in ("a", "b"):
        with Site(folder).open(machine) as store:
            learn(store)
            check(Driver(store, NAMESPACE, engine.book), machine)
            collect_all(Driver(store, NAMESPACE))
            store.flush()
            assert check_tree(store.repository, repair=False).problems == (), (folder, machine)


def test_saving_into_a_shared_catalogue(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.open("b"), site.open("a") as store:
        engine, found = Driver(store, NAMESPACE), Crashes(site.folder, tmp_path / "copies")
        catalog: Any = store.repository.catalog
        for rows, step in ((catalog.records, "namespace added"), (catalog, "row added")):
            monkeypatch.setattr(rows, "add", found.after(rows.add, step))
        after_calls(monkeypatch, found, ObjectRemote, "put", "remote put")
        engine.save(OLD)
        store.flush()
        assert found.steps == ["namespace added", "remote put", "row added"]
        copies = found.end()
    for copy in copies:

        def check(driver: Driver, machine: str, step: str = copy.step) -> None:
            assert driver.serve(OLD).exact == (39 if step == "row added" else 0), (step, machine)

        both_are_sound(copy.home, engine, check)


def test_learning_what_others_changed(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node was added, one removed. However much the learner has done of it, it does the rest
    after a restart."""
    with site.open("a") as store, site.open("b") as other:
        engine = Driver(store, NAMESPACE)
        engine.save(OLD)
        store.flush()
        learn(other)
        assert Driver(other, NAMESPACE, engine.book).serve(OLD).exact == 39
        other.flush()
        store.clear()
        engine.save(NEW)
        store.flush()
        found = Crashes(site.folder, tmp_path / "copies")
        removed = found.after(NodeStore.learn_removals, "forgotten")
        monkeypatch.setattr(NodeStore, "learn_removals", removed)
        monkeypatch.setattr(NodeStore, "learn", found.after(NodeStore.learn, "learned"))
        learn(other)
        assert found.steps == ["learned", "forgotten"]
        copies = found.end()
    for copy in copies:

        def check(driver: Driver, machine: str) -> None:
            assert driver.serve(NEW).exact == 23, machine
            assert driver.serve(OLD).exact == 0, machine

        both_are_sound(copy.home, engine, check)


def test_removing_from_a_shared_catalogue(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.open("a") as store, site.open("b") as other:
        engine = Driver(store, NAMESPACE)
        engine.save(OLD)
        engine.save(NEW)
        store.flush()
        learn(other)
        found = Crashes(site.folder, tmp_path / "copies")
        catalog: Any = store.repository.catalog
        monkeypatch.setattr(catalog, "delete", found.around(catalog.delete, "row deleted"))
        monkeypatch.setattr(store.blocks, "delete", found.after(store.blocks.delete, "removed"))
        store.evict(nodes=1)
        store.flush()
        assert found.steps == ["before row deleted", "after row deleted", "removed"]
        copies = found.end()
    for copy in copies:

        def check(driver: Driver, machine: str, step: str = copy.step) -> None:
            assert driver.serve(NEW).exact == 23, (step, machine)
            assert driver.serve(OLD).exact == (39 if step.startswith("before") else 0)

        both_are_sound(copy.home, engine, check)


def test_collecting_what_no_machine_uses(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.open("b"), site.open("a") as store:
        engine = Driver(store, NAMESPACE)
        engine.save(OLD)
        engine.save(NEW)
        store.flush()
        store.evict(nodes=1)
        store.flush()
        found = Crashes(site.folder, tmp_path / "copies")
        after_calls(monkeypatch, found, ObjectRemote, "delete", "removed")
        collect_all(engine)
        assert found.steps == ["removed"]
        assert len(found.copies) == 5
        copies = found.end()
    for copy in copies:

        def check(driver: Driver, machine: str) -> None:
            assert driver.serve(NEW).exact == 23, machine
            assert driver.serve(OLD).exact == 0, machine

        both_are_sound(copy.home, engine, check)
        left = [file for file in (copy.home / "remote" / "blocks").rglob("*") if file.is_file()]
        assert len(left) == 3, "the rest went with the next pass"


def test_a_namespace_that_another_machine_has_purged_is_recorded_anew(site: Site) -> None:
    """Otherwise its rows would name a namespace without a record."""
    with site.open("a") as store, site.open("b") as other:
        engine = Driver(store, NAMESPACE)
        engine.save(OLD)
        store.flush()
        learn(other)
        theirs = Driver(other, NAMESPACE, engine.book)
        theirs.save(NEW)
        other.flush()
        learn(store)
        assert store.purge(NAMESPACE.digest)[0].remaining == ()
        learn(other)
        theirs.save(NEW)
        other.flush()
    with site.open("c") as late:
        assert late.namespace(NAMESPACE.digest) == NAMESPACE
        assert Driver(late, NAMESPACE, engine.book).serve(NEW).exact == 23
        assert check_tree(late.repository, repair=False).problems == ()
