"""The disk tier: one file a block, written under a temporary name, fsynced, then renamed.

A call is one piece of work in a thread of the tier's own: open, read and verify in one go. What
several calls at once must agree on is kept in `Inventory` (which files are there, the budget) and
`Scratch` (unfinished files); `files` makes the calls to the file system.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from kvshare_store.blocks.tiers.base import Beside, Tier, TierProperties, TierUse
from kvshare_store.blocks.tiers.disk import files, traces
from kvshare_store.blocks.tiers.disk.inventory import Inventory
from kvshare_store.blocks.tiers.disk.scratch import Scratch
from kvshare_store.errors import (
    CorruptBlockError,
    FullDiskError,
    HomeError,
    MissingBlockError,
    StorageError,
)
from kvshare_store.errors.wording import short
from kvshare_store.tensors.frame import Block, Codec, Key, decode_frame, encode_frame

T = TypeVar("T")
_KEPT_BAD = 32
"""Most files kept in quarantine; the oldest are removed."""


class DiskTier(Tier):
    """Blocks in `folder/blocks`, unfinished writes in `folder/tmp`, bad blocks in quarantine.

    One process has the folder open. A file that another program put there is found, and one that
    was removed is missing. Use `await DiskTier.open(...)`.
    """

    name = "disk"
    properties = TierProperties(max_concurrency=8)

    def __init__(
        self, folder: Path, budget: int, codec: Codec, key: Key | None, beside: Callable[[], Beside]
    ) -> None:
        self.quarantined = 0
        """Blocks that failed verification."""
        self._folder = folder
        self._codec: Codec = codec
        self._key = key
        self._inventory = Inventory(folder / "blocks", budget, beside)
        self._scratch = Scratch(folder)
        self._threads = ThreadPoolExecutor(self.properties.max_concurrency + 1, "kvshare-disk")
        self._first_look: Future[None] | None = None
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._durable_folders: set[str] = set()
        self._closed = False

    @classmethod
    async def open(
        cls,
        folder: Path,
        budget: int,
        codec: Codec = "none",
        key: Key | None = None,
        beside: Callable[[], Beside] = Beside,
    ) -> DiskTier:
        """Make the folders and remove unfinished files; `HomeError` if refused. `beside`: other
        files that count against the budget.

        The tier can be used while existing files are still being counted.
        """
        tier = cls(folder, budget, codec, key, beside)
        await asyncio.to_thread(tier.prepare)
        tier._first_look = tier._threads.submit(tier.look_around)
        return tier

    def prepare(self) -> None:
        """Make the folders; `HomeError` if they cannot be used."""
        try:
            for name in ("blocks", "quarantine"):
                files.make_durable_folder(str(self._folder / name))
                files.names(str(self._folder / name))  # refused if it is no folder
            self._scratch.open()
        except OSError as error:
            raise HomeError(
                f"{error.filename or self._folder} cannot be used: {error.strerror}; repair it, or "
                "move it away: the store then starts with an empty one"
            ) from error

    def look_around(self) -> None:
        """Count the files that are there."""
        with contextlib.suppress(OSError):  # the next put scans again, and raises the reason
            self._inventory.look()

    def _alone(self, name: str) -> asyncio.Lock:
        """Allows one put, get or delete of a block at a time; calls for other blocks do not
        wait."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _start(self, function: Callable[..., T], *args: object) -> asyncio.Future[T]:
        if self._closed:
            raise StorageError("the disk tier is closed")
        return asyncio.wrap_future(self._threads.submit(function, *args))

    async def _finish(self, function: Callable[..., T], *args: object) -> T:
        """Also waits if the caller is cancelled: the thread uses the caller's memory."""
        work = self._start(function, *args)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    # --- put ----------------------------------------------------------------------------------

    async def put(self, name: str, block: Block) -> None:
        if self._first_look is not None and not self._first_look.done():
            self._inventory.hurry()  # the budget is not known
            await asyncio.wait([asyncio.wrap_future(self._first_look)])
        async with self._alone(name):
            if self._inventory.size(name) is not None:
                self._inventory.touch(name)
            else:
                await self._finish(self._put, name, block)

    def _put(self, name: str, block: Block) -> None:
        """The block counts as stored only once it is durable: until then its rows must not move."""
        with _refused(name, "written"):
            self._inventory.look()
            head, payload = encode_frame(name, block, self._codec, self._key)
            nbytes = len(head) + len(payload)
            self._inventory.reserve(nbytes)
            written = None
            try:
                self._write(self._inventory.path(name), head, payload)
                written = name
            finally:
                self._inventory.settle(nbytes, written)

    def _write(self, path: str, *parts: object) -> None:
        folder = str(Path(path).parent)
        if folder not in self._durable_folders:
            # not only by whoever makes it: another put may be here before that one is through
            files.make_folder(folder)
            files.sync_folder(str(self._folder / "blocks"))
            self._durable_folders.add(folder)
        unfinished = self._scratch.path()
        files.write(unfinished, parts)
        try:
            files.rename(unfinished, path)
        except OSError:
            files.discard(unfinished)
            raise
        try:
            files.sync_folder(folder)
        except OSError:
            files.discard(path)  # it may not be durable, so it must not count as stored
            raise

    # --- get ----------------------------------------------------------------------------------

    async def get(self, name: str) -> Block:
        async with self._alone(name):
            try:
                block, nbytes = await self._start(self._get, name)
            except (MissingBlockError, CorruptBlockError):
                self._inventory.forget(name)
                raise
            self._inventory.add(name, nbytes)
            return block

    def _get(self, name: str) -> tuple[Block, int]:
        with _refused(name, "read"):
            try:
                return self._read(name)
            except FileNotFoundError as error:
                raise MissingBlockError(f"block {short(name)} is not on disk") from error
            except CorruptBlockError:
                self._quarantine(name)
                raise

    def _read(self, name: str) -> tuple[Block, int]:
        """The verified block, and the size of its file."""
        frame = files.read(self._inventory.path(name))
        return decode_frame(frame, name, self._key), len(frame)

    def _quarantine(self, name: str) -> None:
        """Move the bad bytes into quarantine, where they can be inspected and no reader meets them.

        If that fails, the file stays and continues to be refused: every reader verifies.
        """
        self.quarantined += 1
        with contextlib.suppress(OSError):
            folder = self._folder / "quarantine"
            files.rename(self._inventory.path(name), str(folder / name))
            kept = [str(folder / entry) for entry in files.names(str(folder))]
            kept.sort(key=lambda path: (files.measure(path) or (0, 0))[1])
            for path in kept[:-_KEPT_BAD]:
                files.remove(path)

    # --- the rest -----------------------------------------------------------------------------

    async def delete(self, name: str) -> bool:
        async with self._alone(name):
            return await self._finish(self._delete, name)

    def _delete(self, name: str) -> bool:
        with _refused(name, "removed"):
            removed = files.remove(self._inventory.path(name))
        self._inventory.forget(name)
        return removed

    async def purge(self, namespace: str, names: Sequence[str], keep: Collection[str] = ()) -> None:
        """Looks into every file: blocks that no node uses are in no list."""
        for name in {*names, *await self._finish(self._traces, namespace)}.difference(keep):
            await self.delete(name)

    def _traces(self, namespace: str) -> list[str]:
        with _refused(namespace, "purged"):
            for path in traces.leftovers_of(self._folder, namespace):
                files.remove(path)
            return traces.blocks_of(self._folder, namespace)

    def size(self, name: str) -> int | None:
        return self._inventory.size(name)

    def has(self, name: str) -> bool:
        return self._inventory.has(name)

    def names(self) -> list[str]:
        return self._inventory.names()

    def touch(self, name: str) -> None:
        self._inventory.touch(name)

    def use(self) -> TierUse:
        return self._inventory.use()

    def counted(self) -> TierUse:
        return self._inventory.counted()

    def trouble(self) -> dict[str, int | str]:
        return {"quarantined": self.quarantined}

    async def close(self) -> None:
        """Calls that have begun end normally; later ones are refused."""
        self._closed = True
        self._inventory.hurry()
        await asyncio.to_thread(self._threads.shutdown)


@contextlib.contextmanager
def _refused(name: str, verb: str) -> Iterator[None]:
    """Turn errors of the file system into errors of a tier."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = FullDiskError if full else StorageError
        raise kind(f"block {short(name)} was not {verb}: {error.strerror}") from error
