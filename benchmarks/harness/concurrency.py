"""Run asynchronous calls with a limit on concurrency, and time them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter, process_time
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds of wall time and of this process's CPU time."""

    wall: float
    cpu: float


async def spent(calls: Sequence[Callable[[], Awaitable[object]]], at_once: int) -> Spent:
    """Await all calls, at most `at_once` at a time; how long that took."""
    slots = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Awaitable[object]]) -> None:
        async with slots:
            await call()

    start, cpu = perf_counter(), process_time()
    await asyncio.gather(*(one(call) for call in calls))
    return Spent(perf_counter() - start, process_time() - cpu)
