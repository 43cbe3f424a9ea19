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
    """Passes every call on; subclasses override the calls that they change, or `_around`."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name

    @property
    def properties(self) -> TierProperties:  # type: ignore[override]
        """Those of the tier inside."""
        return self.inner.properties

    async def put(self, name: str, block: Block) -> None:
        await self._around(lambda: self.inner.put(name, block), reads=False)

    async def get(self, name: str) -> Block:
        return await self._around(lambda: self.inner.get(name), reads=True)

    async def delete(self, name: str) -> bool:
        return await self._around(lambda: self.inner.delete(name), reads=False)

    async def _around(self, call: Callable[[], Awaitable[T]], *, reads: bool) -> T:
        """Make a call of the tier inside; `reads`: it waits for a block."""
        return await call()

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
    """Retries calls that may succeed later, after a random pause that may double each time. A full
    tier is not asked again: room must be made first."""

    def __init__(
        self, inner: Tier, attempts: int = 3, pause_s: float = 0.02, longest_pause_s: float = 1.0
    ) -> None:
        super().__init__(inner)
        self.retries = 0
        """Number of retries."""
        self._attempts = attempts
        self._pause_s = pause_s
        self._longest_pause_s = longest_pause_s

    def trouble(self) -> dict[str, int | str]:
        return {**self.inner.trouble(), "retries": self.retries}

    async def _around(self, call: Callable[[], Awaitable[T]], *, reads: bool) -> T:
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
    """Gives up a call after its deadline, in seconds, with `DeadlineError`."""

    def __init__(self, inner: Tier, read_s: float, write_s: float) -> None:
        super().__init__(inner)
        self._read_s = read_s
        self._write_s = write_s

    async def _around(self, call: Callable[[], Awaitable[T]], *, reads: bool) -> T:
        seconds = self._read_s if reads else self._write_s
        try:
            async with asyncio.timeout(seconds) as limit:
                return await call()
        except TimeoutError as error:
            if not limit.expired():  # the tier's own error, with more text
                raise
            text = f"{self.name} tier: no answer within {seconds * 1e3:.0f} ms"
            raise DeadlineError(text) from error


class BreakerTier(WrapperTier):
    """Refuses calls at once while the tier inside is known not to answer."""

    def __init__(self, inner: Tier, breaker: Breaker | None = None) -> None:
        super().__init__(inner)
        self.breaker = breaker or Breaker()

    async def _around(self, call: Callable[[], Awaitable[T]], *, reads: bool) -> T:
        with self.breaker.call(f"{self.name} tier"):
            return await call()

    def trouble(self) -> dict[str, int | str]:
        said: dict[str, int | str] = {
            "breaker": self.breaker.state,
            "refused": self.breaker.refused,
        }
        return self.inner.trouble() | said


class HedgedTier(WrapperTier):
    """Starts a second read if the first takes longer than 95 % of earlier reads. The first verified
    block wins and the other read is cancelled.

    At most a tenth of the reads are hedged, so that a server which is slow from overload does not
    get twice the load.
    """

    _SHARE = 0.1
    _MOST_CREDIT = 5.0
    _LEAST_SEEN = 20
    _LEAST_S = 0.002
    """A second read that saves less than this is not worth its cost."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.hedges = 0
        """Number of second reads so far."""
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
    """The first block that arrives; the first error if none does."""
    waiting, failed = set(calls), []
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for call in done:
            if call.exception() is None:
                return call.result()
            failed.append(call)
    return failed[0].result()


def resilient(tier: Tier, deadline_ms: float, *, attempts: int = 3) -> BreakerTier:
    """Wraps a tier on other machines, so that it can be asked while a request waits.

    From the outside inwards: the breaker sees whole calls, including their retries; the deadline
    holds for all attempts of a read together, and for `attempts` times as long for a write, which
    no request waits for; each attempt of a read may be hedged.
    """
    seconds = deadline_ms / 1e3
    retried = RetryTier(HedgedTier(tier), attempts)
    return BreakerTier(DeadlineTier(retried, seconds, attempts * seconds))
