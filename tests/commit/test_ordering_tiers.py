"""What a crash leaves while blocks move between host, disk and a remote.

As in test_ordering.py the home is copied after each step. The remote lies in the home here, so it
is copied too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.remotes.objects import ObjectRemote
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.maintenance.check import check_blocks, check_tree
from kvshare_store.store import Store
from kvshare_store.testing.tier_contract import damage_file
from tests.support.crashes import NEW, OLD, Config, Copy, Crashes, remote_of
from tests.support.oracle import Driver, prompt

pytestmark = pytest.mark.fault

Open = Callable[..., Driver]
Watch = Callable[[Driver], Crashes]
SLOT = 64 + 8 * 64


def after_calls(
    monkeypatch: pytest.MonkeyPatch, found: Crashes, cls: type, name: str, step: str
) -> None:
    """A copy right after each call of a method, also of an asynchronous one."""
    real: Any = getattr(cls, name)

    async def asynchronous(self: Any, *args: Any) -> Any:
        result = await real(self, *args)
        found.copy(step)
        return result

    def plain(self: Any, *args: Any, **options: Any) -> Any:
        result = real(self, *args, **options)
        found.copy(step)
        return result

    is_async = name in ("put", "get", "delete", "delete_prefix")
    monkeypatch.setattr(cls, name, asynchronous if is_async else plain)


def sound(copy: Copy, config: Config, engine: Driver, **settings: Any) -> None:
    """A store opens on the copy, both prompts serve, and files, tree and catalogue agree."""
    settings |= remote_of(copy.home)
    with Store(config(home=str(copy.home), **settings)) as store:
        again = Driver(store, engine.namespace, engine.book)
        assert again.serve(OLD).exact == 39, copy.step
        store.collect()
        store.flush()
        tree = check_tree(store.repository, repair=False)
        assert tree.problems == (), copy.step
        assert check_blocks(store.repository, tree.blocks, repair=False).problems == (), copy.step
        assert store.stats()["errors"] == {}, copy.step


@pytest.mark.parametrize("write", ["through", "back"])
def test_leaving_the_host(
    driver: Open, config: Config, crashes: Watch, home: Path, write: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With `back` the disk gets its copy only now, when the remote already has the block."""
    settings = {"host_bytes": 8 * SLOT, "disk_write": write, "remote_write": "through"}
    engine = driver(**settings, **remote_of(home))
    engine.save(OLD)
    found = crashes(engine)
    after_calls(monkeypatch, found, HostTier, "drop", "left the host")
    for seed in range(2, 6):
        engine.save(prompt(seed, 40))
        engine.store.flush()
    assert "left the host" in found.steps
    assert "after block renamed" in found.steps
    copies = found.end()
    engine.store.close()
    for copy in copies[:: max(1, len(copies) // 12)]:
        sound(copy, config, engine, **settings)


def test_reading_from_a_slow_tier(
    driver: Open, config: Config, crashes: Watch, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lease, read, place in the arena, promote to the disk: a crash costs at most a copy."""
    settings = {"remote_write": "through"}
    driver(**settings, **remote_of(home)).save(OLD)
    engine = driver(**settings, **remote_of(home))
    engine.save(NEW)
    engine.store.flush()
    for file in (home / "blocks").glob("*/*"):  # the disk has lost everything
        file.unlink()
    engine = driver(**settings, **remote_of(home))
    found = crashes(engine)
    lease = engine.store.blocks.leases.grant
    monkeypatch.setattr(engine.store.blocks.leases, "grant", found.after(lease, "leased"))
    after_calls(monkeypatch, found, ObjectRemote, "get", "read")
    after_calls(monkeypatch, found, HostTier, "seal", "placed")
    assert engine.serve(OLD).exact == 39
    engine.store.close()
    steps = found.steps
    assert steps[0] == "leased"
    assert {"read", "placed", "before block renamed", "after block renamed"} <= set(steps)
    for copy in found.end():
        sound(copy, config, engine, **settings)


def test_reading_a_bad_value_of_the_remote(
    driver: Open, config: Config, crashes: Watch, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is kept under `quarantine/`, then removed from `blocks/`; the next reader finds
    out."""
    settings = {"disk": False, "remote_write": "through"}
    engine = driver(**settings, **remote_of(home))
    engine.save(NEW)
    engine.save(OLD)
    engine.store.flush()
    engine = driver(**settings, **remote_of(home))
    name = next(node for node in engine.store.tree if node.tokens.tolist() == OLD).blocks[2]
    damage_file(next((home / "remote" / "blocks").glob(f"*/{name}")), "middle")
    found = crashes(engine)
    after_calls(monkeypatch, found, ObjectRemote, "put", "kept apart")
    after_calls(monkeypatch, found, ObjectRemote, "delete", "removed")
    assert engine.plan(OLD).declined == "not_resident"
    engine.store.flush()
    assert found.steps[:2] == ["kept apart", "removed"]
    for copy in found.end():
        with Store(config(home=str(copy.home), **settings, **remote_of(copy.home))) as store:
            again = Driver(store, engine.namespace, engine.book)
            assert again.serve(NEW).exact == 23, copy.step
            assert again.serve(OLD).exact in (0, 16), copy.step
            store.flush()
            again.save(OLD)
            store.flush()
            for block in store.blocks.host.names():
                store.blocks.host.drop(block)
            assert again.serve(OLD).exact == 39, copy.step


def test_purging_a_remote(
    driver: Open, config: Config, crashes: Watch, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks go first, then the quarantine, then the rows: what is left can always be purged
    again."""
    settings = {"disk": False, "remote_write": "through"}
    kept = driver(**settings, **remote_of(home))
    kept.save(NEW)
    mine = kept.namespace.for_tenant("mine")
    Driver(kept.store, mine, kept.book).save(OLD)
    found = crashes(kept)
    after_calls(monkeypatch, found, ObjectRemote, "delete_prefix", "prefix removed")
    (purged,) = kept.store.purge(mine.digest)
    assert purged.remaining == ()
    assert found.steps == ["prefix removed"]
    assert len(found.copies) == 2
    for copy in found.end():
        with Store(config(home=str(copy.home), **settings, **remote_of(copy.home))) as store:
            again = Driver(store, mine, kept.book)
            assert again.serve(OLD).exact == 0, copy.step
            (purged,) = store.purge(mine.digest)
            assert purged.remaining == ()
            assert Driver(store, kept.namespace, kept.book).serve(NEW).exact == 23
        left = (copy.home / "remote").rglob(f"*/{mine.digest}/*")
        assert not [path for path in left if path.is_file()]


def test_a_full_remote_that_must_hold_every_row_forgets_nodes(driver: Open, home: Path) -> None:
    settings = {"disk": False, "remote_write": "through", "remote_bytes": 40_000}
    engine = driver(**settings, **remote_of(home))
    for seed in range(12):
        engine.save(prompt(seed, 40))
        engine.store.flush()
        assert engine.serve(prompt(seed, 40)).exact == 39, "the newest is kept"
    use = engine.store.stats()["tiers"]["remote"]
    assert use["bytes"] <= use["budget"]
    assert engine.store.stats()["errors"] == {}
    assert 1 <= len(engine.store.tree) < 12
