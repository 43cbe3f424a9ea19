"""Every file call of the disk tier fails once, in every way: no wrong row is ever served."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError, ShortBlockError
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.tiers import check_use, make_block, same
from tests.support.faults import from_below, places, round_of
from tests.support.faulty_files import REFUSALS, WRONG_BYTES, Fault, FaultyFiles, refusal
from tests.support.faulty_files import slow as slowed
from tests.support.oracle import Driver, RowBook, prompt
from tests.support.waiting import eventually

pytestmark = pytest.mark.fault

FAULTS = [*REFUSALS, *WRONG_BYTES]
ids = [fault.name for fault in FAULTS]
SMALL = {
    "block_tokens": 8,
    "host_bytes": 1 << 20,
    "disk_bytes": 1 << 24,
    "min_prompt_tokens": 8,
    "min_saving_ms": 0.0,
    "policy": "aggressive",
    "semantic": "never",
    "plan_deadline_ms": 20_000.0,
}


# --- the tier alone -----------------------------------------------------------------------------

A, B, C = (make_block(seed) for seed in range(3))


async def use_tier(tier: DiskTier) -> None:
    """Puts, gets and deletes. Each may fail with a tier's error; no get may return wrong rows."""
    blocks = dict((A, B, C))
    for call, (name, block) in (
        ("put", A), ("put", B), ("get", A), ("put", A), ("delete", B), ("get", B), ("put", C),
        ("put", B), ("get", C),
    ):  # fmt: skip
        with contextlib.suppress(KVShareError):
            if call == "put":
                await tier.put(name, block)
            elif call == "delete":
                await tier.delete(name)
            else:
                assert same(await tier.get(name), blocks[name])


async def check_tier(tier: DiskTier, folder: Path) -> None:
    """Every block the tier lists is there, and correct or refused; everything can be put again."""
    files = (folder / "blocks").glob("*/*")
    assert tier.use().bytes >= sum(file.stat().st_size for file in files)
    assert list((folder / "tmp").iterdir()) == []
    for name, block in (A, B, C):
        with contextlib.suppress(KVShareError):
            assert same(await tier.get(name), block)
        await tier.put(name, block)
        assert same(await tier.get(name), block)
    check_use(tier)
    assert tier.use().bytes == sum(f.stat().st_size for f in (folder / "blocks").glob("*/*"))


async def with_fault(folder: Path, fault: Fault | None, at: int = 0) -> list[str]:
    """Run the scenario with a fault at one call; returns the calls it made."""
    with FaultyFiles() as disk:
        if fault is not None:
            disk.arm(fault, at)
        tier = None
        with contextlib.suppress(KVShareError):
            tier = await DiskTier.open(folder, 1 << 20)
            await asyncio.to_thread(tier.use)  # the first scan: its calls come in the same order
            await use_tier(tier)
        calls = list(disk.calls)
        disk.heal()
        assert fault is None or disk.happened == 1
    if tier is not None:
        await check_tier(tier, folder)
        await tier.close()
    tier = await DiskTier.open(folder, 1 << 20)
    await check_tier(tier, folder)
    await tier.close()
    return calls


@pytest.mark.parametrize("fault", FAULTS, ids=ids)
def test_every_call_of_the_tier(tmp_path: Path, fault: Fault) -> None:
    calls = asyncio.run(with_fault(tmp_path / "0", None))
    for at in places(calls, fault):
        asyncio.run(with_fault(tmp_path / str(at), fault, at))


@pytest.mark.parametrize("half", ["short read", "short write"])
def test_a_call_that_does_half_of_it_is_finished(tmp_path: Path, half: str) -> None:
    async def scenario() -> None:
        with FaultyFiles() as disk:
            disk.arm(next(fault for fault in WRONG_BYTES if fault.name == half))
            tier = await DiskTier.open(tmp_path, 1 << 20)
            for name, block in (A, B):
                await tier.put(name, block)
                assert same(await tier.get(name), block)
            assert disk.happened
            await tier.close()

    asyncio.run(scenario())


def half_of_the_file(
    real: Callable[..., int], descriptor: int, views: list[memoryview], at: int
) -> int:
    """What `preadv` returns when the file was truncated to half of what `fstat` reported."""
    size = os.fstat(descriptor).st_size // 2
    return real(descriptor, [views[0][: size - at]], at) if at < size else 0


def test_a_read_that_ends_early_is_short(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = await DiskTier.open(tmp_path, 1 << 20)
        await tier.put(*A)
        with FaultyFiles() as disk:
            disk.arm(Fault("ends after half", frozenset({"preadv"}), half_of_the_file))
            with pytest.raises(ShortBlockError):
                await tier.get(A[0])
        await tier.close()

    asyncio.run(scenario())


# --- the whole store ----------------------------------------------------------------------------


@pytest.fixture
def disk() -> Iterator[FaultyFiles]:
    with FaultyFiles() as faulty:
        yield faulty


@pytest.fixture
def driver(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driver]]:
    """`driver(field=value)` opens the home's store. Only one call at a time reaches the disk,
    so that calls always come in the same order."""
    one = DiskTier.properties._replace(max_concurrency=1)
    monkeypatch.setattr(DiskTier, "properties", one)
    namespace = Namespace("model", KVLayout(2, 1, 4, "float32"))
    book = RowBook(namespace.layout)
    opened: list[Store] = []

    def open_(**changes: Any) -> Driver:
        while opened:
            opened.pop().close()
        opened.append(Store(StoreConfig(**{"home": str(home)} | SMALL | changes)))
        return Driver(opened[0], namespace, book)

    yield open_
    for store in opened:
        store.close()


@pytest.mark.parametrize("fault", FAULTS, ids=ids)
def test_every_call_of_a_store_in_use(
    driver: Callable[..., Driver], disk: FaultyFiles, fault: Fault
) -> None:
    engine, old = driver(), prompt(1000, 40)
    engine.store.pin(str(engine.save(old)))  # it does not make room on a disk that is full
    engine.store.flush()
    calls = round_of(engine, disk, 0)
    assert set(calls) >= {"open", "writev", "fsync", "replace", "preadv", "unlink"}
    for at in places(calls, fault):
        round_of(engine, disk, at, fault, at)
        assert from_below(engine, old).exact == 39, "what was saved before is not touched"
    # two blocks in one folder make fewer calls than two in folders of their own
    assert disk.happened >= len(places(calls, fault)) - 6
    assert disk.happened
    assert set(engine.store.stats()["errors"]) <= {
        "no_space", "storage", "corrupt", "short", "missing"
    }  # fmt: skip
    assert driver().serve(old).exact == 39


def test_every_call_of_a_store_that_opens(driver: Callable[..., Driver], disk: FaultyFiles) -> None:
    """It opens or reports that it cannot; either way a refused call loses nothing."""
    old = prompt(1, 16)
    driver().save(old)
    engine = driver()
    before = len(disk.calls)
    engine = driver()
    engine.store.blocks.report()
    assert from_below(engine, old).exact == 15
    for at in range(1, len(disk.calls) - before + 1):
        engine.store.close()
        disk.arm(REFUSALS[at % len(REFUSALS)], at)
        try:
            engine = driver()
            engine.store.blocks.report()
            from_below(engine, old)
            disk.heal()
        except KVShareError:
            disk.heal()
            engine = driver()
        assert from_below(engine, old).exact == 15, f"lost by call {at}"


FULL = Fault("full disk", frozenset({"writev"}), refusal(errno.ENOSPC).happen)


def test_a_full_disk_stops_saving_not_serving(
    driver: Callable[..., Driver], disk: FaultyFiles
) -> None:
    """Pinned prompts are not evicted for new ones."""
    engine, old, new = driver(), prompt(1, 40), prompt(2, 40)
    engine.store.pin(str(engine.save(old)))
    engine.store.flush()
    disk.arm(FULL)
    for _ in range(3):
        assert engine.save(new), "it can be used at once"
        assert from_below(engine, old).exact == 39
        assert engine.plan(new).declined == "no_donor", "it could not be kept"
    assert engine.store.stats()["errors"] == {"no_space": 3}
    disk.heal()
    engine.save(new)
    assert from_below(engine, new).exact == 39
    assert from_below(driver(), new).exact == 39


def test_a_slow_disk_is_a_miss_and_late_rows_serve_the_next(
    driver: Callable[..., Driver], disk: FaultyFiles
) -> None:
    driver().save(prompt(1, 40))
    engine = driver(plan_deadline_ms=50.0)
    disk.arm(slowed(0.2))  # five blocks of four calls each: four seconds
    assert engine.plan(prompt(1, 40)).declined == "not_resident"
    disk.heal()
    assert eventually(lambda: engine.serve(prompt(1, 40)).exact == 39, 60.0)


@pytest.mark.parametrize("days", [-3650, 3650])
def test_a_clock_that_jumps(
    driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    engine, old = driver(lease_seconds=60.0), prompt(1, 40)
    engine.save(old)
    held = engine.plan(old)
    shift, now, now_ns = days * 86_400, time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + shift)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + shift * 10**9)
    assert engine.store.blocks.reap(set()) == [], "a lease ends by the clock that does not jump"
    engine.check(old, held)
    engine.finish(held)
    for seed in range(2, 5):
        engine.save(prompt(seed, 16))
        assert from_below(engine, prompt(seed, 16)).exact == 15
    monkeypatch.undo()
    assert from_below(engine, old).exact == 39
    engine.save(prompt(9, 16))
    assert from_below(driver(), prompt(9, 16)).exact == 15
    assert [engine.store.stats()["errors"] for engine in [driver()]] == [{}]
