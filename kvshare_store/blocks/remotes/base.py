"""The interface of a remote: bytes under keys, kept by an engine that others wrote.

`kvshare_store.testing.remotes.RemoteTests` has its contract tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from kvshare_store.errors import MissingBlockError

Part = Any
"""A bytes-like object."""


class Entry(NamedTuple):
    """One value that is stored."""

    key: str
    nbytes: int


class RemoteProperties(NamedTuple):
    """What callers may rely on; they ask, they never test the type."""

    listing: bool
    """`list` works; without it a process knows of other machines' values by being told."""
    max_concurrency: int
    """Calls worth having in flight at once."""


class Remote(ABC):
    """Whole values by key. Every method may be called concurrently from one event loop.

    Keys are `/`-separated and hold only characters that need no quoting anywhere. Nothing is
    asked of the engine but that a value appears whole or not at all: values are immutable and
    verified by whoever reads them, so neither conditional writes nor an order of writes is needed.

    Errors: `MissingBlockError` (no such key), `UnavailableError` (nobody answers), `DeadlineError`
    (no answer in time), `NoSpaceError` (full, or the value is larger than the engine takes),
    `StorageError` (the engine answered with an error). A remote does not retry and does not verify.
    """

    name: str
    """Of the engine, for messages: never holds a credential."""
    properties: RemoteProperties
    keeps_versions = False
    """Whether the engine was seen to keep what is deleted or overwritten, as a bucket with
    versioning does: then no purge is complete."""

    @abstractmethod
    async def put(self, key: str, parts: Sequence[Part]) -> None:
        """Store the parts, one after the other, as one value. Idempotent.

        The parts' buffers are not looked at after the return, nor after a cancellation.
        """

    @abstractmethod
    async def get(self, key: str) -> bytes | memoryview:
        """The whole value, in a buffer that belongs to the caller."""

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Remove a value; one that is not there is fine."""

    async def create(self, key: str, value: bytes) -> bool:
        """Store a value unless the key has one; False if it has.

        Here without a promise for two who do it at the same moment; engines that can give one do.
        """
        try:
            await self.get(key)
        except MissingBlockError:
            await self.put(key, (value,))
            return True
        return False

    @abstractmethod
    def list(self, prefix: str) -> AsyncIterator[Entry]:
        """Every value whose key begins with `prefix`, which ends with `/` or is empty.

        `UnsupportedError` when the engine cannot list. Values that come and go meanwhile may be in
        it or not.
        """

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every value whose key begins with `prefix`; how many there were."""
        keys = [entry.key async for entry in self.list(prefix)]
        for key in keys:
            await self.delete(key)
        return len(keys)

    async def close(self) -> None:  # noqa: B027 - some have nothing to let go of
        """Let go of connections; values stay."""
