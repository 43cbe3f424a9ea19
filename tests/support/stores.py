"""Fixtures for small stores: rows of 64 bytes, blocks of 8 rows, everything worth saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvshare_store.blocks.tiers.disk import files
from kvshare_store.blocks.tiers.disk import tier as disk_tier
from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.crashes import Crashes
from tests.support.neighbours import NAMESPACE, Machine, config_of
from tests.support.oracle import Driver, RowBook

if TYPE_CHECKING:
    from tests.support.certificates import Keys

SMALL: dict[str, Any] = {
    "block_tokens": 8,
    "host_bytes": 1 << 20,
    "disk_bytes": 1 << 24,
    "min_prompt_tokens": 8,
    "min_saving_ms": 0.0,
    "policy": "aggressive",
    "semantic": "never",
    "plan_deadline_ms": 20_000.0,
    "gc_seconds": 0.0,
}

Open = Callable[..., Driver]


@pytest.fixture
def namespace() -> Namespace:
    return Namespace("model", KVLayout(2, 1, 4, "float32"))


@pytest.fixture
def config(home: Path) -> Callable[..., StoreConfig]:
    """`config(field=value)`: the small settings with changes."""
    return lambda **changes: StoreConfig(**{"home": str(home)} | SMALL | changes)


@pytest.fixture
def driver(config: Callable[..., StoreConfig], namespace: Namespace) -> Iterator[Open]:
    """`driver(field=value)` opens the home's store. Stores left open are closed at the end. All
    drivers know the rows that any of them saved."""
    opened: list[Store] = []
    book = RowBook(namespace.layout, whole=True)

    def open_(**changes: Any) -> Driver:
        while opened:
            opened.pop().close()
        opened.append(Store(config(**changes)))
        return Driver(opened[0], namespace, book)

    yield open_
    for store in opened:
        store.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Those of a daemon that listens, and of its clients."""
    from tests.support.certificates import Keys

    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """`machine(name, field=value)` opens the store of one machine. All machines share remote and
    catalogue."""
    with ExitStack() as opened:

        def open_(name: str, **settings: Any) -> Driver:
            store = opened.enter_context(Store(config_of(tmp_path, name, **settings)))
            return Driver(store, NAMESPACE)

        yield open_


@pytest.fixture
def crashes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Driver], Crashes]]:
    """`crashes(engine)`: from now on the home is copied after every step."""

    # one write at a time, so that no file appears or vanishes during a copy
    one = disk_tier.DiskTier.properties._replace(max_concurrency=1)
    monkeypatch.setattr(disk_tier.DiskTier, "properties", one)

    def watch(engine: Driver) -> Crashes:
        engine.store.flush()
        found = Crashes(home, tmp_path / "copies")
        catalog = engine.store.repository.catalog
        monkeypatch.setattr(catalog, "add", found.after(catalog.add, "row added"))  # type: ignore[union-attr]
        monkeypatch.setattr(catalog, "replace", found.after(catalog.replace, "row replaced"))  # type: ignore[union-attr]
        monkeypatch.setattr(catalog, "delete", found.after(catalog.delete, "row deleted"))  # type: ignore[union-attr]
        monkeypatch.setattr(files, "rename", found.around(files.rename, "block renamed"))
        monkeypatch.setattr(files, "remove", found.around(files.remove, "block removed"))
        return found

    yield watch
    monkeypatch.undo()
