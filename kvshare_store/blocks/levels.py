"""The tiers below host: which of them must hold a block, and how blocks move between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.remote import RemoteTier
from kvshare_store.errors import (
    KVShareError,
    MissError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
)
from kvshare_store.errors.wording import short
from kvshare_store.observability.metrics import Metrics
from kvshare_store.tensors.frame import Block

HOST = "host"
FRAME_BYTES = 4096
"""Upper bound of the bytes that a tier adds to the rows of a block."""


class Level:
    """A tier below host and its part in the store.

    A block is written as soon as it is saved, or `back`: only when the tier above runs out of room.
    A `required` level must hold every block of a node before the node is committed.
    `shared`: other machines read what is there, so nothing is deleted without asking them.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        back: bool,
        required: bool = False,
        shared: bool = False,
        remote: RemoteTier | None = None,
    ) -> None:
        self.tier = tier
        self.back = back
        self.required = required
        self.shared = shared
        self.remote = remote
        """The tier itself, without its wrappers, if other processes put blocks there too."""
        self._slots: asyncio.Semaphore | None = None

    def slots(self) -> asyncio.Semaphore:
        """Limits concurrent calls to what suits the tier; made in the loop that uses it."""
        if self._slots is None:
            self._slots = asyncio.Semaphore(self.tier.properties.max_concurrency)
        return self._slots

    def has(self, name: str) -> bool:
        """Whether the tier holds the block, as far as that is known without waiting."""
        return self.tier.has(name)

    def needs(self, name: str) -> bool:
        """Whether a block must be written to make sure that it is there. If other machines use the
        tier, it may be known that the block was there but not whether it still is."""
        return not (self.remote.sure(name) if self.remote is not None else self.has(name))


class Levels:
    """The levels from the fastest to the slowest. Coroutines run in the store's I/O loop."""

    def __init__(self, levels: Sequence[Level], metrics: Metrics) -> None:
        self._levels = list(levels)
        self._metrics = metrics

    def __iter__(self) -> Iterator[Level]:
        return iter(self._levels)

    def __bool__(self) -> bool:
        return bool(self._levels)

    def named(self, name: str) -> Level | None:
        """The level with the tier of that name."""
        return next((level for level in self._levels if level.tier.name == name), None)

    def holder(self, name: str) -> Level | None:
        """The fastest level that holds the block."""
        return next((level for level in self._levels if level.has(name)), None)

    def touch(self, name: str) -> None:
        """Count a use in every tier that holds the block."""
        for level in self._levels:
            level.tier.touch(name)

    # --- reading ------------------------------------------------------------------------------

    async def get(self, name: str) -> tuple[Block, Level]:
        """The block and the level it came from.

        `MissingBlockError` if every level that should hold it lacks it. If one of them could not
        answer, its error is raised, since the block may still be there.
        """
        refused: KVShareError | None = None
        for level in self._levels:
            if not level.has(name):
                continue
            try:
                async with level.slots():
                    return await level.tier.get(name), level
            except MissError as error:
                self._metrics.error(error.kind)
            except KVShareError as error:
                self._metrics.error(error.kind)
                refused = error
        raise refused or MissingBlockError(f"block {short(name)} is in no tier")

    async def fill(self, name: str, block: Block, source: Level) -> None:
        """Also keep a block that came from a slow level in the faster ones, if they have or can
        make room."""
        for level in self._levels[: self._levels.index(source)]:
            with contextlib.suppress(KVShareError):  # a copy for speed; the block itself is safe
                await self._put(level, name, block, source.tier.name)

    # --- writing ------------------------------------------------------------------------------

    async def persist(self, names: Sequence[str], peek: Callable[[str], Block]) -> None:
        """Write blocks to every level that writes through.

        Raises the first error of a required level; those of the others are counted.
        """
        writes = [
            (level, name)
            for level in self._levels
            for name in names
            if not level.back and level.needs(name)
        ]
        # all of them end before an error is raised: a write reads the rows in place
        ended = await asyncio.gather(
            *(self._persist(level, name, peek) for level, name in writes), return_exceptions=True
        )
        failed: BaseException | None = None
        for (level, _), error in zip(writes, ended, strict=True):
            if error is None:
                continue
            if level.required or not isinstance(error, KVShareError):
                failed = failed or error
            else:
                self._metrics.error(error.kind)
        if failed is not None:
            raise failed

    async def _persist(self, level: Level, name: str, peek: Callable[[str], Block]) -> None:
        source = HOST
        try:
            block = peek(name)
        except MissingBlockError:  # it has left the host, so another level has it
            block, holder = await self.get(name)
            source = holder.tier.name
        await self._put(level, name, block, source)

    async def _put(self, level: Level, name: str, block: Block, source: str) -> None:
        async with level.slots():
            if not level.needs(name):
                return
            try:
                await level.tier.put(name, block)
            except NoSpaceError:
                lowest = level is self._levels[-1]
                if lowest or not await self.make_room(level, len(block.data) + FRAME_BYTES):
                    raise
                await level.tier.put(name, block)
            self._metrics.moved(source, level.tier.name, len(block.data))

    async def write_back(self, name: str, block: Block) -> None:
        """A block leaves the host: the first level that writes back takes it."""
        for level in self._levels:
            if level.back:
                with contextlib.suppress(KVShareError):  # a level below holds it already
                    await self._put(level, name, block, HOST)
                return

    # --- making room --------------------------------------------------------------------------

    async def make_room(self, level: Level, nbytes: int) -> bool:
        """Move blocks from a level to the next one until `nbytes` are free there. False if that is
        not enough: then nodes must be removed."""
        below = self._levels[self._levels.index(level) + 1 :]
        missing = level.tier.use().missing(nbytes)
        for name in level.tier.names() if below and missing > 0 else ():
            if missing <= 0:
                break
            size = level.tier.size(name)
            if size is not None and await self._demote(name, level, below):
                missing -= size
        return missing <= 0

    async def _demote(self, name: str, level: Level, below: Sequence[Level]) -> bool:
        """Remove a block from a level once a slower one holds it."""
        try:
            if not any(lower.has(name) for lower in below):
                takes = next((lower for lower in below if lower.back), None)
                if takes is None:
                    return False
                block = await level.tier.get(name)
                async with takes.slots():
                    await takes.tier.put(name, block)
                self._metrics.moved(level.tier.name, takes.tier.name, len(block.data))
            gone = await level.tier.delete(name)
            if gone:
                self._metrics.evicted(level.tier.name)
            return gone
        except KVShareError as error:
            self._metrics.error(error.kind)
            return False

    async def delete(self, names: Sequence[str]) -> None:
        """Remove blocks from every level that is this machine's own.

        Blocks of a shared level stay there for other machines' nodes.
        """
        for name in names:
            for level in self._levels:
                if level.shared and level.remote is not None:
                    level.remote.forget(name)
                if level.shared or not level.has(name):
                    continue
                try:
                    await level.tier.delete(name)
                except KVShareError as error:
                    self._metrics.error(error.kind)

    def shared(self) -> list[RemoteTier]:
        """Remote tiers that several machines share, without their wrappers."""
        return [at.remote for at in self._levels if at.shared and at.remote is not None]

    async def list_shared(self) -> dict[str, str]:
        """Every block in the shared level, of all machines, with its namespace; none where the
        level cannot be listed."""
        found: dict[str, str] = {}
        for tier in self.shared():
            if tier.remote.properties.listing:
                listed = await tier.listed()
                found |= {name: namespace for name, (namespace, _) in listed.items()}
        return found

    async def delete_shared(self, blocks: Mapping[str, str]) -> None:
        """Remove blocks that no machine needs from the shared level. `blocks`: their namespaces, by
        name."""
        removals = [tier.remove(at, name) for tier in self.shared() for name, at in blocks.items()]
        ended = await asyncio.gather(*removals, return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error

    async def purge(
        self, namespace: str, names: Sequence[str], *, shared: bool, keep: Collection[str] = ()
    ) -> dict[str, KVShareError]:
        """Remove a namespace from every level of this machine and, if `shared`, from those that
        other machines use too, except blocks of `keep`. Returns which tiers refused, and why."""
        refused: dict[str, KVShareError] = {}
        for level in self._levels:
            if level.shared and not shared:
                continue
            try:
                await level.tier.purge(namespace, names, keep)
            except KVShareError as error:
                self._metrics.error(error.kind)
                refused[level.tier.name] = error
        for tier in [level.remote for level in self._levels if shared and level.remote]:
            if tier.remote.keeps_versions:
                refused[tier.name] = StorageError(
                    f"{tier.remote.name} keeps old versions: remove those with the bucket's own "
                    "means, or switch its versioning off"
                )
        return refused

    async def close(self) -> None:
        """Close every tier."""
        for level in self._levels:
            await level.tier.close()
