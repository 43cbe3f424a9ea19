"""Mooncake Store: memory of several machines behind one master, over TCP (or RDMA).

Its Python binding blocks, so every call runs in a bounded pool of threads. Two calls, `setup` and
`close`, even hold the interpreter's lock; `setup` is therefore tried only once somebody accepts
connections at the master's address.
"""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from kvshare_store.blocks.remotes.base import Entry, Part, Remote, RemoteProperties
from kvshare_store.blocks.remotes.mooncake_settings import (
    MooncakeSettings,
    limit_waiting,
    load_library,
    read_settings,
)
from kvshare_store.blocks.remotes.urls import RemoteURL
from kvshare_store.bounded import pieces
from kvshare_store.errors import (
    DeadlineError,
    KVShareError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
    UnavailableError,
    UnsupportedError,
)

T = TypeVar("T")
_THREADS = 8
_LIST_PAGE = 1000
_ATTEMPTS = 3

_NO_ROOM, _NOT_READY, _NOT_FOUND, _EXISTS = -200, -703, -704, -705
_LEASE_EXPIRED, _TRANSFER_FAILED, _RPC_FAILED, _RPC_TIMEOUT = -707, -800, -900, -901
_KINDS: dict[int, type[KVShareError]] = {
    _NO_ROOM: NoSpaceError,
    _NOT_READY: MissingBlockError,
    _NOT_FOUND: MissingBlockError,
    _LEASE_EXPIRED: DeadlineError,
    _TRANSFER_FAILED: UnavailableError,
    _RPC_FAILED: UnavailableError,
    _RPC_TIMEOUT: DeadlineError,
}


class MooncakeRemote(Remote):
    """Values as objects of one Mooncake Store. Connects at the first call."""

    def __init__(self, settings: MooncakeSettings, timeout_s: float) -> None:
        self.name = f"mooncake://{settings.host}:{settings.port}"
        self.properties = RemoteProperties(listing=bool(settings.admin), max_concurrency=_THREADS)
        self._settings = settings
        self._prefix = settings.prefix
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="kvshare-mooncake")
        self._store: Any = None
        self._connecting: asyncio.Future[None] | None = None

    # --- calls --------------------------------------------------------------------------------

    async def put(self, key: str, parts: Sequence[Part]) -> None:
        # joined: after a cancellation a thread that cannot be stopped may still read it
        await self.create(key, b"".join(parts))

    async def create(self, key: str, value: bytes) -> bool:
        if len(value) > self._settings.buffer_bytes:
            raise NoSpaceError(f"{self.name}: {len(value):,} bytes do not fit buffer_bytes")
        code: int = await self._call(lambda store: store.put(self._prefix + key, value))
        if code == _NOT_FOUND:  # the master gave the write up: it took too long
            raise DeadlineError(f"{self.name} did not take the value in time")
        if code != _EXISTS:
            self._check(code)
        return code != _EXISTS

    async def get(self, key: str) -> bytes:
        return await self._call(lambda store: self._get(store, self._prefix + key))

    def _get(self, store: Any, key: str) -> bytes:
        """Read a value. Its size is asked for first, because `get` returns no bytes for every kind
        of failure. If the value is removed and stored again in between, it is read once more."""
        for _ in range(_ATTEMPTS):
            self._check(store.get_size(key))
            value: bytes = store.get(key)
            if value:
                return value
        self._check(store.get_size(key))  # removed meanwhile
        raise UnavailableError(f"{self.name}: the machine that holds the value does not answer")

    async def delete(self, key: str) -> None:
        # forced: otherwise the store refuses for some seconds after a read
        code = await self._call(lambda store: store.remove(self._prefix + key, force=True))
        if code == _NOT_READY:
            raise StorageError(f"{self.name}: the value is being written")
        if code != _NOT_FOUND:
            self._check(code)

    async def delete_prefix(self, prefix: str) -> int:
        pattern = "^" + re.escape(self._prefix + prefix)
        code = await self._call(lambda store: store.remove_by_regex(pattern, force=True))
        self._check(code)
        return int(code)

    async def list(self, prefix: str) -> AsyncIterator[Entry]:
        if not self._settings.admin:
            raise UnsupportedError(
                f"{self.name} cannot list: add ?admin=HOST:PORT of the master's metrics_port"
            )
        loop = asyncio.get_running_loop()
        keys = await loop.run_in_executor(self._pool, self._keys, self._prefix + prefix)
        for page in pieces(keys, _LIST_PAGE):
            for entry in await self._call(partial(_sizes, keys=page)):
                yield Entry(entry.key.removeprefix(self._prefix), entry.nbytes)

    def _keys(self, prefix: str) -> tuple[str, ...]:
        address = f"http://{self._settings.admin}/get_all_keys"
        try:
            with urllib.request.urlopen(address, timeout=self._timeout_s) as answer:
                found = answer.read().decode().splitlines()
        except TimeoutError as error:
            raise DeadlineError(f"{self.name}: its HTTP server is slow") from error
        except (urllib.error.URLError, OSError) as error:
            raise UnavailableError(f"{self.name}: its HTTP server does not answer") from error
        return tuple(key for key in found if key.startswith(prefix))

    def _check(self, code: int) -> None:
        """Raise the error that a negative return value stands for."""
        if code < 0:
            kind = _KINDS.get(code, StorageError)
            raise kind(f"{self.name} answered {code}")

    # --- the connection -----------------------------------------------------------------------

    async def _call(self, function: Callable[[Any], T]) -> T:
        if self._store is None:
            await self._connected()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, function, self._store)

    async def _connected(self) -> None:
        """Connect. There is one attempt at a time, which goes on when those who wait for it give
        up."""
        if self._connecting is None or self._connecting.done():
            loop = asyncio.get_running_loop()
            self._connecting = loop.run_in_executor(self._pool, self._connect)
            self._connecting.add_done_callback(_seen)
        await asyncio.shield(self._connecting)

    def _connect(self) -> None:
        if self._store is not None:
            return
        settings = self._settings
        try:
            address = (settings.host, settings.port)
            with socket.create_connection(address, self._timeout_s) as connection:
                local_host = settings.local_host or connection.getsockname()[0]
        except TimeoutError as error:
            raise DeadlineError(f"{self.name} does not accept connections in time") from error
        except OSError as error:
            raise UnavailableError(f"{self.name} does not answer") from error
        store = load_library().MooncakeDistributedStore()
        code = store.setup(
            {
                "local_hostname": local_host,
                "metadata_server": settings.metadata,
                "global_segment_size": str(settings.segment_bytes),
                "local_buffer_size": str(settings.buffer_bytes),
                "protocol": settings.protocol,
                "rdma_devices": settings.device,
                "master_server_addr": f"{settings.host}:{settings.port}",
            }
        )
        if code != 0:
            raise UnavailableError(f"{self.name} cannot be joined ({code})")
        self._store = store

    async def close(self) -> None:
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        # closing a store during a call may crash the process
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._store is not None:
            self._store.close()
            self._store = None


def open_mooncake(url: RemoteURL, timeout_s: float) -> MooncakeRemote:
    """See `read_settings` for the URL. The first call connects."""
    settings = read_settings(url)
    load_library()
    limit_waiting(timeout_s)
    return MooncakeRemote(settings, timeout_s)


def _sizes(store: Any, keys: Sequence[str]) -> tuple[Entry, ...]:
    found = ((key, store.get_size(key)) for key in keys)
    return tuple(Entry(key, size) for key, size in found if size >= 0)


def _seen(attempt: asyncio.Future[None]) -> None:
    """Drop the error of a failed attempt for which nobody waits any more."""
    if not attempt.cancelled():
        attempt.exception()
