"""The interface of a tier. `kvshare_store.testing.tiers.TierTests` has its contract tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec

from kvshare_store.tensors.frame import Block


class TierProperties(NamedTuple):
    """What callers may rely on; they ask, they never test the type."""

    max_concurrency: int
    """Calls worth having in flight at once."""


class TierUse(msgspec.Struct, frozen=True):
    """What a tier holds, counted from what is there. Bytes."""

    bytes: int
    budget: int
    blocks: int
    kept_free: int = 0
    """Of the budget: no block may take it."""

    def missing(self, nbytes: int) -> int:
        """What must go before so many bytes more fit; not positive if they fit as it is."""
        return self.bytes + self.kept_free + nbytes - self.budget if self.budget else 0


class Beside(NamedTuple):
    """Bytes of other files that count in a tier's budget, and what must stay free for them: they
    are written anew from time to time, and the old ones go after that."""

    bytes: int = 0
    kept_free: int = 0


class Tier(ABC):
    """Blocks by name. Every method may be called concurrently from one event loop.

    Errors: `MissingBlockError` (not there), `CorruptBlockError` (there, but other bytes than the
    name says), `NoSpaceError` (the budget is full), `StorageError` (the medium refused).
    """

    name: str
    properties: TierProperties

    @abstractmethod
    async def put(self, name: str, block: Block) -> None:
        """Store a block. Idempotent. The buffer of `block.data` is not kept after the return."""

    @abstractmethod
    async def get(self, name: str) -> Block:
        """The verified block, in a buffer that belongs to the caller."""

    @abstractmethod
    async def delete(self, name: str) -> bool:
        """Remove a block; False if it was not there."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes the block takes here, or None if it is not here. Never waits."""

    def has(self, name: str) -> bool:
        """Whether the block is here."""
        return self.size(name) is not None

    @abstractmethod
    def names(self) -> list[str]:
        """Every block here, the least recently used first."""

    @abstractmethod
    def touch(self, name: str) -> None:
        """Count a use of the block; unknown names are ignored."""

    @abstractmethod
    def use(self) -> TierUse:
        """Bytes, budget and blocks now."""

    def counted(self) -> TierUse:
        """As `use`, without waiting: what is known so far."""
        return self.use()

    def trouble(self) -> dict[str, int | str]:
        """What went wrong so far, counted: blocks `quarantined`, `retries`, `hedges` (second
        reads), calls `refused`; and the state of its `breaker`. Only what the tier has."""
        return {}

    async def purge(self, namespace: str, names: Sequence[str], keep: Collection[str] = ()) -> None:
        """Remove every block of a namespace; `names` are those that are known. Where only copies
        are removed, those of `keep` stay."""
        for name in names:
            await self.delete(name)

    async def close(self) -> None:  # noqa: B027 - most tiers have nothing to let go of
        """Release what the tier holds; blocks of a persistent tier stay."""
