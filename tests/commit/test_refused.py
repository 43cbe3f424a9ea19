"""What the catalogue refuses: a removal stays due, and whoever asked for it is told; a change of a
row that could wait forgets nobody."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.daemon.evicting import evict_nodes
from kvshare_store.daemon.protocol import Evict
from kvshare_store.errors import FullDiskError, KVShareError, StorageError
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS
from kvshare_store.store import Store
from tests.support.meanwhile import reopened
from tests.support.neighbours import Machine
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]
TOKENS = prompt(1, 40)


class Refusing:
    """A catalogue that refuses one kind of commit as often as it is told to."""

    def __init__(self, store: Store, name: str, patch: pytest.MonkeyPatch) -> None:
        self.times = 0
        self.error: KVShareError = StorageError("Input/output error")
        self._real = getattr(store.repository.catalog, name)
        patch.setattr(store.repository.catalog, name, self)

    def __call__(self, *arguments: object) -> object:
        if self.times > 0:
            self.times -= 1
            raise self.error
        return self._real(*arguments)


@pytest.fixture
def stored(driver: Open) -> tuple[Driver, str]:
    """A store with one durable prompt, and its node. Nobody collects unasked."""
    engine = driver(gc_seconds=0.0)
    node = str(engine.save(TOKENS))
    engine.store.flush()
    return engine, node


@pytest.fixture
def refusing(stored: tuple[Driver, str], monkeypatch: pytest.MonkeyPatch) -> Refusing:
    """Its catalogue, which refuses to remove rows as often as it is told to."""
    return Refusing(stored[0].store, "delete", monkeypatch)


ASKED: list[Callable[[Store, str], object]] = [
    lambda store, node: store.purge_lineage(node),
    lambda store, node: evict_nodes(store, Evict((node,))),
    lambda store, node: store.clear(),
]


@pytest.mark.parametrize("ask", ASKED, ids=["purge --lineage", "evict", "clear"])
def test_whoever_asks_for_a_removal_is_told_that_it_was_refused(
    driver: Open,
    stored: tuple[Driver, str],
    refusing: Refusing,
    ask: Callable[[Store, str], object],
) -> None:
    engine, node = stored
    refusing.times = 1_000
    with pytest.raises(StorageError, match="back after a restart: Input/output error"):
        ask(engine.store, node)
    assert engine.store.stats()["errors"]["storage"] > 0
    engine.store.collect()  # its blocks stay, and so does the row
    refusing.times = 0
    again = reopened(engine, driver)
    assert len(again.store.tree) == 0


def test_it_is_removed_once_the_catalogue_allows_it(
    stored: tuple[Driver, str], refusing: Refusing
) -> None:
    engine, node = stored
    refusing.times = 1
    engine.store.nodes.remove([node])
    engine.store.flush()
    assert engine.store.stats()["tiers"]["disk"]["blocks"] == 5, "its row names them"
    engine.store.repository.queue.check_removed()
    catalog = engine.store.repository.catalog
    assert catalog is not None
    assert not list(catalog.load())
    assert engine.store.stats()["tiers"]["disk"]["blocks"] == 0


def test_a_prompt_that_is_saved_again_outlives_its_refused_removal(
    driver: Open, stored: tuple[Driver, str], refusing: Refusing
) -> None:
    engine, node = stored
    refusing.times = 3
    engine.store.nodes.remove([node])
    engine.store.repository.queue.settle()
    assert engine.save(TOKENS) == node
    engine.store.flush()
    refusing.times = 0
    again = reopened(engine, driver)
    assert again.serve(TOKENS).exact > 0


def test_a_prompt_is_not_saved_again_behind_the_refused_removal_of_a_shared_row(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row of a node stays. The new one would be taken for stored, and go with it."""
    engine = machine("a", sync_seconds=3600.0, gc_seconds=0.0)
    node = str(engine.save(TOKENS))
    engine.store.flush()
    refusing = Refusing(engine.store, "delete", monkeypatch)
    refusing.times = 3
    engine.store.nodes.remove([node])
    engine.store.repository.queue.settle()
    assert engine.save(TOKENS) == node
    with pytest.raises(StorageError, match="the old row of node"):
        engine.store.flush()
    refusing.times = 0
    assert engine.save(TOKENS) == node
    engine.store.flush()
    engine.store.repository.queue.check_removed()
    catalog = engine.store.repository.catalog
    assert catalog is not None
    assert len(list(catalog.load())) == 1


def test_on_a_full_disk_blocks_go_before_rows(
    driver: Open, stored: tuple[Driver, str], refusing: Refusing
) -> None:
    engine, node = stored
    refusing.times, refusing.error = 1, FullDiskError("no space left")
    evict_nodes(engine.store, Evict((node,)))
    assert len(reopened(engine, driver).store.tree) == 0


def test_a_pin_or_a_text_vector_on_a_full_disk_forgets_nobody(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver()
    nodes = [str(engine.save(prompt(seed, 40))) for seed in range(5)]
    engine.store.flush()
    for name in ("replace", "add"):
        refusing = Refusing(engine.store, name, monkeypatch)
        refusing.times, refusing.error = 1_000, FullDiskError("no space left")
    with pytest.raises(FullDiskError):
        engine.store.pin(nodes[0])
    vector = np.full(VECTOR_DIMENSIONS, VECTOR_DIMENSIONS**-0.5, np.float32)
    with pytest.raises(FullDiskError):
        Rewriter(engine.store.repository).describe({nodes[0]: vector})
    assert {node.id for node in engine.store.tree} == set(nodes)
    again = reopened(engine, driver)
    assert {node.id for node in again.store.tree} == set(nodes)
