"""Leases and reservations end, whatever happens to the client; until then their rows stay."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvshare_store.blocks.leases import LeaseBook
from kvshare_store.blocks.pool import Reserved
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.wrappers import WrapperTier
from kvshare_store.errors import LeaseError, NoSpaceError, PlanError
from kvshare_store.plan import Outcome
from kvshare_store.save.staging import Buffer, packed
from kvshare_store.store import Store
from kvshare_store.tensors.frame import Block, block_name
from tests.support.faulty import SlowTier
from tests.support.oracle import Driver, gather, pick, prompt, rows_for
from tests.support.tiers import drop_from_host
from tests.support.waiting import until

Open = Callable[..., Driver]
ROW = 64
SLOT = 64 + 8 * ROW


class Clock:
    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


def clocked(store: Store) -> Clock:
    """Let leases go by a clock of the test's."""
    clock = Clock()
    store.blocks.pool.leases = LeaseBook(clock)
    return clock


def held(store: Store) -> tuple[int, int]:
    """Open leases, and bytes of reserved slots."""
    stats = store.stats()
    sealed = sum(store.blocks.host.size(name) or 0 for name in store.blocks.host.names())
    return stats["leases"], stats["tiers"]["host"]["bytes"] - sealed


# --- every way to end ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["finish", "abort", "expiry", "death"])
def test_a_lease_ends(driver: Open, way: str) -> None:
    engine = driver(lease_seconds=10.0)
    clock = clocked(engine.store)
    engine.save(prompt(1, 40))
    plan = engine.plan(prompt(1, 40), owner="client")
    assert held(engine.store) == (1, 0)
    engine.store.reap({"another"})
    assert held(engine.store) == (1, 0)
    if way == "finish":
        engine.finish(plan)
    elif way == "abort":
        engine.finish(plan, failed="aborted")
    elif way == "expiry":
        clock.now += 9.9
        engine.store.reap()
        assert held(engine.store) == (1, 0), "not yet"
        clock.now += 0.4 + engine.store.config.plan_deadline_ms / 1e3
        engine.store.reap()
    else:
        engine.store.reap({"client"})
    assert held(engine.store) == (0, 0)
    engine.finish(plan)  # too late to count
    stats = engine.store.stats()
    reasons = {"finish": {}, "abort": {"aborted": 1}}
    assert stats["declined"] == reasons.get(way, {"lease_expired": 1})
    assert stats["lookups"] == 1 == stats["hits_exact"] + stats["misses"]


@pytest.mark.parametrize("way", ["commit", "abandon", "next save", "death", "refused commit"])
def test_a_staged_save_ends(driver: Open, way: str) -> None:
    """It holds no memory, only the prompt's name."""
    engine = driver()
    store = engine.store
    staged = store.stage(prompt(1, 40), engine.namespace, owner="client")
    assert (held(store), store.stats()["staged"]) == ((0, 0), 1)
    if way == "commit":
        assert store.commit(staged.id, Buffer(bytes(40 * ROW)))
    elif way == "abandon":
        store.abandon(staged.id)
    elif way == "next save":
        store.abandon(store.stage(prompt(2, 16), engine.namespace, owner="another").id)
        assert store.stats()["staged"] == 1
        store.abandon(store.stage(prompt(2, 16), engine.namespace, owner="client").id)
    elif way == "death":
        store.reap({"another"})
        assert store.stats()["staged"] == 1
        store.reap({"client"})
    else:
        with pytest.raises(PlanError, match="fewer rows"):
            store.commit(staged.id, Buffer(bytes(40 * ROW - 1)))
    assert store.stats()["staged"] == 0
    if way != "commit":
        assert held(store) == (0, 0)
        assert store.stats()["tiers"]["host"]["bytes"] == 0
        with pytest.raises(LeaseError):
            store.commit(staged.id, Buffer(bytes(40 * ROW)))
        assert engine.save(prompt(1, 40)), "the prompt is free again"


def test_saves_of_the_dead_do_not_keep_others_from_saving(driver: Open) -> None:
    engine = driver()
    engine.store.stage(prompt(1, 40), engine.namespace, owner="client")
    assert engine.stage(prompt(1, 40)).known
    engine.store.reap({"client"})
    assert engine.save(prompt(1, 40))


# --- while it lasts -----------------------------------------------------------------------------


def test_leased_rows_outlive_eviction_and_pressure(driver: Open) -> None:
    engine = driver(host_bytes=14 * SLOT)
    engine.save(prompt(0, 40))
    plan = engine.plan(prompt(0, 40))
    engine.store.evict(nodes=1)
    for seed in range(1, 12):
        engine.save(prompt(seed, 40))
        engine.store.flush()
        engine.check(prompt(0, 40), plan)
    assert set(engine.store.tree.blocks()).isdisjoint(ref.name for ref in plan.blocks)
    engine.finish(plan)
    engine.store.flush()
    names = engine.store.blocks.names()
    assert not names & {ref.name for ref in plan.blocks}, "nobody needs them any more"
    with pytest.raises(LeaseError):
        engine.store.rows_of(plan, 0)


def test_a_second_lease_keeps_what_the_first_lets_go(driver: Open) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    first, second = engine.plan(prompt(1, 40)), engine.plan(prompt(1, 40))
    engine.store.clear()
    engine.finish(first)
    engine.store.flush()
    engine.check(prompt(1, 40), second)
    engine.finish(second)
    engine.store.flush()
    assert engine.store.blocks.names() == set()


class HeldTier(WrapperTier):
    """Hands out blocks when the gate opens; `read`: they were read long before."""

    def __init__(self, inner: Tier, *, read: bool) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.begun = self.ended = 0
        self._read = read

    async def get(self, name: str) -> Block:
        self.begun += 1
        try:
            block = await self.inner.get(name) if self._read else None
            while not self.gate.is_set():
                await asyncio.sleep(1e-3)
            return block or await self.inner.get(name)
        finally:
            self.ended += 1


@pytest.mark.parametrize("read", [False, True])
def test_a_lease_that_got_no_rows_still_lets_deleted_blocks_go(driver: Open, read: bool) -> None:
    """The nodes go while a slow promotion holds their blocks; nothing is left behind."""
    driver().save(prompt(1, 40))
    engine = driver()
    store = engine.store
    level = store.blocks.levels.named("disk")
    level.tier = held_back = HeldTier(level.tier, read=read)
    plans: list[Any] = []
    planning = threading.Thread(
        target=lambda: plans.append(engine.plan(prompt(1, 40), deadline_ms=100.0))
    )
    planning.start()
    until(lambda: held_back.begun or plans, 60)
    store.evict(nodes=1)
    store.flush()
    planning.join(60)
    assert plans[0].declined == "not_resident"
    store.flush()
    assert level.tier.names() == []
    held_back.gate.set()  # the promotion that was late ends as well
    until(lambda: held_back.ended == held_back.begun, 60)
    store.flush()
    until(lambda: store.blocks.names() == set(), 60)


def test_a_lease_is_not_shorter_than_the_wait_for_its_rows(driver: Open) -> None:
    driver().save(prompt(1, 40))
    engine = driver(lease_seconds=0.05)
    level = engine.store.blocks.levels.named("disk")
    level.tier = SlowTier(level.tier, get=0.2)
    done = threading.Event()

    def reap_all_the_time() -> None:
        while not done.wait(0.01):
            engine.store.reap()

    reaper = threading.Thread(target=reap_all_the_time)
    reaper.start()
    try:
        plan = engine.store.plan(prompt(1, 40), engine.namespace, deadline_ms=20_000.0)
    finally:
        done.set()
        reaper.join(60)
    assert plan.exact == 39
    assert held(engine.store)[0] == 1
    engine.check(prompt(1, 40), plan)
    engine.finish(plan)


# --- a slot belongs to one save -----------------------------------------------------------------


def test_a_slot_given_back_by_a_commit_is_not_taken_from_the_next(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver(host_bytes=9 * SLOT)
    store = engine.store
    shared = prompt(1, 16)
    engine.save(shared + prompt(2, 24))
    store.flush()
    first = engine.stage(shared + prompt(3, 8))  # its first two blocks are here already
    seal, reserved = store.blocks.pool.seal, list[Reserved]()

    def seal_and_reserve(slot: Reserved, name: str, block: Block) -> None:
        seal(slot, name, block)
        if store.blocks.host.ref(name).offset != slot.offset:  # type: ignore[union-attr]
            reserved.append(store.blocks.pool.reserve(8 * ROW))

    with monkeypatch.context() as patch:
        patch.setattr(store.blocks.pool, "seal", seal_and_reserve)
        assert engine.commit(first)
    assert len(reserved) == 2
    assert set(reserved) <= store.blocks.pool.filling(), "they were taken away again"


def test_whoever_has_sealed_a_slot_cannot_take_the_next_one_in_its_place(driver: Open) -> None:
    """A merge, an import or a save lets go of its slots at its end, whatever became of them. Two
    writers in one slot would put rows of one block under the name of another."""
    engine = driver()
    engine.save(prompt(1, 16))
    pool, name = engine.store.blocks.pool, next(iter(engine.store.blocks.host.names()))
    block = engine.store.blocks.read(name)
    first = pool.reserve(len(block.data))
    pool.seal(first, name, block)  # the block is here: its slot is free again
    following = pool.reserve(len(block.data))
    pool.reserved(following)[:] = block.data
    pool.cancel(first)
    assert pool.filling() == {following}
    assert bytes(pool.reserved(following)) == bytes(block.data)
    with pytest.raises(LeaseError):
        pool.seal(first, name, block)
    pool.cancel(following)


def test_what_a_client_writes_late_changes_no_row(driver: Open) -> None:
    """The store hashes and keeps its own copy, however long the client goes on writing."""
    engine = driver()
    tokens = prompt(1, 40)
    staged = engine.store.stage(tokens, engine.namespace, owner="slow")
    rows = rows_for(tokens, engine.namespace.layout)
    engine.book.write(tokens, rows, range(40), 40)
    outbox = packed(pick(rows, range(40)), staged.sizes, engine.namespace.layout)
    assert engine.store.commit(staged.id, Buffer(outbox))
    outbox[:] = bytes(len(outbox))
    assert engine.serve(tokens).exact == 39


def test_rows_that_change_while_they_are_copied_have_the_name_of_the_copy(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 8)

    class Changing:
        def read_into(self, offset: int, target: memoryview) -> None:
            target[:] = bytes([7]) * len(target)  # the first read sees these, any other would not
            self.read_into = lambda *_: pytest.fail("read twice")  # type: ignore[method-assign]

    staged = engine.store.stage(tokens, engine.namespace)
    assert engine.store.commit(staged.id, Changing())
    (name,) = engine.store.blocks.host.names()
    assert block_name(engine.store.blocks.host.peek(name)) == name


def test_a_save_without_room_is_refused_and_loses_nothing(driver: Open) -> None:
    engine = driver(host_bytes=10 * SLOT)
    kept = prompt(1, 40)
    engine.save(kept)
    engine.store.flush()
    plan = engine.plan(kept)
    staged = engine.stage(prompt(2, 80))
    with pytest.raises(NoSpaceError):
        engine.commit(staged)
    assert engine.store.stats()["errors"] == {"no_space": 1}
    assert held(engine.store) == (1, 0)
    engine.check(kept, plan)
    engine.finish(plan)
    assert engine.save(prompt(2, 24)), "what fits is stored"


# --- rows come up from below ---------------------------------------------------------------------


class Watched:
    """A slot's rows; `copying` is called when they are written."""

    def __init__(self, rows: memoryview, copying: Callable[[], None]) -> None:
        self._rows, self._copying = rows, copying

    def __setitem__(self, where: slice, data: bytes) -> None:
        self._copying()
        self._rows[where] = data


def copied_below(engine: Driver, monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> None:
    """`what` happens in another thread, with the lock free, whenever rows are copied up."""
    arena, lock = engine.store.blocks.host.arena, engine.store.nodes.lock
    rows, pool = arena.rows, ThreadPoolExecutor(1)

    def with_lock() -> None:
        assert lock.acquire(timeout=60), "the copy is made under the lock"
        try:
            what()
        finally:
            lock.release()

    def watched(offset: int, nbytes: int) -> Any:
        return Watched(rows(offset, nbytes), lambda: pool.submit(with_lock).result(120))

    monkeypatch.setattr(arena, "rows", watched)


def only_on_disk(engine: Driver, tokens: list[int]) -> None:
    engine.save(tokens)
    engine.store.flush()
    drop_from_host(engine.store)


def test_rows_are_copied_up_without_the_lock(driver: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, copies = driver(), list[int]()
    only_on_disk(engine, prompt(1, 40))
    with monkeypatch.context() as patch:
        copied_below(engine, patch, lambda: copies.append(1))
        plan = engine.store.plan(prompt(1, 40), engine.namespace)
    assert len(copies) == 5
    engine.check(prompt(1, 40), plan)
    engine.finish(plan)
    assert engine.store.stats()["reserved"] == 0


def test_rows_that_nobody_wants_once_they_are_copied_are_given_back(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver()
    store = engine.store
    only_on_disk(engine, prompt(1, 8))

    def leave() -> None:
        for lease in store.blocks.leases.of_owner(""):
            store.finish(lease.id, Outcome())
        store.evict(nodes=1)

    with monkeypatch.context() as patch:
        copied_below(engine, patch, leave)
        assert store.plan(prompt(1, 8), engine.namespace).declined == "not_resident"
    store.flush()
    assert store.blocks.host.names() == []
    assert held(store) == (0, 0)


# --- under many threads -------------------------------------------------------------------------


@pytest.mark.parametrize("disk", [True, False])
def test_threads(driver: Open, disk: bool) -> None:
    """Several engines plan, load, save, evict and reap at once; every row they load is right."""
    engine = driver(host_bytes=60 * SLOT, disk=disk, disk_bytes=300_000, lease_seconds=30.0)
    store = engine.store
    shared = prompt(0, 48)
    errors: list[BaseException] = []
    stop = time.monotonic() + 2.0

    def serve(number: int) -> None:
        mine = Driver(store, engine.namespace, engine.book)
        step = 0
        try:
            while time.monotonic() < stop:
                step += 1
                tokens = shared[: 8 * (step % 6)] + prompt(step % 9, 40)
                if step % 3 == 0:
                    tokens[20:21] = [number, step % 5]
                _serve_one(mine, tokens, keep=step % 7 == 0)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    def disturb() -> None:
        try:
            while time.monotonic() < stop:
                store.reap({"dies"})
                store.evict(nodes=1)
                time.sleep(0.02)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(at,)) for at in range(3)]
    threads.append(threading.Thread(target=disturb))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    store.reap({"dies"})
    store.flush()
    assert held(store) == (0, 0)
    stats = store.stats()
    hits = stats["hits_exact"] + stats["hits_continued"] + stats["hits_edited"]
    assert stats["lookups"] == hits + stats["misses"] > 50
    assert hits > 10
    assert set(stats["errors"]) <= {"missing", "no_space"}
    wanted = store.tree.blocks()
    assert set(store.blocks.host.names()) <= wanted
    level = store.blocks.levels.named("disk")
    if level is not None:
        assert set(level.tier.names()) == wanted
        again = driver(host_bytes=60 * SLOT, disk_bytes=300_000)
        assert again.store.tree.blocks() == wanted


def _serve_one(engine: Driver, tokens: list[int], *, keep: bool) -> None:
    """One request; `keep`: its client dies without a word."""
    store, owner = engine.store, "dies" if keep else "lives"
    plan = store.plan(tokens, engine.namespace, owner=owner)
    if not plan.declined:
        try:
            rows = gather(
                plan,
                engine.namespace.layout,
                lambda ref: store.rows_of(plan, plan.blocks.index(ref)),
            )
            for at in range(len(plan.blocks)):
                store.rows_of(plan, at)  # still here after the copy
        except LeaseError:
            assert keep, "rows left under a living lease"
            return
        engine.served(tokens, plan, rows)
        if keep:
            return
        engine.finish(plan)
    with contextlib.suppress(NoSpaceError):  # memory full of rows in use: nothing is saved
        engine.save(tokens, None if plan.declined else plan)
