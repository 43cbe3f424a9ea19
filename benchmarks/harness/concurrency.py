"""Many asynchronous calls, so many at a time, and how long they take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter, process_time
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds by the clock and of this process's CPU time."""

    wall: float
    cpu: float


async def spent(calls: Sequence[Callable[[], Awaitable[object]]], at_once: int) -> Spent:
    """Make all calls, at most `at_once` at a time."""
    slots = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Awaitable[object]]) -> None:
        async with slots:
            await call()

    start, cpu = perf_counter(), process_time()
    await asyncio.gather(*(one(call) for call in calls))
    return Spent(perf_counter() - start, process_time() - cpu)
