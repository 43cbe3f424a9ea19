"""Behaviour added around a tier: a wrapper is a tier too and passes the same contract tests."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from time import perf_counter
from typing import TypeVar

from kvshare_store.blocks.tiers.base import Tier, TierProperties, TierUse
from kvshare_store.blocks.tiers.breaker import Breaker
from kvshare_store.errors import DeadlineError, KVShareError, NoSpaceError
from kvshare_store.tensors.frame import Block

T = TypeVar("T")


class WrapperTier(Tier):
    """Passes every call on; subclasses change what they are about."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name

    @property
    def properties(self) -> TierProperties:  # type: ignore[override]
        """Those of the tier inside."""
        return self.inner.properties

    async def put(self, name: str, block: Block) -> None:
        await self.inner.put(name, block)

    async def get(self, name: str) -> Block:
        return await self.inner.get(name)

    async def delete(self, name: str) -> bool:
        return await self.inner.delete(name)

    def size(self, name: str) -> int | None:
        return self.inner.size(name)

    def has(self, name: str) -> bool:
        return self.inner.has(name)

    def names(self) -> list[str]:
        return self.inner.names()

    def touch(self, name: str) -> None:
        self.inner.touch(name)

    def use(self) -> TierUse:
        return self.inner.use()

    def counted(self) -> TierUse:
        return self.inner.counted()

    def trouble(self) -> dict[str, int | str]:
        return self.inner.trouble()

    async def purge(self, namespace: str, names: Sequence[str], keep: Collection[str] = ()) -> None:
        await self.inner.purge(namespace, names, keep)

    async def close(self) -> None:
        await self.inner.close()


class RetryTier(WrapperTier):
    """Tries again what may succeed later, after a random pause that may double each time.

    A full tier is not asked again: room must be made first.
    """

    def __init__(
        self, inner: Tier, attempts: int = 3, pause_s: float = 0.02, longest_pause_s: float = 1.0
    ) -> None:
        super().__init__(inner)
        self.retries = 0
        """Attempts after a first one."""
        self._attempts = attempts
        self._pause_s = pause_s
        self._longest_pause_s = longest_pause_s

    async def put(self, name: str, block: Block) -> None:
        await self._retried(lambda: self.inner.put(name, block))

    async def get(self, name: str) -> Block:
        return await self._retried(lambda: self.inner.get(name))

    async def delete(self, name: str) -> bool:
        return await self._retried(lambda: self.inner.delete(name))

    def trouble(self) -> dict[str, int | str]:
        return {**self.inner.trouble(), "retries": self.retries}

    async def _retried(self, call: Callable[[], Awaitable[T]]) -> T:
        for retry in range(self._attempts - 1):
            try:
                return await call()
            except NoSpaceError:
                raise
            except KVShareError as error:
                if not error.retryable:
                    raise
            self.retries += 1
            longest = min(self._pause_s * 2**retry, self._longest_pause_s)
            await asyncio.sleep(random.uniform(0, longest))
        return await call()


class DeadlineTier(WrapperTier):
    """Gives a call up when its time is over: `DeadlineError`. Seconds."""

    def __init__(self, inner: Tier, read_s: float, write_s: float) -> None:
        super().__init__(inner)
        self._read_s = read_s
        self._write_s = write_s

    async def put(self, name: str, block: Block) -> None:
        await self._limited(self.inner.put(name, block), self._write_s)

    async def get(self, name: str) -> Block:
        return await self._limited(self.inner.get(name), self._read_s)

    async def delete(self, name: str) -> bool:
        return await self._limited(self.inner.delete(name), self._write_s)

    async def _limited(self, call: Awaitable[T], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds) as limit:
                return await call
        except TimeoutError as error:
            if not limit.expired():  # the tier's own, with more to say
                raise
            text = f"{self.name} tier: no answer within {seconds * 1e3:.0f} ms"
            raise DeadlineError(text) from error


class BreakerTier(WrapperTier):
    """Refuses calls at once while the tier inside is known not to answer."""

    def __init__(self, inner: Tier, breaker: Breaker | None = None) -> None:
        super().__init__(inner)
        self.breaker = breaker or Breaker()

    async def put(self, name: str, block: Block) -> None:
        with self.breaker.call(f"{self.name} tier"):
            await self.inner.put(name, block)

    async def get(self, name: str) -> Block:
        with self.breaker.call(f"{self.name} tier"):
            return await self.inner.get(name)

    async def delete(self, name: str) -> bool:
        with self.breaker.call(f"{self.name} tier"):
            return await self.inner.delete(name)

    def trouble(self) -> dict[str, int | str]:
        said: dict[str, int | str] = {
            "breaker": self.breaker.state,
            "refused": self.breaker.refused,
        }
        return self.inner.trouble() | said


class HedgedTier(WrapperTier):
    """Asks a second time when a read takes longer than 95 % of those before it.

    The first verified block wins and the other read is cancelled. At most a tenth of the reads are
    hedged: a server that is slow because it has too much to do is not given twice as much.
    """

    _SHARE = 0.1
    _MOST_CREDIT = 5.0
    _LEAST_SEEN = 20
    _LEAST_S = 0.002
    """A second read that saves less than this is not worth its work."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.hedges = 0
        """Second reads that were begun."""
        self._seconds: deque[float] = deque(maxlen=256)
        self._credit = 0.0

    async def get(self, name: str) -> Block:
        begun = perf_counter()
        self._credit = min(self._credit + self._SHARE, self._MOST_CREDIT)
        calls = [self._begin(name)]
        try:
            if len(self._seconds) >= self._LEAST_SEEN:
                await asyncio.wait(calls, timeout=self._patience())
                if not calls[0].done() and self._credit >= 1:
                    self._credit -= 1
                    self.hedges += 1
                    calls.append(self._begin(name))
            block = await _first(calls)
        finally:
            for call in calls:
                call.cancel()
        self._seconds.append(perf_counter() - begun)
        return block

    def trouble(self) -> dict[str, int | str]:
        return {**self.inner.trouble(), "hedges": self.hedges}

    def _begin(self, name: str) -> asyncio.Task[Block]:
        call = asyncio.ensure_future(self.inner.get(name))
        call.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at
        return call

    def _patience(self) -> float:
        usual = sorted(self._seconds)[int(0.95 * len(self._seconds))]
        return max(usual, self._LEAST_S)


async def _first(calls: Sequence[asyncio.Task[Block]]) -> Block:
    """The first block; the first error when there is none."""
    waiting, failed = set(calls), []
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for call in done:
            if call.exception() is None:
                return call.result()
            failed.append(call)
    return failed[0].result()


def resilient(tier: Tier, deadline_ms: float, *, attempts: int = 3) -> BreakerTier:
    """A tier that others keep, made fit to be asked while a request waits.

    From the outside: the breaker sees whole calls, however often they were tried; the deadline
    holds for all attempts of a read together, and for `attempts` times as long for a write, which
    nobody waits for; each attempt of a read may be hedged.
    """
    seconds = deadline_ms / 1e3
    retried = RetryTier(HedgedTier(tier), attempts)
    return BreakerTier(DeadlineTier(retried, seconds, attempts * seconds))
