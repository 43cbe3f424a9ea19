"""The disk tier: one file a block, written under a temporary name, fsynced, then renamed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import aiofiles
import aiofiles.os

from kvshare_store.blocks.eviction import LRU
from kvshare_store.blocks.tiers.base import Tier, TierProperties, TierUse
from kvshare_store.errors import (
    CorruptBlockError,
    HomeError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
)
from kvshare_store.tensors.frame import Block, Codec, decode_frame, encode_frame

_SUFFIX = ".kvb"


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class DiskTier(Tier):
    """Blocks under `folder/blocks`, unfinished writes under `folder/tmp`, bad ones in quarantine.

    The budget counts the sizes of the files that are there. Use `await DiskTier.open(...)`.
    """

    name = "disk"
    properties = TierProperties(persistent=True, shared=False, max_concurrency=4)

    def __init__(self, folder: Path, budget: int, codec: Codec) -> None:
        self._folder = folder
        self._budget = budget
        self._codec: Codec = codec
        self._sizes: dict[str, int] = {}
        self._order = LRU()
        self._used = 0
        self._pending = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @classmethod
    async def open(cls, folder: Path, budget: int, codec: Codec = "none") -> DiskTier:
        """Make the folders, drop unfinished writes, count what is there."""
        tier = cls(folder, budget, codec)
        await asyncio.to_thread(tier._scan)
        return tier

    def _scan(self) -> None:
        try:
            for name in ("blocks", "tmp", "quarantine"):
                (self._folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            for leftover in (self._folder / "tmp").iterdir():
                leftover.unlink(missing_ok=True)
            found = [
                (entry.stat(), entry) for entry in (self._folder / "blocks").glob(f"*/*{_SUFFIX}")
            ]
        except OSError as error:
            raise HomeError(f"{self._folder} cannot be used: {error.strerror}") from error
        for status, entry in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
            self._add(entry.name.removesuffix(_SUFFIX), status.st_size)

    def _add(self, name: str, size: int) -> None:
        self._used += size - self._sizes.get(name, 0)
        self._sizes[name] = size
        self._order.touch(name)

    def _forget(self, name: str) -> None:
        self._used -= self._sizes.pop(name, 0)
        self._order.remove(name)

    def _path(self, name: str) -> Path:
        return self._folder / "blocks" / name[:2] / (name + _SUFFIX)

    def _alone(self, name: str) -> asyncio.Lock:
        """One put, get or delete of a block at a time; others do not wait for it."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def put(self, name: str, block: Block) -> None:
        async with self._alone(name):
            if name in self._sizes:
                self._order.touch(name)
            else:
                await self._put(name, block)

    async def _put(self, name: str, block: Block) -> None:
        """The block counts as here only once it is durable: until then its rows must stay put."""
        head, payload = encode_frame(name, block, self._codec)
        size = len(head) + len(payload)
        if self._used + self._pending + size > self._budget:
            raise NoSpaceError(f"disk tier holds {self._used:,} of {self._budget:,} bytes")
        self._pending += size  # before the first await: concurrent puts share one budget
        try:
            await self._write(self._path(name), head, payload)
        except OSError as error:
            kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            raise kind(f"block {name[:12]} was not written: {error.strerror}") from error
        finally:
            self._pending -= size
        self._add(name, size)

    async def _write(self, path: Path, head: bytes, payload: Any) -> None:
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True, mode=0o700)
            await asyncio.to_thread(_fsync_folder, path.parent.parent)
        temporary = self._folder / "tmp" / uuid.uuid4().hex
        try:
            async with aiofiles.open(temporary, "wb", opener=_owner_only) as file:
                await file.write(head)
                await file.write(payload)
                await file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            await aiofiles.os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        await asyncio.to_thread(_fsync_folder, path.parent)

    async def get(self, name: str) -> Block:
        async with self._alone(name):
            return await self._get(name)

    async def _get(self, name: str) -> Block:
        if name not in self._sizes:
            raise MissingBlockError(f"block {name[:12]} is not on disk")
        try:
            async with aiofiles.open(self._path(name), "rb") as file:
                frame = await file.read()
        except FileNotFoundError as error:
            self._forget(name)
            raise MissingBlockError(f"block {name[:12]} was removed from disk") from error
        except OSError as error:
            raise StorageError(f"block {name[:12]} was not read: {error.strerror}") from error
        try:
            block = await asyncio.to_thread(decode_frame, frame, name)
        except CorruptBlockError:
            await self._quarantine(name)
            raise
        self._order.touch(name)
        return block

    async def _quarantine(self, name: str) -> None:
        """Keep the bad bytes for whoever wants to look, out of the way of every reader."""
        with contextlib.suppress(FileNotFoundError):  # another reader moved it first
            await aiofiles.os.replace(self._path(name), self._folder / "quarantine" / name)
        self._forget(name)

    async def delete(self, name: str) -> bool:
        async with self._alone(name):
            return await self._delete(name)

    async def _delete(self, name: str) -> bool:
        present = name in self._sizes
        self._forget(name)
        try:
            await aiofiles.os.remove(self._path(name))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(f"block {name[:12]} was not removed: {error.strerror}") from error
        return present

    def size(self, name: str) -> int | None:
        return self._sizes.get(name)

    def names(self) -> list[str]:
        return list(self._order)

    def touch(self, name: str) -> None:
        if name in self._sizes:
            self._order.touch(name)

    def use(self) -> TierUse:
        return TierUse(self._used, self._budget, len(self._sizes))


def _fsync_folder(folder: Path) -> None:
    """Without this a rename may be lost in a power cut although the file's bytes are not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
