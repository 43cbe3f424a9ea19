"""One named thread with one event loop, in which all tiers wait for their media."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from kvshare_store.observability.threads import Health, Supervised

T = TypeVar("T")
_PATIENCE = 5.0
"""Seconds that running coroutines get to end when the loop closes."""


class IoLoop:
    """Runs coroutines for threads that are not asynchronous themselves."""

    def __init__(self, health: Health | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Supervised("kvshare-io", self._run, health or Health())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; the future may be waited on from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Start a coroutine and wait for it; `TimeoutError` after `timeout` seconds."""
        return self.submit(coroutine).result(timeout)

    def close(self) -> None:
        """Stop once all coroutines have ended or were cancelled for taking too long."""
        if self._loop.is_closed():
            return
        self.run(self._drain())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.alive:
            self._loop.close()

    async def _drain(self) -> None:
        going_on = asyncio.all_tasks() - {asyncio.current_task()}
        if not going_on:
            return
        _, late = await asyncio.wait(going_on, timeout=_PATIENCE)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_PATIENCE)
