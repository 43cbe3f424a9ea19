"""Objects in a real home, behind a real daemon, without LMCache."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvshare_connectors.lmcache.objects import Parts, Place, place_of
from kvshare_connectors.lmcache.shelf import Shelf, check_settings

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.errors import ConfigError, NoSpaceError
from kvshare_store.namespace import Tenants
from tests.support.daemons import Daemon, serving

NBYTES = 40_000
TENANTS = Tenants(StoreConfig())


def place(number: int, salt: str = "", nbytes: int = NBYTES) -> Place:
    found = place_of(Parts(number.to_bytes(32, "big"), "m", 0, 0, salt), nbytes, TENANTS)
    assert found is not None
    return found


def data(number: int, nbytes: int = NBYTES) -> memoryview:
    return memoryview(random.Random(number).randbytes(nbytes))


def put(shelf: Shelf, *numbers: int, salt: str = "") -> None:
    for number in numbers:
        shelf.put(place(number, salt), data(number))
    shelf.flush()


def taken(shelf: Shelf, number: int, salt: str = "", nbytes: int = NBYTES) -> bool:
    """Whether the object is here. If so, its bytes are checked."""
    target = memoryview(bytearray(nbytes))
    here = shelf.take(place(number, salt, nbytes), target)
    assert not here or target == data(number, nbytes)
    return here


def has(shelf: Shelf, *numbers: int) -> list[bool]:
    return shelf.has([place(number).node for number in numbers])


def settings(home: Path, **changes: object) -> StoreConfig:
    small = {"host_bytes": 1 << 21, "disk_bytes": 1 << 24, "semantic": "never", "gc_seconds": 0.0}
    unhurried = {"plan_deadline_ms": 20_000.0}
    return StoreConfig(**{"home": str(home)} | small | unhurried | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreConfig]:
    """A home with a daemon, for tests whose objects have numbers of their own."""
    config = settings(tmp_path_factory.mktemp("shared"), block_tokens=10, disk_bytes=1 << 26)
    with serving(config):
        yield config


def test_what_is_put_is_taken_by_others_until_it_is_forgotten(shared: StoreConfig) -> None:
    with Shelf(shared) as one, Shelf(shared) as other:
        put(one, 1, 2, 3)
        assert has(other, 1, 2, 3, 4) == [True, True, True, False]
        assert [taken(other, n) for n in (1, 2, 3, 4)] == [True, True, True, False]
        assert not taken(other, 1, nbytes=NBYTES + 1), "another size is another object"
        assert not taken(other, 1, salt="ann"), "a tenant of its own"
        assert other.forget([place(2).node, place(4).node]) == {place(2).node}
        assert has(one, 1, 2, 3) == [True, False, True]
        assert not taken(one, 2)
        assert other.client().stats()["leases"] == 0


def test_objects_of_any_size_in_blocks_of_any_size(shared: StoreConfig) -> None:
    sizes = {10: 0, 11: 1, 12: 255, 13: 256, 14: 257, 15: 5000, 16: 300_001}
    with Shelf(shared) as shelf:
        for number, nbytes in sizes.items():
            shelf.put(place(number, nbytes=nbytes), data(number, nbytes))
        shelf.put(place(17), memoryview(bytes(NBYTES)))  # most of its blocks are the same
        assert all(taken(shelf, number, nbytes=nbytes) for number, nbytes in sizes.items())
        target = memoryview(bytearray(b"x" * NBYTES))
        assert shelf.take(place(17), target)
        assert target == bytes(NBYTES)


def test_a_purge_takes_one_tenants_objects(shared: StoreConfig) -> None:
    with Shelf(shared) as shelf:
        put(shelf, 20, salt="ann")
        put(shelf, 21, salt="bob")
        (purged,) = shelf.client().call(protocol.Purge(tenant="ann"), 30.0)
        assert purged["nodes"] == 1
        assert not taken(shelf, 20, "ann")
        assert taken(shelf, 21, "bob")


def test_more_than_memory_holds_goes_through_it(shared: StoreConfig) -> None:
    numbers = range(1000, 1100)  # 4 MB through 2 MiB of memory
    with Shelf(shared) as shelf:
        for number in numbers:
            shelf.put(place(number), data(number))
        shelf.flush()
        assert has(shelf, *numbers) == [True] * 100
        assert all(taken(shelf, number) for number in numbers)


def test_an_object_that_memory_cannot_hold_is_refused(shared: StoreConfig) -> None:
    with Shelf(shared) as shelf, pytest.raises(NoSpaceError):
        shelf.put(place(30, nbytes=1 << 26), memoryview(bytes(1 << 26)))


def test_many_at_once_take_what_they_put(shared: StoreConfig) -> None:
    done: list[int] = []

    def client(number: int) -> None:
        with Shelf(shared) as shelf:
            for at in range(40, 46):
                put(shelf, at, 100 * number + at)  # one that all clients put, one of its own
                assert taken(shelf, at)
                assert taken(shelf, 100 * number + at)
        done.append(number)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [1, 2, 3, 4]


def test_objects_outlive_the_daemon_encrypted_and_damage_is_a_miss(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER", "cd" * 32)
    config = settings(home, encryption_key="env:MASTER", idle_exit_s=60.0)
    with Daemon(config) as daemon, Shelf(config) as shelf:
        put(shelf, 1)
        (first,) = block_files(home)
        put(shelf, 2)
        daemon.kill()
        files = [path for path in home.rglob("*") if path.is_file()]
        assert not any(bytes(data(1)[1000:1064]) in path.read_bytes() for path in files)
        damage(first)
        assert not taken(shelf, 1), "a shelf starts a daemon that is gone"
        assert has(shelf, 1, 2) == [False, True], "what was damaged is forgotten"
        assert taken(shelf, 2)
        put(shelf, 1)
        assert taken(shelf, 1)
        shelf.client().stop()


def block_files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file() and path.stat().st_size >= NBYTES]


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(NBYTES // 2)
        file.write(b"damage")


def test_the_oldest_go_when_the_disk_is_full_and_none_is_wrong(home: Path) -> None:
    config = settings(home, disk_bytes=1 << 20, eviction="lru")
    with serving(config), Shelf(config) as shelf:
        for number in range(60):  # 2.4 MB
            put(shelf, number)
            assert has(shelf, 0) == [True], "whoever asks for an object keeps it"
        here = [number for number in range(60) if taken(shelf, number)]
    assert here[0] == 0
    assert here[-1] == 59
    assert 10 < len(here) < 30


def test_rows_that_a_codec_has_changed_are_no_object(home: Path) -> None:
    config = settings(home, disk_codec="int8")
    numbers = np.random.default_rng(1).standard_normal(NBYTES // 2, np.float32)
    rows = memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # bfloat16
    target = memoryview(bytearray(NBYTES))
    with serving(config), Shelf(config) as shelf:
        shelf.put(place(1), rows)
        shelf.flush()
        assert shelf.take(place(1), target), "in memory it is as it was put"
        assert target == rows
    with serving(config), Shelf(config) as shelf:
        assert not shelf.take(place(1), target)


def test_a_home_that_wants_longer_prompts_is_refused(home: Path) -> None:
    class Longer:
        """A client of such a home."""

        def __init__(self) -> None:
            self.home = home

        def call(self, _: Any) -> dict[str, int]:
            return {"min_prompt_tokens": 65}

    with pytest.raises(ConfigError, match=r"min_prompt_tokens .* is 65: .* 64 or less"):
        check_settings(Longer())  # type: ignore[arg-type]
