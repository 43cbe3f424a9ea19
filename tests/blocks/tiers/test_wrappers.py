"""Wrappers around a tier that fails, hangs, or is sometimes slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.breaker import Breaker
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.blocks.tiers.wrappers import (
    BreakerTier,
    DeadlineTier,
    HedgedTier,
    RetryTier,
    WrapperTier,
    resilient,
)
from kvshare_store.errors import (
    CorruptBlockError,
    DeadlineError,
    KVShareError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
    UnavailableError,
)
from kvshare_store.tensors.frame import Block
from kvshare_store.testing.tiers import TierTests, make_block, same
from tests.support.faulty import FaultyTier, SlowTier

FOREVER = 3600.0
NAME, BLOCK = make_block(1)
ABSENT = make_block(99)[0]


def run(folder: Path, scenario: Callable[[Tier], Awaitable[None]]) -> None:
    """A scenario over a disk tier that holds one block."""

    async def conduct() -> None:
        tier = await DiskTier.open(folder, 1 << 20)
        await tier.put(NAME, BLOCK)
        try:
            await scenario(tier)
        finally:
            await tier.close()

    asyncio.run(conduct())


class Clock:
    """A clock that stands still unless told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedTier(WrapperTier):
    """Each get waits as long as the next entry says, then answers or raises. An event is waited
    for."""

    def __init__(self, inner: Tier, *script: float | asyncio.Event | KVShareError) -> None:
        super().__init__(inner)
        self.script = list(script)
        self.begun = self.cancelled = 0

    async def get(self, name: str) -> Block:
        self.begun += 1
        step = self.script.pop(0) if self.script else 0.0
        try:
            if isinstance(step, asyncio.Event):
                await step.wait()
            else:
                await asyncio.sleep(step if isinstance(step, float) else 0.001)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(step, KVShareError):
            raise step
        return await self.inner.get(name)


# --- retries --------------------------------------------------------------------------------------


def test_what_may_succeed_later_is_tried_again(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        faulty = FaultyTier(disk)
        tier = RetryTier(faulty, attempts=3, pause_s=0)
        for error in (StorageError("x"), UnavailableError("x"), DeadlineError("x")):
            faulty.fail("get", error, times=2)
            assert same(await tier.get(NAME), BLOCK)
        faulty.fail("delete", StorageError("x"))
        assert await tier.delete(NAME) is True
        faulty.fail("put", StorageError("x"))
        await tier.put(NAME, BLOCK)
        assert tier.retries == 8

    run(tmp_path, scenario)


def test_it_is_not_tried_for_ever(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        faulty = FaultyTier(disk)
        faulty.fail_always("get", StorageError("x"))
        with pytest.raises(StorageError):
            await RetryTier(faulty, attempts=3, pause_s=0).get(NAME)
        assert faulty.calls["get"] == 3

    run(tmp_path, scenario)


@pytest.mark.parametrize("error", [MissingBlockError, CorruptBlockError, NoSpaceError])
def test_answers_are_not_asked_for_again(tmp_path: Path, error: type[KVShareError]) -> None:
    async def scenario(disk: Tier) -> None:
        faulty = FaultyTier(disk)
        faulty.fail_always("get", error("x"))
        with pytest.raises(error):
            await RetryTier(faulty, pause_s=0).get(NAME)
        assert faulty.calls["get"] == 1

    run(tmp_path, scenario)


def test_pauses_are_random_and_may_grow_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0
        limits.append(high)
        return 0.0

    monkeypatch.setattr("random.uniform", uniform)

    async def scenario(disk: Tier) -> None:
        faulty = FaultyTier(disk)
        faulty.fail_always("get", StorageError("x"))
        with pytest.raises(StorageError):
            await RetryTier(faulty, attempts=6, pause_s=0.02, longest_pause_s=0.1).get(NAME)

    run(tmp_path, scenario)
    assert limits == [0.02, 0.04, 0.08, 0.1, 0.1]


# --- deadlines ------------------------------------------------------------------------------------


def test_a_hanging_tier_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        slow = SlowTier(disk, put=FOREVER, get=FOREVER, delete=FOREVER)
        tier = DeadlineTier(slow, read_s=0.05, write_s=0.1)
        calls = {0.05: [tier.get(NAME)], 0.1: [tier.put(NAME, BLOCK), tier.delete(NAME)]}
        for seconds, limited in calls.items():
            for call in limited:
                with pytest.raises(DeadlineError, match=f"within {seconds * 1e3:.0f} ms"):
                    await call

    run(tmp_path, scenario)


def test_the_tiers_own_words_about_time_are_kept(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        faulty = FaultyTier(disk)
        faulty.fail("get", DeadlineError("the server said so"))
        with pytest.raises(DeadlineError, match="the server said so"):
            await DeadlineTier(faulty, 10, 10).get(NAME)

    run(tmp_path, scenario)


def test_a_caller_that_gives_up_is_no_deadline(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        call = asyncio.ensure_future(DeadlineTier(SlowTier(disk, get=FOREVER), 10, 10).get(NAME))
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(tmp_path, scenario)


# --- the breaker ----------------------------------------------------------------------------------


async def open_up(tier: BreakerTier, faulty: FaultyTier, times: int = 3) -> None:
    """Let the tier fail until the breaker opens."""
    faulty.fail_always("get", UnavailableError("x"))
    for _ in range(times):
        assert tier.breaker.state == "closed"
        with pytest.raises(UnavailableError):
            await tier.get(NAME)
    assert tier.breaker.state == "open"


def test_it_opens_after_failures_in_a_row_and_closes_by_a_probe(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        clock, faulty = Clock(), FaultyTier(disk)
        tier = BreakerTier(faulty, Breaker(failures=3, pause_s=10, clock=clock))
        await open_up(tier, faulty)
        calls = faulty.calls.copy()
        for refused in (tier.get(NAME), tier.put(NAME, BLOCK), tier.delete(NAME)):
            with pytest.raises(UnavailableError, match="in a row"):
                await refused
        assert faulty.calls == calls, "an open breaker asks nobody"
        clock.now += 13
        assert tier.breaker.state == "half-open"
        faulty.fail_always("get", None)
        assert same(await tier.get(NAME), BLOCK)
        assert tier.breaker.state == "closed"
        await open_up(tier, faulty)

    run(tmp_path, scenario)


def test_a_failed_probe_doubles_the_pause_up_to_a_limit(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        clock, faulty = Clock(), FaultyTier(disk)
        breaker = Breaker(failures=1, pause_s=10, longest_pause_s=40, clock=clock)
        tier = BreakerTier(faulty, breaker)
        await open_up(tier, faulty, times=1)
        for pause in (10, 20, 40, 40):
            clock.now += pause * 0.75
            assert breaker.state == "open"
            clock.now += pause * 0.5
            assert breaker.state == "half-open"
            with pytest.raises(UnavailableError, match="x"):
                await tier.get(NAME)
        clock.now += 50
        faulty.fail_always("get", None)
        await tier.get(NAME)
        await open_up(tier, faulty, times=1)
        clock.now += 12.5
        assert breaker.state == "half-open", "after an answer pauses begin small again"

    run(tmp_path, scenario)


def test_one_probe_at_a_time(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        clock, faulty = Clock(), FaultyTier(disk)
        slow = SlowTier(faulty, get=0)
        tier = BreakerTier(slow, Breaker(clock=clock, pause_s=1))
        await open_up(tier, faulty)
        faulty.fail_always("get", None)
        clock.now += 2
        slow.seconds["get"] = 0.02
        calls = faulty.calls["get"]
        ends = await asyncio.gather(*(tier.get(NAME) for _ in range(5)), return_exceptions=True)
        assert [type(end) for end in ends] == [Block] + 4 * [UnavailableError]
        assert faulty.calls["get"] == calls + 1

    run(tmp_path, scenario)


def test_a_probe_that_is_cancelled_makes_way_for_the_next(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        clock, faulty = Clock(), FaultyTier(disk)
        slow = SlowTier(faulty)
        tier = BreakerTier(slow, Breaker(clock=clock, pause_s=1))
        await open_up(tier, faulty)
        faulty.fail_always("get", None)
        clock.now += 2
        slow.seconds["get"] = FOREVER
        probe = asyncio.ensure_future(tier.get(NAME))
        await asyncio.sleep(0.01)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        assert tier.breaker.state == "half-open"
        slow.seconds["get"] = 0
        assert same(await tier.get(NAME), BLOCK)

    run(tmp_path, scenario)


def test_a_miss_is_an_answer_and_failures_must_be_in_a_row(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        faulty = FaultyTier(disk)
        tier = BreakerTier(faulty, Breaker(failures=3))
        answers = [MissingBlockError("x"), CorruptBlockError("x"), NoSpaceError("x"), None]
        for answer in answers * 3:
            faulty.fail("get", StorageError("x"), times=2)
            for _ in range(2):
                with pytest.raises(StorageError):
                    await tier.get(NAME)
            if answer is not None:
                faulty.fail("get", answer)
            await asyncio.gather(tier.get(NAME), return_exceptions=True)
            assert tier.breaker.state == "closed"

    run(tmp_path, scenario)


def test_what_began_earlier_neither_opens_nor_closes_it(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        clock, go_on = Clock(), asyncio.Event()
        scripted = ScriptedTier(disk, go_on, StorageError("x"), StorageError("x"))
        tier = BreakerTier(scripted, Breaker(failures=2, pause_s=10, clock=clock))
        early = asyncio.ensure_future(tier.get(NAME))
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(StorageError):
                await tier.get(NAME)
        go_on.set()
        assert same(await early, BLOCK)
        assert tier.breaker.state == "open"

    run(tmp_path, scenario)


# --- hedged reads ---------------------------------------------------------------------------------


async def warmed_up(tier: HedgedTier, reads: int = 60) -> None:
    """Read often enough that the usual latency is known and a hedged read is allowed."""
    for _ in range(reads):
        await tier.get(NAME)


class AtHand(WrapperTier):
    """Has the block at once, however busy the machine is."""

    async def get(self, name: str) -> Block:
        return BLOCK


async def until_begun(scripted: ScriptedTier, reads: int) -> None:
    """Let others work until so many reads have begun."""
    async with asyncio.timeout(60):
        while scripted.begun < reads:
            await asyncio.sleep(0.001)


async def hedged(disk: Tier) -> tuple[ScriptedTier, HedgedTier]:
    """A scripted tier, and a wrapper around it that knows the usual latency."""
    scripted = ScriptedTier(AtHand(disk))
    tier = HedgedTier(scripted)
    await warmed_up(tier)
    return scripted, tier


def test_a_slow_read_is_asked_for_again_and_the_loser_cancelled(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        scripted, tier = await hedged(disk)
        before = scripted.begun
        scripted.script = [FOREVER]
        assert same(await asyncio.wait_for(tier.get(NAME), 60), BLOCK)
        await asyncio.sleep(0)
        assert (scripted.begun - before, scripted.cancelled) == (2, 1)

    run(tmp_path, scenario)


def test_the_first_may_still_win(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        scripted, tier = await hedged(disk)
        hedges, begun, first = tier.hedges, scripted.begun, asyncio.Event()
        scripted.script = [first, FOREVER]
        read = asyncio.ensure_future(tier.get(NAME))
        await until_begun(scripted, begun + 2)
        first.set()
        assert same(await asyncio.wait_for(read, 60), BLOCK)
        await asyncio.sleep(0)
        assert tier.hedges == hedges + 1
        assert scripted.cancelled >= 1

    run(tmp_path, scenario)


@pytest.mark.parametrize("error", [CorruptBlockError("x"), StorageError("x")])
def test_only_a_verified_answer_wins(tmp_path: Path, error: KVShareError) -> None:
    async def scenario(disk: Tier) -> None:
        scripted, tier = await hedged(disk)
        begun, first = scripted.begun, asyncio.Event()
        scripted.script = [first, error]
        read = asyncio.ensure_future(tier.get(NAME))
        await until_begun(scripted, begun + 2)
        await asyncio.sleep(0.01)  # the second fails
        first.set()
        assert same(await read, BLOCK)
        scripted.script = [error, error]
        with pytest.raises(type(error)):
            await tier.get(NAME)

    run(tmp_path, scenario)


def test_nothing_is_hedged_before_it_is_known_what_is_usual(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        tier = HedgedTier(ScriptedTier(disk, *[0.02] * 10))
        await warmed_up(tier, 10)
        assert tier.hedges == 0

    run(tmp_path, scenario)


def test_a_server_that_becomes_slow_is_not_asked_twice_as_often(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        scripted, tier = await hedged(disk)
        hedges = tier.hedges
        scripted.script = [0.03] * 400
        await asyncio.gather(*(tier.get(NAME) for _ in range(100)))
        assert 0 < tier.hedges - hedges <= 15

    run(tmp_path, scenario)


def test_a_caller_that_gives_up_takes_its_reads_along(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        scripted, tier = await hedged(disk)
        scripted.script, cancelled = [FOREVER, FOREVER], scripted.cancelled
        begun, call = scripted.begun, asyncio.ensure_future(tier.get(NAME))
        await until_begun(scripted, begun + 2)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.sleep(0)
        assert scripted.cancelled == cancelled + 2

    run(tmp_path, scenario)


# --- all of them ----------------------------------------------------------------------------------


class TestResilient(TierTests):
    """Inside all wrappers a healthy tier behaves as it does alone."""

    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return resilient(await DiskTier.open(folder, budget), 10_000)


def test_a_hanging_tier_is_soon_refused_and_found_again(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        slow = SlowTier(disk, get=FOREVER)
        asked = FaultyTier(slow)
        tier = resilient(asked, deadline_ms=300)
        now = [0.0]
        tier.breaker = Breaker(failures=2, pause_s=1.0, clock=lambda: now[0])
        for _ in range(2):
            with pytest.raises(DeadlineError):
                await tier.get(NAME)
        tries = asked.calls["get"]
        for _ in range(50):
            with pytest.raises(UnavailableError):
                await tier.get(NAME)
        assert asked.calls["get"] == tries, "refused without asking the tier"
        slow.seconds["get"] = 0
        now[0] = 2.0
        assert same(await tier.get(NAME), BLOCK)
        with pytest.raises(MissingBlockError):
            await tier.get(ABSENT)

    run(tmp_path, scenario)


def test_the_deadline_holds_for_all_attempts_together(tmp_path: Path) -> None:
    async def scenario(disk: Tier) -> None:
        scripted = ScriptedTier(disk, *[StorageError("x")] * 1000)
        tier = resilient(scripted, deadline_ms=300, attempts=1000)
        with pytest.raises(DeadlineError):
            await tier.get(NAME)
        assert scripted.begun > 1

    run(tmp_path, scenario)
