"""A remote with a failing network: wraps any remote and makes single calls go wrong.

remote = FaultyRemote(open_remote(url))
remote.arm(REFUSED, at=3)  # the third call from now that it can happen to
...
remote.heal()
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from kvshare_store.blocks.remotes.base import Entry, Part, Remote
from kvshare_store.errors import (
    DeadlineError,
    KVShareError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
    UnavailableError,
)
from tests.support.faults import Faults

CALLS = frozenset({"put", "get", "delete", "list", "delete_prefix"})
Real = Callable[..., Awaitable[Any]]


class NetworkFault(NamedTuple):
    """A fault of a call: `happen(remote, real, *args)` is awaited in its place."""

    name: str
    calls: frozenset[str]
    """Whether it can happen to a call of this name."""
    happen: Callable[..., Awaitable[Any]]


def refusal(name: str, error: KVShareError, *calls: str) -> NetworkFault:
    """The call does nothing and raises an error."""

    async def happen(remote: Remote, real: Real, *args: Any) -> Any:
        raise error

    return NetworkFault(name, frozenset(calls) or CALLS, happen)


async def _lost_answer(remote: Remote, real: Real, *args: Any) -> Any:
    """The call is done, but its answer is lost."""
    await real(*args)
    raise DeadlineError("the answer was lost")


async def _late(remote: Remote, real: Real, *args: Any) -> Any:
    await asyncio.sleep(0.05)
    return await real(*args)


async def _cut_get(remote: Remote, real: Real, key: str) -> Any:
    value = await real(key)
    return value[: len(value) // 2]


async def _empty_get(remote: Remote, real: Real, key: str) -> Any:
    await real(key)
    return b""


async def _flip_get(remote: Remote, real: Real, key: str) -> Any:
    return _flipped(await real(key))


async def _cut_put(remote: Remote, real: Real, key: str, parts: Sequence[Part]) -> None:
    """The engine keeps half of the bytes and reports all of them."""
    whole = b"".join(parts)
    await real(key, (whole[: len(whole) // 2],))


async def _flip_put(remote: Remote, real: Real, key: str, parts: Sequence[Part]) -> None:
    await real(key, (_flipped(b"".join(parts)),))


async def _other_value(remote: Remote, real: Real, key: str) -> Any:
    """The engine confuses two keys."""
    value = await real(key)
    async for entry in remote.list("blocks/"):
        if entry.key != key:
            return await real(entry.key)
    return value


def _flipped(value: Any) -> bytes:
    changed = bytearray(value)
    changed[len(changed) // 2] ^= 0x10
    return bytes(changed)


_GET, _PUT = frozenset({"get"}), frozenset({"put"})
REFUSED = refusal("refused", UnavailableError("connection refused"))
REFUSALS = (
    REFUSED,
    refusal("timed out", DeadlineError("no answer in time")),
    refusal("an error", StorageError("internal server error")),
    refusal("full", NoSpaceError("out of memory"), "put"),
    refusal("evicted", MissingBlockError("no such key"), "get"),
)
"""Faults that raise an error."""
WRONG_ANSWERS = (
    NetworkFault("answer lost", frozenset({"put", "delete"}), _lost_answer),
    NetworkFault("late", CALLS - {"list"}, _late),
    NetworkFault("cut short in reading", _GET, _cut_get),
    NetworkFault("nothing in reading", _GET, _empty_get),
    NetworkFault("bit flipped in reading", _GET, _flip_get),
    NetworkFault("cut short in writing", _PUT, _cut_put),
    NetworkFault("bit flipped in writing", _PUT, _flip_put),
    NetworkFault("another block's bytes", _GET, _other_value),
)
"""Faults without an error, or with an error although the call was done."""


class FaultyRemote(Faults[NetworkFault], Remote):
    """Wraps a remote."""

    def __init__(self, inner: Remote) -> None:
        super().__init__()
        self.inner = inner
        self.name = inner.name
        self.properties = inner.properties

    async def _call(self, name: str, real: Real, *args: Any) -> Any:
        fault = self.due(name)
        return await (real(*args) if fault is None else fault.happen(self.inner, real, *args))

    async def put(self, key: str, parts: Sequence[Part]) -> None:
        await self._call("put", self.inner.put, key, parts)

    async def get(self, key: str) -> bytes | memoryview:
        value: bytes | memoryview = await self._call("get", self.inner.get, key)
        return value

    async def delete(self, key: str) -> None:
        await self._call("delete", self.inner.delete, key)

    async def list(self, prefix: str) -> AsyncIterator[Entry]:
        fault = self.due("list")
        if fault is not None:
            await fault.happen(self.inner, self.inner.get, prefix)
        async for entry in self.inner.list(prefix):
            yield entry

    async def delete_prefix(self, prefix: str) -> int:
        count: int = await self._call("delete_prefix", self.inner.delete_prefix, prefix)
        return count

    async def close(self) -> None:
        await self.inner.close()
