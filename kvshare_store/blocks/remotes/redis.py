"""Redis, Valkey, or another server that speaks their protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

from kvshare_store.blocks.remotes.base import Entry, Part, Remote, RemoteProperties
from kvshare_store.blocks.remotes.urls import RemoteURL, missing_extra
from kvshare_store.errors import (
    ConfigError,
    DeadlineError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
    UnavailableError,
)

try:
    import redis.exceptions as failures
    from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ImportError as error:
    raise missing_extra("redis") from error

_CONNECTIONS = 16
_SCAN_PAGE = 1000
_MAX_VALUE = 512 << 20
"""The largest value that the protocol carries by default."""


class RedisRemote(Remote):
    """Values as strings under `prefix`. One server; a cluster is not supported."""

    properties = RemoteProperties(listing=True, max_concurrency=_CONNECTIONS)

    def __init__(self, client: Redis, name: str, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self.name = name

    async def put(self, key: str, parts: Sequence[Part]) -> None:
        value = b"".join(parts)
        if len(value) > _MAX_VALUE:
            raise NoSpaceError(f"{self.name} takes values up to {_MAX_VALUE:,} bytes")
        with self._translated():
            await self._client.set(self._prefix + key, value)

    async def get(self, key: str) -> bytes:
        with self._translated():
            value = await self._client.get(self._prefix + key)
        if value is None:
            raise MissingBlockError(f"{self.name} has no such key")
        if not isinstance(value, bytes):
            raise StorageError(f"{self.name} answered with text")
        return value

    async def delete(self, key: str) -> None:
        with self._translated():
            await self._client.unlink(self._prefix + key)

    async def create(self, key: str, value: bytes) -> bool:
        with self._translated():
            return bool(await self._client.set(self._prefix + key, value, nx=True))

    async def list(self, prefix: str) -> AsyncIterator[Entry]:
        async for keys in self._pages(prefix):
            with self._translated():
                async with self._client.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.strlen(key)
                    sizes = await pipeline.execute()
            for key, nbytes in zip(keys, sizes, strict=True):
                if nbytes:  # no block is empty, so it was removed between the two calls
                    yield Entry(key.removeprefix(self._prefix), nbytes)

    async def delete_prefix(self, prefix: str) -> int:
        removed = 0
        async for keys in self._pages(prefix):
            with self._translated():
                removed += int(await self._client.unlink(*keys))
        return removed

    async def _pages(self, prefix: str) -> AsyncIterator[Sequence[str]]:
        """Keys, each at most once in a page; the server may repeat one on a later page."""
        cursor = 0
        while True:
            with self._translated():
                cursor, found = await self._client.scan(
                    cursor, match=_quoted(self._prefix + prefix) + "*", count=_SCAN_PAGE
                )
            if found:
                yield sorted({key if isinstance(key, str) else key.decode() for key in found})
            if cursor == 0:
                return

    async def close(self) -> None:
        await self._client.aclose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (failures.TimeoutError, TimeoutError) as error:
            raise DeadlineError(f"{self.name} did not answer in time") from error
        except failures.AuthenticationError as error:
            raise StorageError(f"{self.name} refused the password") from error
        except (failures.ConnectionError, OSError) as error:
            raise UnavailableError(f"{self.name} does not answer") from error
        except failures.OutOfMemoryError as error:
            raise NoSpaceError(f"{self.name} is full") from error
        except failures.RedisError as error:
            raise StorageError(f"{self.name}: {error}") from error


def open_redis(url: RemoteURL, timeout_s: float) -> RedisRemote:
    """`redis://[user:password@]host[:port][/database][?prefix=…]`; `rediss` for TLS."""
    url.check_options("prefix")
    database = url.path.strip("/") or "0"
    if not database.isdecimal():
        raise ConfigError("remote: the path of a redis URL is the number of a database")
    port = url.port or 6379
    pool = BlockingConnectionPool(
        max_connections=_CONNECTIONS,
        timeout=timeout_s,
        connection_class=SSLConnection if url.scheme == "rediss" else Connection,
        host=url.host or "localhost",
        port=port,
        db=int(database),
        username=url.user,
        password=url.password,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),  # `RetryTier` knows the deadline, the library does not
    )
    client = Redis.from_pool(pool)
    return RedisRemote(client, f"{url.scheme}://{url.host}:{port}", url.options.get("prefix", ""))


def _quoted(text: str) -> str:
    """A pattern that matches only this key."""
    return "".join("\\" + sign if sign in "*?[]^\\" else sign for sign in text)
