"""Every call to a remote fails once, in every way: no wrong row is ever served.

test_remotes.py and test_machines.py really pause and kill servers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.remotes import open_remote
from kvshare_store.commit import tiers as levels_of
from kvshare_store.config import StoreConfig
from kvshare_store.errors import NoSpaceError, StorageError
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.faults import from_below, places, round_of
from tests.support.faulty_remote import (
    REFUSALS,
    REFUSED,
    WRONG_ANSWERS,
    FaultyRemote,
    NetworkFault,
    refusal,
)
from tests.support.oracle import Driver, RowBook, prompt

pytestmark = pytest.mark.fault

FAULTS = [*REFUSALS, *WRONG_ANSWERS]
ids = [fault.name for fault in FAULTS]
OLD = prompt(1000, 40)


@pytest.fixture
def remotes(monkeypatch: pytest.MonkeyPatch) -> list[FaultyRemote]:
    """The remotes that stores have opened; the last one is in use."""
    opened: list[FaultyRemote] = []

    def open_(url: str, timeout_s: float) -> FaultyRemote:
        opened.append(FaultyRemote(open_remote(url, timeout_s)))
        return opened[-1]

    monkeypatch.setattr(levels_of, "open_remote", open_)
    return opened


@pytest.fixture
def driver(tmp_path: Path, remotes: list[FaultyRemote]) -> Iterator[Callable[..., Driver]]:
    """`driver(field=value)` opens a store whose rows survive only in the remote tier."""
    namespace = Namespace("model", KVLayout(2, 1, 4, "float32"))
    book = RowBook(namespace.layout)
    home = tmp_path / "home"
    stores: list[Store] = []

    def open_(**changes: Any) -> Driver:
        while stores:
            stores.pop().close()
        fields: dict[str, Any] = {
            "home": str(home),
            "disk": False,
            "remote": f"file://{tmp_path / 'remote'}",
            "remote_write": "through",
            "block_tokens": 8,
            "host_bytes": 1 << 20,
            "min_prompt_tokens": 8,
            "min_saving_ms": 0.0,
            "policy": "aggressive",
            "semantic": "never",
            "plan_deadline_ms": 20_000.0,
            "remote_timeout_ms": 5_000.0,
            "gc_seconds": 0.0,
        }
        stores.append(Store(StoreConfig(**fields | changes)))
        return Driver(stores[0], namespace, book)

    yield open_
    for store in stores:
        store.close()


@pytest.mark.parametrize("fault", FAULTS, ids=ids)
def test_every_call_of_a_store_in_use(
    driver: Callable[..., Driver], remotes: list[FaultyRemote], fault: NetworkFault
) -> None:
    engine = driver()
    remote = remotes[-1]
    engine.save(OLD)
    engine.store.flush()
    calls = round_of(engine, remote, 0)
    assert {"put", "get", "delete"} <= set(calls)
    assert places(calls, fault)
    for at in places(calls, fault):
        round_of(engine, remote, at, fault, at)
        assert from_below(engine, OLD).exact == 39, "what was saved before is not touched"
    assert remote.happened == len(places(calls, fault))
    assert driver().serve(OLD).exact == 39


def test_a_remote_that_is_away_stops_saving_not_serving(
    driver: Callable[..., Driver], remotes: list[FaultyRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvshare_store.observability.threads._REFUSED_S", 0.1)  # ten seconds, else
    engine, new = driver(), prompt(2, 40)
    engine.save(OLD)
    engine.store.flush()
    assert engine.serve(OLD).exact == 39
    remotes[-1].arm(REFUSED)
    assert engine.save(new), "it can be used at once"
    for _ in range(3):
        with pytest.raises(StorageError):
            keep(engine, new)
        assert engine.serve(OLD).exact == 39, "what is in memory serves on"
        assert engine.plan(new).declined == "no_donor", "it could not be kept"
    assert set(engine.store.stats()["errors"]) == {"unavailable"}
    remotes[-1].heal()
    until_saved(engine, new)
    assert from_below(engine, OLD).exact == 39


def keep(engine: Driver, tokens: list[int]) -> None:
    """Save durably. `StorageError` comes from the save while storage is known to fail, otherwise
    from the flush."""
    engine.save(tokens)
    engine.store.flush()


def until_saved(engine: Driver, tokens: list[int]) -> None:
    """Save until the breaker, and whatever refuses saves meanwhile, has let a call through
    again."""
    deadline = time.monotonic() + 60
    while from_below(engine, tokens).exact != len(tokens) - 1:
        assert time.monotonic() < deadline
        with contextlib.suppress(StorageError):
            engine.save(tokens)
        time.sleep(0.05)


def test_a_full_remote_stops_saving_not_serving(
    driver: Callable[..., Driver], remotes: list[FaultyRemote]
) -> None:
    engine, new = driver(), prompt(2, 40)
    engine.save(OLD)
    engine.store.flush()
    remotes[-1].arm(refusal("full", NoSpaceError("out of memory"), "put"))
    engine.save(new)
    engine.store.flush()
    assert engine.plan(new).declined == "no_donor"
    assert engine.store.stats()["errors"] == {"no_space": 1}
    assert from_below(engine, OLD).exact == 39
    remotes[-1].heal()
    engine.save(new)
    assert from_below(engine, new).exact == 39


def test_a_remote_that_fails_while_the_store_opens_is_no_obstacle(
    driver: Callable[..., Driver], remotes: list[FaultyRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the first listing fails, the store learns of objects as it uses them."""
    engine = driver(remote_bytes=1 << 20)
    engine.save(OLD)
    engine.store.flush()
    opened = levels_of.open_remote

    def refusing(url: str, timeout_s: float) -> FaultyRemote:
        remote: Any = opened(url, timeout_s)
        remote.arm(REFUSED, 1)
        return remote  # type: ignore[no-any-return]

    monkeypatch.setattr(levels_of, "open_remote", refusing)
    engine = driver(remote_bytes=1 << 20)
    assert "list" in remotes[-1].calls
    assert engine.serve(OLD).exact == 39
