"""Object storage through `obstore`: S3 and compatible services, or a shared folder."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvshare_store.blocks.remotes.base import Entry, Part, Remote, RemoteProperties
from kvshare_store.blocks.remotes.urls import RemoteURL, missing_extra
from kvshare_store.errors import (
    DeadlineError,
    KVShareError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
    UnavailableError,
)

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError
    from obstore.store import LocalStore, S3Store
except ImportError as error:
    raise missing_extra("s3") from error

if TYPE_CHECKING:
    from obstore.store import ObjectStore, S3Config

_LIST_PAGE = 1000
_UNFINISHED = re.compile(r"^[0-9a-f]{64}#\d+$")


class _BrokenOffError(StorageError):
    """A response was cut off."""


class _ExistsError(StorageError):
    """The object exists already."""


class ObjectRemote(Remote):
    """Values as objects of a bucket, or as files below a folder.

    A put is one request, so it is atomic. A block is far below the 5 GB that one request may carry.
    """

    properties = RemoteProperties(listing=True, max_concurrency=16)

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self.name = name

    async def put(self, key: str, parts: Sequence[Part]) -> None:
        # joined: the library may still be sending when a call is cancelled
        value = b"".join(parts)
        with _translated(self.name, writing=True):
            await obstore.put_async(self._store, key, value, use_multipart=False)

    async def create(self, key: str, value: bytes) -> bool:
        try:
            with _translated(self.name, writing=True):
                await obstore.put_async(self._store, key, value, mode="create")
        except _ExistsError:
            return False
        except StorageError:  # of a server without conditional writes
            return await super().create(key, value)
        return True

    async def get(self, key: str) -> memoryview:
        try:
            return await self._get(key)
        except _BrokenOffError:
            # some servers cut a response short when its object is removed: another request tells
            return await self._get(key)

    async def _get(self, key: str) -> memoryview:
        with _translated(self.name):
            answer = await obstore.get_async(self._store, key)
            # a bucket whose versioning was suspended says "null" for what has no version
            if answer.meta.get("version") not in (None, "null"):
                self.keeps_versions = True
            return memoryview(await answer.bytes_async())

    async def delete(self, key: str) -> None:
        try:
            with _translated(self.name):
                await obstore.delete_async(self._store, key)
        except MissingBlockError:
            return

    async def list(self, prefix: str) -> AsyncIterator[Entry]:
        with _translated(self.name):
            pages = obstore.list(self._store, prefix.rstrip("/") or None, chunk_size=_LIST_PAGE)
            async for page in pages:
                for item in page:
                    yield Entry(item["path"], item["size"])


class FolderRemote(ObjectRemote):
    """A folder. The library writes `NAME#1` and renames it, and never lists what a killed process
    left of that."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalStore(folder), f"file://{folder}")
        self._folder = folder

    async def delete_prefix(self, prefix: str) -> int:
        removed = await super().delete_prefix(prefix)
        await asyncio.to_thread(self._remove_unfinished, prefix)
        return removed

    def _remove_unfinished(self, prefix: str) -> None:
        try:
            for file in (self._folder / prefix).glob("*#*"):
                if _UNFINISHED.match(file.name):
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.name}: {error.strerror}") from error


def open_s3(url: RemoteURL, timeout_s: float) -> ObjectRemote:
    """`s3://bucket/prefix?endpoint=…&region=…&allow_http=true`.

    Credentials come from the environment (`AWS_ACCESS_KEY_ID`, …) or from what the machine's role
    gives, never from the URL.
    """
    url.refuse_credentials()
    url.check_options("endpoint", "region", "allow_http", "virtual_hosted")
    bucket, prefix = url.host, url.path.strip("/")
    config: S3Config = {
        "region": url.options.get("region", "us-east-1"),
        "virtual_hosted_style_request": url.flag("virtual_hosted"),
    }
    if "endpoint" in url.options:
        config["endpoint"] = url.options["endpoint"]
    seconds = f"{timeout_s:g}s"
    store = S3Store(
        bucket,
        prefix=prefix or None,
        config=config,
        client_options={
            "allow_http": url.flag("allow_http"),
            "timeout": seconds,
            "connect_timeout": seconds,
        },
        retry_config={"max_retries": 0},  # `RetryTier` knows the deadline, the library does not
    )
    return ObjectRemote(store, f"s3://{bucket}/{prefix}")


def open_folder(url: RemoteURL) -> ObjectRemote:
    """`file:///folder`: a folder that every machine mounts. If it is missing it is made, for its
    owner only."""
    url.check_options()
    folder = Path(url.path)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return FolderRemote(folder)
    except (OSError, BaseError) as error:
        raise StorageError(f"remote folder {folder} cannot be used: {_line(error)}") from error


@contextmanager
def _translated(name: str, *, writing: bool = False) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        # a missing bucket must not look like a missing block
        if writing or "NoSuchBucket" in str(error):
            raise StorageError(f"{name} does not exist: create it") from error
        raise MissingBlockError(f"{name} has no such object") from error
    except AlreadyExistsError as error:
        raise _ExistsError(f"{name} has the object already") from error
    except (OSError, BaseError) as error:
        raise _kind(str(error))(f"{name}: {_line(error)}") from error


def _kind(text: str) -> type[KVShareError]:
    """Which error of ours it is. The library raises one type for every transport failure, and only
    the text tells them apart."""
    if "kind: Timeout" in text or "kind: TimedOut" in text:
        return DeadlineError
    if "kind: Connect" in text or "kind: Request" in text:
        return UnavailableError
    if "response body error" in text:
        return _BrokenOffError
    if "StorageFull" in text or "QuotaExceeded" in text or "InsufficientStorage" in text:
        return NoSpaceError
    return StorageError


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
