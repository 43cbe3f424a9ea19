"""The remote tier: blocks as frames under keys of an engine that several machines share."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

from kvshare_store.blocks.remotes.base import Remote
from kvshare_store.blocks.tiers.base import Tier, TierProperties, TierUse
from kvshare_store.errors import (
    CorruptBlockError,
    KVShareError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
)
from kvshare_store.tensors.frame import (
    Block,
    Codec,
    Key,
    decode_frame,
    encode_frame,
    read_header,
)

_BLOCKS = "blocks/"
_QUARANTINE = "quarantine/"


class _Known(NamedTuple):
    """What this process knows of a block. Compared by identity: a new put is a new object."""

    namespace: str
    nbytes: int


class RemoteTier(Tier):
    """Blocks at `blocks/<namespace digest>/<name>`, bad ones at `quarantine/<digest>/<name>`.

    Other machines put and remove blocks too, so `size`, `names` and `use` tell only what this
    process knows: what it put or got, was told by `expect`, or found by `discover`. `get` always
    asks the engine. `namespace_of` finds the namespace of a block this process does not know.

    `budget` in bytes holds for what this process puts; 0 leaves eviction to the engine.
    """

    name = "remote"

    def __init__(
        self,
        remote: Remote,
        *,
        budget: int = 0,
        codec: Codec = "none",
        key: Key | None = None,
        namespace_of: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        self.remote = remote
        self.namespace_of = namespace_of
        self.quarantined = 0
        """Blocks that did not verify."""
        self.properties = TierProperties(
            persistent=True,  # they survive this process, if not always the engine's
            shared=True,
            max_concurrency=remote.properties.max_concurrency,
        )
        self._budget = budget
        self._codec: Codec = codec
        self._key = key
        self._known: OrderedDict[str, _Known] = OrderedDict()
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
        self._used -= 0 if known is None else known.nbytes

    async def discover(self) -> int:
        """List what the engine holds; how many blocks this process did not know.

        `UnsupportedError` when the engine cannot list.
        """
        before = len(self._known)
        with self._call():
            async for key, nbytes in self.remote.list(_BLOCKS):
                namespace, _, name = key.removeprefix(_BLOCKS).partition("/")
                self.expect(name, namespace, nbytes)
        return len(self._known) - before

    async def purge(self, namespace: str, names: Sequence[str]) -> None:
        """Remove every block of a namespace, whoever put it, quarantined ones too."""
        with self._call():
            for area in (_BLOCKS, _QUARANTINE):
                await self.remote.delete_prefix(f"{area}{namespace}/")
        for name in [name for name, known in self._known.items() if known.namespace == namespace]:
            self.forget(name)

    def _learn(self, name: str, namespace: str, nbytes: int) -> None:
        self.forget(name)
        self._known[name] = _Known(namespace, nbytes)
        self._used += nbytes

    def _namespace(self, name: str) -> str | None:
        known = self._known.get(name)
        return self.namespace_of(name) if known is None else known.namespace

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
                if name in self._known:
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
        try:
            await self.remote.put(_at(_BLOCKS, block.namespace, name), (frame,))
            self._learn(name, block.namespace, nbytes)
        finally:
            self._pending -= nbytes

    def _frame(self, name: str, block: Block) -> bytes:
        return b"".join(encode_frame(name, block, self._codec, self._key))

    # --- get ----------------------------------------------------------------------------------

    async def get(self, name: str) -> Block:
        namespace = self._namespace(name)
        if namespace is None:
            raise MissingBlockError(f"block {name[:12]} is of no known namespace")
        with self._call():
            return await self._get(name, namespace)

    async def _get(self, name: str, namespace: str) -> Block:
        known = self._known.get(name)
        try:
            frame = await self.remote.get(_at(_BLOCKS, namespace, name))
        except MissingBlockError as error:
            if self._known.get(name) is known:  # and not put again in the meantime
                self.forget(name)
            raise MissingBlockError(f"block {name[:12]} is not in the remote tier") from error
        try:
            block = await asyncio.to_thread(decode_frame, frame, name, self._key)
        except CorruptBlockError:
            self.forget(name)
            if not self._sealed_otherwise(frame):
                await self._quarantine(name, namespace, frame)
            raise
        if known is None:
            self.expect(name, namespace, len(frame))
        elif self._known.get(name) is known:  # and not deleted in the meantime
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
                namespace = self._namespace(name)
                if namespace is None:
                    return False
                present = name in self._known
                await self.remote.delete(_at(_BLOCKS, namespace, name))
                self.forget(name)
                return present

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

    async def close(self) -> None:
        """Calls that have begun end as they would have; later ones are refused."""
        self._closed = True
        while self._calls:
            self._idle.clear()
            await self._idle.wait()
        await self.remote.close()


def _at(area: str, namespace: str, name: str) -> str:
    return f"{area}{namespace}/{name}"
