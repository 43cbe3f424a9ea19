"""The remote tier: blocks as frames under keys of an engine that several machines share."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

from kvshare_store.blocks.remotes.base import Remote
from kvshare_store.blocks.remotes.owner import Owner
from kvshare_store.blocks.tiers.base import Tier, TierProperties, TierUse
from kvshare_store.errors import (
    CorruptBlockError,
    KVShareError,
    MissingBlockError,
    NoSpaceError,
    PlanError,
    StorageError,
)
from kvshare_store.errors.wording import short
from kvshare_store.tensors.frame import Block, Codec, Key, decode_frame, encode_frame, read_header

_BLOCKS = "blocks/"
_QUARANTINE = "quarantine/"
_KEY = re.compile(r"^blocks/([0-9a-f]{64})/([0-9a-f]{64})$")
"""What a store may have written. Whatever else is there is somebody else's and stays."""


class _Known(NamedTuple):
    """What this process knows of a block. Compared by identity: a new put is a new object."""

    namespace: str
    nbytes: int


class RemoteTier(Tier):
    """Blocks at `blocks/<namespace digest>/<name>`, bad ones at `quarantine/<digest>/<name>`.

    Other machines put and remove blocks too, so `size`, `names` and `use` tell only what this
    process knows: what it put or got, was told by `expect`, or found by `discover`. `get` of
    what it knows always asks the engine.

    `budget` in bytes holds for what this process puts; 0 leaves eviction to the engine. `owner`
    says to whom the prefix belongs: nothing is written or removed under another store's.
    """

    name = "remote"

    def __init__(
        self,
        remote: Remote,
        *,
        budget: int = 0,
        codec: Codec = "none",
        key: Key | None = None,
        owner: Owner | None = None,
    ) -> None:
        self.remote = remote
        self.quarantined = 0
        """Blocks that did not verify."""
        self.properties = TierProperties(remote.properties.max_concurrency)
        self._budget = budget
        self._codec: Codec = codec
        self._key = key
        self._owner = owner
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._doubted: dict[str, int] = {}
        """Blocks that another machine may have removed, and when (a count) that was last heard."""
        self._doubts = 0
        self._doubting = threading.Lock()
        self._used = 0
        self._pending = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._calls = 0
        self._idle = asyncio.Event()
        self._closed = False

    # --- what is known ------------------------------------------------------------------------

    def expect(self, name: str, namespace: str, nbytes: int) -> None:
        """Another machine says that it has put this block; `nbytes` as far as it is known."""
        if name not in self._known:
            self._learn(name, namespace, nbytes)

    def forget(self, name: str) -> None:
        """Nobody here needs the block any more; it stays for others, and a put puts it again."""
        known = self._known.pop(name, None)
        self._doubted.pop(name, None)
        self._used -= 0 if known is None else known.nbytes

    def doubt(self, names: Iterable[str] | None) -> None:
        """Others may have removed these blocks, or any (None): the next `put` of one is carried
        out although it is known. Reads go on asking."""
        with self._doubting:
            self._doubts += 1
            for name in list(self._known) if names is None else names:
                if name in self._known or name in self._locks:  # here, or being put
                    self._doubted[name] = self._doubts

    def sure(self, name: str) -> bool:
        """Whether the block is known and not in doubt."""
        return name in self._known and name not in self._doubted

    async def listed(self) -> dict[str, tuple[str, int]]:
        """Namespace and bytes of every block that the engine holds, by name.

        `UnsupportedError` when the engine cannot list.
        """
        with self._call():
            if self._owner is not None:
                self._owner.doubt()  # once in a while: somebody may have given the prefix away
            await self._ours()
            return {
                found[2]: (found[1], nbytes)
                async for key, nbytes in self.remote.list(_BLOCKS)
                if (found := _KEY.match(key))
            }

    async def discover(self) -> int:
        """List what the engine holds; how many blocks this process did not know.

        `UnsupportedError` when the engine cannot list.
        """
        before = len(self._known)
        for name, (namespace, nbytes) in (await self.listed()).items():
            self.expect(name, namespace, nbytes)
        return len(self._known) - before

    async def remove(self, namespace: str, name: str) -> None:
        """Remove a block that this process need not know. Asked for once: a second attempt might
        come after the block was put again."""
        async with self._alone(name):
            with self._call():
                await self._ours()
                await self.remote.delete(_at(_BLOCKS, namespace, name))
                self.forget(name)

    async def _ours(self) -> None:
        """`ForeignError` if the prefix belongs to another store."""
        if self._owner is not None:
            await self._owner.check(self.remote)

    async def purge(self, namespace: str, names: Sequence[str], keep: Collection[str] = ()) -> None:
        """Remove every block of a namespace, whoever put it, quarantined ones too. They are no
        mere copies: `PlanError` with `keep`."""
        if keep:
            raise PlanError("a remote is purged as a whole")
        with self._call():
            await self._ours()
            for area in (_BLOCKS, _QUARANTINE):
                await self.remote.delete_prefix(f"{area}{namespace}/")
        for name in [name for name, known in self._known.items() if known.namespace == namespace]:
            self.forget(name)

    def _learn(self, name: str, namespace: str, nbytes: int) -> None:
        known = self._known.pop(name, None)
        self._used -= 0 if known is None else known.nbytes
        self._known[name] = _Known(namespace, nbytes)
        self._used += nbytes

    def _alone(self, name: str) -> asyncio.Lock:
        """One put or delete of a block at a time; reads do not wait, so that they can be hedged."""
        return self._locks.setdefault(name, asyncio.Lock())

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """What `close` waits for."""
        if self._closed:
            raise StorageError("the remote tier is closed")
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            if self._calls == 0:
                self._idle.set()

    # --- put ----------------------------------------------------------------------------------

    async def put(self, name: str, block: Block) -> None:
        async with self._alone(name):
            with self._call():
                if self.sure(name):
                    self.touch(name)
                else:
                    await self._put(name, block)

    async def _put(self, name: str, block: Block) -> None:
        # copied: the rows may be another block's by the time a cancelled call stops sending
        frame = await asyncio.to_thread(self._frame, name, block)
        nbytes = len(frame)
        if self._budget and self._used + self._pending + nbytes > self._budget:
            raise NoSpaceError(f"remote tier holds {self._used:,} of {self._budget:,} bytes")
        self._pending += nbytes  # before the next await: concurrent puts share one budget
        doubted = self._doubted.get(name)
        try:
            await self._ours()
            await self.remote.put(_at(_BLOCKS, block.namespace, name), (frame,))
            self._learn(name, block.namespace, nbytes)
            with self._doubting:
                if self._doubted.get(name) == doubted:  # else it may have been removed since
                    self._doubted.pop(name, None)
        finally:
            self._pending -= nbytes

    def _frame(self, name: str, block: Block) -> bytes:
        return b"".join(encode_frame(name, block, self._codec, self._key))

    # --- get ----------------------------------------------------------------------------------

    async def get(self, name: str) -> Block:
        known = self._known.get(name)
        if known is None:
            raise MissingBlockError(f"block {short(name)} is not known to be in the remote tier")
        with self._call():
            return await self._get(name, known)

    async def _get(self, name: str, known: _Known) -> Block:
        namespace = known.namespace
        try:
            frame = await self.remote.get(_at(_BLOCKS, namespace, name))
        except MissingBlockError as error:
            if self._known.get(name) is known:  # and not put again in the meantime
                self.forget(name)
            raise MissingBlockError(f"block {short(name)} is not in the remote tier") from error
        try:
            block = await asyncio.to_thread(decode_frame, frame, name, self._key)
        except CorruptBlockError:
            self.forget(name)
            if not self._sealed_otherwise(frame):
                await self._quarantine(name, namespace, frame)
            raise
        if self._known.get(name) is known:  # and not deleted in the meantime
            self._learn(name, namespace, len(frame))
        return block

    def _sealed_otherwise(self, frame: bytes | memoryview) -> bool:
        """Whether the block is encrypted and this store is not, or the other way round.

        Such a block is fine for others: a machine with a wrong setting must not remove it.
        """
        try:
            return read_header(frame)[0].encrypted != (self._key is not None)
        except CorruptBlockError:
            return False

    async def _quarantine(self, name: str, namespace: str, frame: bytes | memoryview) -> None:
        """Move bad bytes out of everybody's way; if the engine fails now, the next reader will."""
        self.quarantined += 1
        with contextlib.suppress(KVShareError):
            await self.remote.put(_at(_QUARANTINE, namespace, name), (frame,))
        with contextlib.suppress(KVShareError):
            await self.remote.delete(_at(_BLOCKS, namespace, name))

    # --- the rest -----------------------------------------------------------------------------

    async def delete(self, name: str) -> bool:
        async with self._alone(name):
            with self._call():
                known = self._known.get(name)
                if known is None:
                    return False
                await self._ours()
                await self.remote.delete(_at(_BLOCKS, known.namespace, name))
                self.forget(name)
                return True

    def size(self, name: str) -> int | None:
        known = self._known.get(name)
        return None if known is None else known.nbytes

    def names(self) -> list[str]:
        return list(self._known)

    def touch(self, name: str) -> None:
        if name in self._known:
            self._known.move_to_end(name)

    def use(self) -> TierUse:
        return TierUse(self._used, self._budget, len(self._known))

    def trouble(self) -> dict[str, int | str]:
        return {"quarantined": self.quarantined}

    async def close(self) -> None:
        """Calls that have begun end as they would have; later ones are refused."""
        self._closed = True
        while self._calls:
            self._idle.clear()
            await self._idle.wait()
        await self.remote.close()


def _at(area: str, namespace: str, name: str) -> str:
    return f"{area}{namespace}/{name}"
