"""Wrappers that make any tier fail, slow or wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from threading import Event
from typing import Literal

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.wrappers import WrapperTier
from kvshare_store.tensors.frame import Block

Call = Literal["put", "get", "delete"]


class FaultyTier(WrapperTier):
    """Raises the given error before the call reaches the tier inside. Without `fail` it changes
    nothing. Not thread-safe while calls are in flight."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        """Number of calls so far, including failed ones."""
        self._faults: dict[Call, list[BaseException | None]] = {"put": [], "get": [], "delete": []}
        self._always: dict[Call, BaseException] = {}

    def fail(self, call: Call, error: BaseException, *, skip: int = 0, times: int = 1) -> None:
        """The next `times` calls raise `error`, after `skip` more that do not."""
        self._faults[call] += [None] * skip + [error] * times

    def fail_always(self, call: Call, error: BaseException | None) -> None:
        """Every call raises `error` from now on; None heals it."""
        if error is None:
            self._always.pop(call, None)
        else:
            self._always[call] = error

    def _enter(self, call: Call) -> None:
        self.calls[call] += 1
        planned = self._faults[call].pop(0) if self._faults[call] else None
        error = planned or self._always.get(call)
        if error is not None:
            raise error

    async def put(self, name: str, block: Block) -> None:
        self._enter("put")
        await self.inner.put(name, block)

    async def get(self, name: str) -> Block:
        self._enter("get")
        return await self.inner.get(name)

    async def delete(self, name: str) -> bool:
        self._enter("delete")
        return await self.inner.delete(name)


class SlowTier(WrapperTier):
    """Waits before every call that uses the medium. The seconds can be changed at any time."""

    def __init__(self, inner: Tier, *, put: float = 0.0, get: float = 0.0, delete: float = 0.0):
        super().__init__(inner)
        self.seconds: dict[Call, float] = {"put": put, "get": get, "delete": delete}

    async def put(self, name: str, block: Block) -> None:
        await asyncio.sleep(self.seconds["put"])
        await self.inner.put(name, block)

    async def get(self, name: str) -> Block:
        await asyncio.sleep(self.seconds["get"])
        return await self.inner.get(name)

    async def delete(self, name: str) -> bool:
        await asyncio.sleep(self.seconds["delete"])
        return await self.inner.delete(name)


class GatedTier(WrapperTier):
    """Calls of the given kinds wait until the gate opens."""

    def __init__(self, inner: Tier, gate: Event, *calls: Call) -> None:
        super().__init__(inner)
        self.gate = gate
        self._calls = frozenset(calls)

    async def _enter(self, call: Call) -> None:
        while call in self._calls and not self.gate.is_set():
            await asyncio.sleep(1e-3)

    async def put(self, name: str, block: Block) -> None:
        await self._enter("put")
        await self.inner.put(name, block)

    async def get(self, name: str) -> Block:
        await self._enter("get")
        return await self.inner.get(name)

    async def delete(self, name: str) -> bool:
        await self._enter("delete")
        return await self.inner.delete(name)
