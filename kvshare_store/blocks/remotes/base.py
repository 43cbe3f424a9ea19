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
    """Properties that callers ask for instead of testing the type."""

    listing: bool
    """Whether `list` works. Without it a process learns of other machines' values only by being
    told."""
    max_concurrency: int
    """The number of concurrent calls that is worthwhile."""


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
    """A name of the engine for messages, without credentials."""
    properties: RemoteProperties
    keeps_versions = False
    """Whether the engine is known to keep deleted and overwritten values, as a bucket with
    versioning does. Then no purge is complete."""

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
        """Store a value unless the key has one already; False if it has. This default is not
        atomic; engines with conditional writes override it."""
        try:
            await self.get(key)
        except MissingBlockError:
            await self.put(key, (value,))
            return True
        return False

    @abstractmethod
    def list(self, prefix: str) -> AsyncIterator[Entry]:
        """Every value whose key begins with `prefix`, which ends with `/` or is empty. Values that
        are added or removed meanwhile may be included or not. `UnsupportedError` if the engine
        cannot list."""

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every value whose key begins with `prefix`; returns how many."""
        keys = [entry.key async for entry in self.list(prefix)]
        for key in keys:
            await self.delete(key)
        return len(keys)

    async def close(self) -> None:  # noqa: B027 - some have nothing to let go of
        """Let go of connections; values stay."""
