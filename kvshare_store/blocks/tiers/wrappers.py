"""Behaviour added around a tier: a wrapper is a tier too and obeys the same law."""

from __future__ import annotations

from collections import Counter

from kvshare_store.blocks.tiers.base import Tier, TierProperties, TierUse
from kvshare_store.errors import KVShareError
from kvshare_store.tensors.frame import Block


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

    def names(self) -> list[str]:
        return self.inner.names()

    def touch(self, name: str) -> None:
        self.inner.touch(name)

    def use(self) -> TierUse:
        return self.inner.use()

    async def close(self) -> None:
        await self.inner.close()


class CountingTier(WrapperTier):
    """Counts calls, bytes of rows and errors by kind."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def put(self, name: str, block: Block) -> None:
        self.calls["put"] += 1
        nbytes = len(block.data)
        try:
            await self.inner.put(name, block)
        except KVShareError as error:
            self.errors[error.kind] += 1
            raise
        self.bytes["put"] += nbytes

    async def get(self, name: str) -> Block:
        self.calls["get"] += 1
        try:
            block = await self.inner.get(name)
        except KVShareError as error:
            self.errors[error.kind] += 1
            raise
        self.bytes["get"] += len(block.data)
        return block
