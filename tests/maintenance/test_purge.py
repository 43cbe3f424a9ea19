"""Purging: no byte of the namespace stays, and no byte of another one goes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.config import StoreConfig, master_key
from kvshare_store.errors import (
    ConfigError,
    CorruptBlockError,
    NamespaceError,
    PlanError,
    StorageError,
)
from kvshare_store.keys import Keyring
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.frame import decode_frame
from kvshare_store.testing.tiers import damage_file
from tests.support.clocks import date_ahead
from tests.support.faulty import FaultyTier
from tests.support.oracle import Driver, prompt
from tests.support.tiers import disk_level

Config = Callable[..., StoreConfig]
TENANT = "tenant-Zq7x"
SLOT = 64 + 8 * 64
"""Bytes of shared memory for a block of eight rows."""
PROMPTS = [prompt(seed, 40 + seed) for seed in range(6)]
EDITED = [*PROMPTS[5][:20], 987_654_321, *PROMPTS[5][21:]]
THEIRS = prompt(99, 40)


class Two(NamedTuple):
    """A store with a namespace to purge and one to keep."""

    store: Store
    mine: Driver
    kept: Driver


@pytest.fixture
def mine(namespace: Namespace) -> Namespace:
    return msgspec.structs.replace(namespace, tenant=TENANT)


@pytest.fixture(params=["plain", "encrypted"])
def key(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """`encryption_key`, or the empty string."""
    if request.param == "plain":
        return ""
    file = tmp_path / "key"
    file.write_bytes(bytes(range(100, 132)))
    file.chmod(0o600)
    return f"file:{file}"


@pytest.fixture
def two(config: Config, mine: Namespace, namespace: Namespace, key: str) -> Iterator[Two]:
    """Prompts saved alternately in both namespaces, so that files of the catalogue and places in
    shared memory are mixed. The host tier is so small that rows have left slots which were not
    reused."""
    with Store(config(encryption_key=key, host_bytes=40 * SLOT)) as store:
        two = Two(store, Driver(store, mine), Driver(store, namespace))
        two.kept.save(THEIRS)
        for tokens in PROMPTS:
            two.mine.save(tokens)
            store.flush()
        two.mine.serve_and_save(EDITED)
        two.kept.save(prompt(98, 24))
        store.flush()
        yield two


_others: set[int] = set()
"""Inodes of memory files of stores that other tests have closed. Rows that were handed out keep
them open until Python's garbage collector drops those rows."""


@pytest.fixture(autouse=True)
def memory_of_others() -> None:
    _others.clear()
    _others.update(path.stat().st_ino for path in arenas())


def arenas() -> Iterator[Path]:
    """Anonymous memory files that this process has opened in this test."""
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this folder itself
            if (
                os.readlink(path).startswith("/memfd:kvshare ")
                and path.stat().st_ino not in _others
            ):
                yield path


def files(home: Path) -> Iterator[Path]:
    """All files of a home, and the shared memory of this process."""
    yield from arenas()
    yield from (path for path in home.rglob("*") if path.is_file())


def traces(mine: Namespace) -> dict[str, set[bytes]]:
    """Byte strings that identify the namespace: tokens, edits, rows, digest and tenant."""
    rows = set()
    for tokens in PROMPTS:
        words = Driver(None, mine).book.computed(tokens, len(tokens), "")  # type: ignore[arg-type]
        rows |= {words[0, part, at].tobytes() for part in (0, 1) for at in range(len(tokens))}
    tokens = {np.asarray(t[at : at + 3], np.int32).tobytes() for t in PROMPTS for at in (0, 9, 30)}
    return {
        "tokens": tokens | {msgspec.msgpack.encode(987_654_321)},
        "rows": rows,
        "digest": {mine.digest.encode(), bytes.fromhex(mine.digest)},
        "tenant": {TENANT.encode()},
    }


def found(home: Path, mine: Namespace) -> dict[str, set[str]]:
    """For each kind of trace the places where one is left: the folder of the home, or `arena`."""
    wanted = traces(mine)
    places: dict[str, set[str]] = {}
    for path in files(home):
        data = path.read_bytes()
        place = path.relative_to(home).parts[0] if path.is_relative_to(home) else "arena"
        for kind, patterns in wanted.items():
            if any(pattern in data for pattern in patterns):
                places.setdefault(kind, set()).add(place)
    return places


def leave_leftovers(two: Two, home: Path, mine: Namespace) -> None:
    """Put bytes of the namespace where no list has them: quarantined, unfinished, without a
    node."""
    names = [
        name for node in two.store.tree if node.namespace == mine.digest for name in node.blocks
    ]
    block = home / "blocks" / names[0][:2] / f"{names[0]}.kvb"
    frame = block.read_bytes()
    (home / "tmp" / "0123.4").write_bytes(frame[: len(frame) // 2])
    garbage = "ab" * 32
    (home / "blocks" / "ab").mkdir(exist_ok=True)
    (home / "blocks" / "ab" / f"{garbage}.kvb").write_bytes(frame)
    (home / "quarantine" / names[1]).write_bytes(damaged(frame))


def damaged(frame: bytes) -> bytes:
    return b"\0" + frame[1:]


# --- nothing stays ------------------------------------------------------------------------------


def test_no_byte_stays(two: Two, home: Path, mine: Namespace, key: str) -> None:
    leave_leftovers(two, home, mine)
    before = found(home, mine)
    assert before["rows"] == ({"arena"} if key else {"arena", "blocks", "quarantine", "tmp"})
    assert ("tokens" in before, "tenant" in before) == (not key, not key)
    assert "blocks" in before["digest"], "in the headers of the blocks"
    purged = two.store.purge(mine.digest)
    assert [one.remaining for one in purged] == [()]
    assert (purged[0].nodes, purged[0].namespace) == (len(PROMPTS) + 1, mine.digest)
    assert found(home, mine) == {}
    assert not list((home / "quarantine").iterdir())
    assert two.store.namespace(mine.digest) is None


def test_no_old_version_stays(two: Two, home: Path, mine: Namespace) -> None:
    """LanceDB's files are compressed, so a search for bytes in them might miss some."""
    two.store.purge(mine.digest)
    catalog = two.store.repository.catalog
    assert catalog is not None
    assert not any(catalog.old_versions().values())
    for table in ("nodes", "namespaces"):
        folder = home / "catalog" / f"{table}.lance"
        assert len(list((folder / "_versions").glob("*.manifest"))) == 1
        assert not list(folder.glob("_deletions/*")), "a deleted row would still be in its file"
    assert {namespace for _, namespace in catalog.ids()} == {two.kept.namespace.digest}
    assert [known.digest for known in catalog.records.read()] == [two.kept.namespace.digest]


def test_no_byte_stays_after_the_clock_was_set_back(
    two: Two, config: Config, home: Path, mine: Namespace, key: str
) -> None:
    """LanceDB keeps versions, and all that is in them, until the clock is past them."""
    two.store.close()
    date_ahead(home / "catalog", 86_400)
    with Store(config(encryption_key=key)) as again:
        assert [one.remaining for one in again.purge(mine.digest)] == [()]
        assert found(home, mine) == {}
        for table in ("nodes", "namespaces"):
            versions = home / "catalog" / f"{table}.lance" / "_versions"
            assert len(list(versions.glob("*.manifest"))) == 1
        assert Driver(again, two.kept.namespace, two.kept.book).serve(THEIRS).exact == 39


def test_other_namespaces_stay(two: Two, config: Config, mine: Namespace, key: str) -> None:
    two.store.purge(mine.digest)
    assert two.mine.plan(PROMPTS[0]).declined == "empty_store"
    assert two.kept.serve(THEIRS).exact == len(THEIRS) - 1
    two.store.close()
    with Store(config(encryption_key=key)) as again:
        kept = Driver(again, two.kept.namespace, two.kept.book)
        assert kept.serve(THEIRS).exact == len(THEIRS) - 1
        assert kept.serve(prompt(98, 24)).exact == 23
        assert Driver(again, mine).plan(PROMPTS[0]).declined == "empty_store"


def test_a_purged_namespace_can_be_used_again(two: Two, mine: Namespace) -> None:
    two.store.purge(mine.digest)
    two.mine.save(PROMPTS[0])
    two.store.flush()
    assert two.mine.serve(PROMPTS[0]).exact == len(PROMPTS[0]) - 1


def test_the_next_plan_of_anybody_tells_engines_to_drop_their_copies(
    two: Two, mine: Namespace
) -> None:
    """Also a plan without rows. While rows are leased nothing is purged, and nothing told."""
    leased = two.mine.plan(PROMPTS[5])
    told = two.kept.serve(THEIRS).wiped
    assert told
    assert two.store.purge(mine.digest)[0].remaining
    assert two.kept.serve(THEIRS).wiped == told == leased.wiped
    two.mine.finish(leased)
    two.store.purge(mine.digest)
    after = two.kept.serve(THEIRS).wiped
    assert after not in (told, "")
    assert two.mine.plan(PROMPTS[0]).wiped == after


def test_the_last_namespace_leaves_nothing_either(two: Two, home: Path, mine: Namespace) -> None:
    two.store.purge(two.kept.namespace.digest)
    two.store.purge(mine.digest)
    assert found(home, mine) == {}
    assert two.store.stats()["nodes"] == 0


# --- what is to be purged -----------------------------------------------------------------------


def test_by_tenant_and_by_a_beginning(two: Two, mine: Namespace) -> None:
    adapter = mine.for_tenant(TENANT, lora="adapter")
    Driver(two.store, adapter).save(PROMPTS[0])
    two.store.flush()
    assert {one.namespace for one in two.store.purge(tenant=TENANT, dry_run=True)} == {
        mine.digest,
        adapter.digest,
    }
    assert [one.namespace for one in two.store.purge(adapter.digest[:9])] == [adapter.digest]
    assert [one.namespace for one in two.store.purge(tenant=TENANT)] == [mine.digest]
    for choice in ({"tenant": TENANT}, {"namespace": mine.digest}, {"namespace": ""}):
        with pytest.raises(NamespaceError):
            two.store.purge(**choice)  # type: ignore[arg-type]
    assert two.kept.serve(THEIRS).exact == len(THEIRS) - 1


# --- what has to end first ----------------------------------------------------------------------


def test_it_waits_for_leases_and_says_so(two: Two, home: Path, mine: Namespace) -> None:
    plan = two.mine.plan(PROMPTS[5])
    (purged,) = two.store.purge(mine.digest)
    assert purged.remaining == (f"{len(plan.blocks):,} blocks are leased",)
    two.mine.check(PROMPTS[5], plan)  # the reader still has the right rows
    assert two.mine.plan(PROMPTS[0]).declined == "empty_store", "gone from lookup at once"
    two.mine.finish(plan)
    (purged,) = two.store.purge(mine.digest)
    assert purged.remaining == ()
    assert found(home, mine) == {}


def test_an_expired_lease_keeps_nothing_waiting(
    config: Config, mine: Namespace, home: Path
) -> None:
    with Store(config(lease_seconds=0.05, plan_deadline_ms=100.0)) as store:
        driver = Driver(store, mine)
        driver.save(PROMPTS[0])
        store.flush()
        driver.plan(PROMPTS[0])
        (purged,) = store.purge(mine.digest, patience=20.0)
        assert purged.remaining == ()
        assert found(home, mine) == {}


def test_it_waits_for_saves_and_lets_no_new_one_begin(
    two: Two, home: Path, mine: Namespace
) -> None:
    staged = two.mine.stage(prompt(7, 32))
    (purged,) = two.store.purge(mine.digest)
    assert purged.remaining == ("1 saves are in progress",)
    with two.store.nodes.lock:
        two.store.nodes.namespaces.closed.add(mine.digest)
    assert two.store.stage(prompt(8, 32), mine).known
    two.store.nodes.namespaces.closed.clear()
    two.mine.commit(staged)
    (purged,) = two.store.purge(mine.digest)
    assert purged.remaining == ()
    assert found(home, mine) == {}


def test_slots_that_others_fill_may_hold_old_rows(two: Two, home: Path, mine: Namespace) -> None:
    """A save of another namespace holds a slot of the purged one. The purge waits for it, and wipes
    what the save gives back unused."""
    with two.store.nodes.lock:
        for name in two.store.blocks.host.names():
            if two.store.blocks.host.namespace(name) == mine.digest:
                two.store.blocks.host.drop(name)
    filling, go = threading.Event(), threading.Event()

    class Stuck:
        def read_into(self, offset: int, target: memoryview) -> None:
            filling.set()
            assert go.wait(30)
            raise PlanError("the client is gone")

    staged = two.store.stage(prompt(7, 160), two.kept.namespace)
    with ThreadPoolExecutor(1) as pool:
        commit = pool.submit(two.store.commit, staged.id, Stuck())
        assert filling.wait(30)
        (purged,) = two.store.purge(mine.digest)
        assert purged.remaining == ("1 slots in shared memory are being filled",)
        assert found(home, mine) == {"rows": {"arena"}}
        go.set()
        assert isinstance(commit.exception(), PlanError)
    assert found(home, mine) == {}


# --- tiers that refuse --------------------------------------------------------------------------


def test_a_tier_that_refuses_is_named(two: Two, home: Path, mine: Namespace, key: str) -> None:
    """Plain rows can be purged again; encrypted ones are unreadable from then on."""
    level = disk_level(two.store)
    level.tier = faulty = Refusing(level.tier)
    faulty.refuses = True
    (purged,) = two.store.purge(mine.digest)
    assert len(purged.remaining) == 1
    assert "disk" in purged.remaining[0]
    assert ("unreadable" in purged.remaining[0]) == bool(key)
    faulty.refuses = False
    if key:
        assert set(found(home, mine)) == {"digest"}
        with pytest.raises(NamespaceError):
            two.store.purge(mine.digest)
    else:
        (purged,) = two.store.purge(mine.digest)
        assert purged.remaining == ()
        assert found(home, mine) == {}


class Refusing(FaultyTier):
    """A tier that removes nothing."""

    refuses = False

    async def purge(self, namespace: str, names: object, keep: object = ()) -> None:
        if self.refuses:
            raise StorageError("read-only file system")
        await self.inner.purge(namespace, names)  # type: ignore[arg-type]


# --- encryption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["encrypted"], indirect=True)
def test_the_master_key_does_not_open_what_was_purged(
    two: Two, home: Path, mine: Namespace, key: str
) -> None:
    """An attacker has a copy of the blocks and the master key, but the salt is gone."""
    node = next(node for node in two.store.tree if node.namespace == mine.digest)
    name = node.blocks[0]
    copy = (home / "blocks" / name[:2] / f"{name}.kvb").read_bytes()

    def opened() -> bytes:
        keys = Keyring(master_key(key))
        Catalog(home / "catalog", keys).records.read()
        return bytes(decode_frame(copy, name, keys).data)

    assert opened()
    two.store.purge(mine.digest)
    with pytest.raises(CorruptBlockError):
        opened()
    two.mine.save(PROMPTS[0])
    two.store.flush()
    with pytest.raises(CorruptBlockError):
        opened()  # the namespace has a salt again, but another one


@pytest.mark.parametrize("codec", ["none", "planes"])
def test_an_encrypted_store_survives_a_restart(
    config: Config, mine: Namespace, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    monkeypatch.setenv("KVSHARE_TEST_KEY", os.urandom(32).hex())
    settings = {"encryption_key": "env:KVSHARE_TEST_KEY", "disk_codec": codec}
    with Store(config(**settings)) as store:
        driver = Driver(store, mine)
        driver.save(PROMPTS[5])
        driver.serve_and_save(EDITED)
    with Store(config(**settings)) as store:
        again = Driver(store, mine, driver.book)
        assert again.serve(PROMPTS[5]).exact == len(PROMPTS[5]) - 1
        assert again.serve(EDITED).reused == len(EDITED) - 1
        near = [*PROMPTS[5][1:15], 3, *PROMPTS[5][15:]]
        assert again.serve(near).reused > 20, "its vector has survived as well"


def test_the_wrong_key_and_no_key_are_refused(
    config: Config, mine: Namespace, two: Two, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.store.close()
    monkeypatch.setenv("KVSHARE_TEST_KEY", os.urandom(32).hex())
    with pytest.raises(ConfigError, match="not the key" if key else "without an encryption_key"):
        Store(config(encryption_key="env:KVSHARE_TEST_KEY"))
    if key:
        with pytest.raises(ConfigError, match="with an encryption_key"):
            Store(config())
    with Store(config(encryption_key=key)) as store:
        assert Driver(store, mine, two.mine.book).serve(PROMPTS[0]).exact > 0


def test_nothing_is_written_in_clear_where_a_key_was_set_before_the_first_prompt(
    config: Config, mine: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an import into a home that was started for it, from a shell without the key."""
    monkeypatch.setenv("KVSHARE_TEST_KEY", os.urandom(32).hex())
    with Store(config(encryption_key="env:KVSHARE_TEST_KEY")):
        pass
    for visiting in (True, False):
        with pytest.raises(ConfigError, match="with an encryption_key"):
            Store(config(), visiting=visiting)
    with Store(config(encryption_key="env:KVSHARE_TEST_KEY")) as store:
        assert Driver(store, mine).save(PROMPTS[0])


def test_a_wrong_key_marks_nothing(
    config: Config, mine: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSHARE_TEST_KEY", os.urandom(32).hex())
    with Store(config()) as store:
        assert Driver(store, mine).save(PROMPTS[0])
    with pytest.raises(ConfigError, match="without an encryption_key"):
        Store(config(encryption_key="env:KVSHARE_TEST_KEY"))
    with Store(config()) as store:
        assert len(store.tree) == 1


@pytest.mark.parametrize("key", ["encrypted"], indirect=True)
def test_damage_to_an_encrypted_block_is_a_miss(two: Two, home: Path, config: Config, key: str,
                                                mine: Namespace) -> None:  # fmt: skip
    two.store.close()
    for file in (home / "blocks").glob("*/*"):
        damage_file(file, "last")
    with Store(config(encryption_key=key)) as store:
        assert Driver(store, mine).plan(PROMPTS[0]).declined
        assert set(store.stats()["errors"]) == {"corrupt"}
