"""Content-addressed blocks through the tiers: persist, read, lease, promote, delete, purge.

All bookkeeping happens under one lock that the Store shares; whatever waits for a medium happens
outside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from kvshare_store.blocks.io_loop import IoLoop
from kvshare_store.blocks.leases import Lease, LeaseBook
from kvshare_store.blocks.levels import Level, Levels
from kvshare_store.blocks.pool import BufferPool
from kvshare_store.blocks.tiers.base import Tier, TierUse
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.errors import KVShareError, LeaseError, MissError, NoSpaceError
from kvshare_store.metrics import Metrics
from kvshare_store.plan import BlockRef
from kvshare_store.tensors.frame import Block


class _Promotion(msgspec.Struct):
    """A block on its way to the host."""

    done: Future[None]
    users: int
    """Nodes that use it. Where none does and no lease holds it, it need not come."""


class BlockStore:
    """Names to rows. It knows no nodes: whoever changes them says how many use a block (`weigh`)
    and asks which blocks have left their last tier (`BufferPool.take_lost`)."""

    def __init__(
        self,
        host: HostTier,
        below: Sequence[Level],
        io: IoLoop,
        lock: threading.RLock,
        metrics: Metrics,
    ) -> None:
        self.host = host
        self.levels = Levels(below, metrics)
        self.pool = BufferPool(host, self.levels, io, lock, metrics)
        self._io = io
        self._lock = lock
        self._metrics = metrics
        self._promotions: dict[str, _Promotion] = {}

    @property
    def leases(self) -> LeaseBook:
        """What plans and clients hold."""
        return self.pool.leases

    # --- writing ------------------------------------------------------------------------------

    def persist(self, names: Sequence[str]) -> None:
        """Return once every block is durable. Raises the first error; the others may be durable."""
        if not self.levels:
            return
        with self.pool.persisting(names):
            self._io.run(self.levels.persist(list(dict.fromkeys(names)), self.host.peek))

    # --- reading ------------------------------------------------------------------------------

    def tier_of(self, name: str) -> str | None:
        """The fastest tier that holds the block, or None."""
        if self.host.has(name):
            return self.host.name
        level = self.levels.holder(name)
        return None if level is None else level.tier.name

    def size_of(self, name: str) -> int:
        """Bytes of a block in the fastest tier that has it; 0 if none has."""
        level = self.levels.holder(name)
        return self.host.size(name) or (level and level.tier.size(name)) or 0

    def expect(self, names: Sequence[str], namespace: str) -> bool:
        """A node that was committed elsewhere, or before a restart, uses these blocks: what no
        tier of this machine has must be in one that others reach too. False if there is none."""
        absent = self.absent(names)
        for level in self.levels:
            absent = [name for name in absent if not level.has(name)]
        remotes = [level.remote for level in self.levels if level.remote is not None]
        for name in absent:
            for remote in remotes:
                remote.expect(name, namespace, 0)
        return not absent or bool(remotes)

    def absent(self, names: Iterable[str]) -> list[str]:
        """Those of the blocks that are not in the host."""
        return [name for name in names if not self.host.has(name)]

    def read(self, name: str) -> Block:
        """A copy of a block, verified where it came from below the host; `MissingBlockError` or
        what its tier says. Waits for the medium: do not hold the lock."""
        while True:
            with self._lock:
                ref = self.host.ref(name)
                if ref is None:
                    break
                block = self.host.peek(name)
            copied = bytes(block.data)  # as any other reader: the label says what was copied
            with contextlib.suppress(LeaseError):
                self.host.arena.check(ref)
                return msgspec.structs.replace(block, data=copied)
        return self._io.run(self.levels.get(name))[0]

    def read_from(self, level: Level, name: str) -> Block:
        """A verified block from this very tier, or what the tier says. Do not hold the lock."""
        return self._io.run(level.tier.get(name))

    def lease_soon(
        self,
        names: Sequence[str],
        users: Mapping[str, int],
        owner: str,
        seconds: float,
        timeout: float,
    ) -> Future[tuple[Lease, dict[str, BlockRef]]]:
        """Pin blocks now and bring them into the arena, without waiting in the caller's thread.
        `users`: how many nodes use each of those that are not there (`absent`).

        The future has the lease and where each block lies that is resident after at most `timeout`
        seconds; promotions that are late go on for the next request. It is done on return when
        every block is resident already, else it ends in the I/O loop.
        """
        with self._lock:
            lease = self.leases.grant(list(names), owner, seconds)
            absent = self.absent(names) if self.levels else []
            promotions = [self._promote(name, users.get(name, 0)) for name in absent]
            if not promotions:
                ready: Future[tuple[Lease, dict[str, BlockRef]]] = Future()
                ready.set_result(self._resident(lease))
                return ready
        return self._io.submit(self._arrive(lease, promotions, timeout))

    async def _arrive(
        self, lease: Lease, promotions: list[Future[None]], timeout: float
    ) -> tuple[Lease, dict[str, BlockRef]]:
        await asyncio.wait([asyncio.wrap_future(each) for each in promotions], timeout=timeout)
        return self._resident(lease)

    def _resident(self, lease: Lease) -> tuple[Lease, dict[str, BlockRef]]:
        with self._lock:
            for name in lease.names:
                self.host.touch(name)
                self.levels.touch(name)
            return lease, self.host.refs(lease.names)

    def _promote(self, name: str, users: int) -> Future[None]:
        """Bring one block from below to host; requests for the same block share one read."""
        running = self._promotions.get(name)
        if running is None:
            running = _Promotion(self._io.submit(self._fetch(name)), users)
            self._promotions[name] = running
        return running.done

    async def _fetch(self, name: str) -> None:
        try:
            block, level = await self.levels.get(name)
            self._place(name, block, level.tier.name)
            self._io.submit(self.levels.fill(name, block, level))  # whoever waits has its rows
        except MissError:  # counted where it was seen
            with self._lock:
                if self.host.size(name) is None:
                    self.pool.lose(name)
        except KVShareError:
            pass  # counted; the block may be there for the next request
        finally:
            with self._lock:
                self._promotions.pop(name, None)

    def _place(self, name: str, block: Block, source: str) -> None:
        """Copy a block into the host, from the tier `source`, if anybody still wants it there. The
        copy is made without the lock: a slot that is reserved and has no name belongs to whoever
        fills it."""
        nbytes = len(block.data)
        with self._lock:
            if not self._lacks(name):
                return
            try:
                offset = self.pool.allocate(nbytes)
            except NoSpaceError as error:
                self._metrics.error(error.kind)
                return
        self.host.arena.rows(offset, nbytes)[:] = block.data
        with self._lock:
            if self._lacks(name):
                self.pool.place(offset, name, block)
                self.host.weigh(name, self._users_of(name))
                self._metrics.moved(source, self.host.name, nbytes)
            else:
                self.pool.cancel(offset)

    def _lacks(self, name: str) -> bool:
        """Whether the host should have a block and has not. Hold the lock."""
        wanted = self.leases.pinned(name) or self._users_of(name)
        return bool(wanted) and self.host.size(name) is None

    def _users_of(self, name: str) -> int:
        """Nodes that use a block which is on its way to the host."""
        promotion = self._promotions.get(name)
        return 0 if promotion is None else promotion.users

    def end_lease(self, lease_id: str) -> Lease:
        """Unpin a plan's blocks; `LeaseError` if the lease has ended already."""
        with self._lock:
            return self.leases.end(lease_id)

    def reap(self, dead_owners: set[str]) -> list[Lease]:
        """End leases that have expired or whose client is gone; returns them."""
        with self._lock:
            ended = [self.leases.end(lease.id) for lease in self.leases.expired()]
            for owner in dead_owners:
                ended += [self.leases.end(lease.id) for lease in self.leases.of_owner(owner)]
            return ended

    # --- making room --------------------------------------------------------------------------

    def weighs(self, name: str) -> bool:
        """Whether it matters here how many nodes use the block."""
        return self.host.has(name) or name in self._promotions

    def weigh(self, name: str, users: int) -> None:
        """So many nodes use the block from now on: it is worth more or less. Hold the lock."""
        if name in self._promotions:
            self._promotions[name].users = users
        self.host.weigh(name, users)

    def make_room(self, tier: str, nbytes: int) -> bool:
        """Move blocks of a tier one tier down until `nbytes` are free; False if that is not enough.

        Waits for the medium: do not hold the lock.
        """
        level = self.levels.named(tier)
        return level is None or self._io.run(self.levels.make_room(level, nbytes))

    def delete(self, names: list[str]) -> None:
        """Remove blocks that were dropped from every tier below and wait for it.

        Only one thread may delete and persist, so that a block which comes back at that moment is
        not deleted with its predecessor.
        """
        if names:
            self._io.run(self.levels.delete(names))

    def list_shared(self) -> dict[str, str]:
        """Blocks in a remote tier that several machines share, whoever put them, and the namespace
        of each. Waits for the engine."""
        return self._io.run(self.levels.list_shared())

    def doubt_shared(self, names: Iterable[str] | None) -> None:
        """Others may have removed these blocks, or any (None), from the shared remote tier: whoever
        saves one of them again puts it there again."""
        for tier in self.levels.shared():
            tier.doubt(names)

    def sure(self, names: Iterable[str]) -> bool:
        """Whether nobody can have removed any of these blocks from a shared remote tier."""
        return all(tier.sure(name) for tier in self.levels.shared() for name in names)

    def delete_shared(self, blocks: Mapping[str, str]) -> None:
        """Remove blocks (their namespaces, by name) that no machine needs from there; raises the
        first refusal."""
        self._io.run(self.levels.delete_shared(blocks))

    def purge(self, namespace: str, names: Sequence[str]) -> dict[str, KVShareError]:
        """Remove a namespace, of which `names` are known, from every tier, those too that other
        machines use; what refused and why.

        Its nodes are gone, and nobody leases or saves blocks of it.
        """
        with self._lock:
            held = self.pool.drop_namespace(namespace)
        return self._io.run(self.levels.purge(namespace, sorted({*names, *held}), shared=True))

    def purge_copies(
        self, namespace: str, names: Sequence[str], keep: Collection[str]
    ) -> dict[str, KVShareError]:
        """Remove this machine's copies of blocks of a namespace below the host, of which `names`
        are known, but for `keep`; what refused and why."""
        return self._io.run(self.levels.purge(namespace, names, shared=False, keep=keep))

    def names(self) -> set[str]:
        """Every block in any tier of this machine."""
        own = [level.tier.names() for level in self.levels if not level.shared]
        return set(self.host.names()).union(*own)

    def use(self) -> dict[str, TierUse]:
        """Bytes, budget and blocks of each tier, as far as they are counted. Never waits."""
        return {tier.name: tier.counted() for tier in self._tiers()}

    def report(self) -> dict[str, dict[str, Any]]:
        """`use` in plain types, and the trouble that each tier has had."""
        return {
            tier.name: msgspec.structs.asdict(tier.counted()) | tier.trouble()
            for tier in self._tiers()
        }

    def _tiers(self) -> list[Tier]:
        return [self.host, *(level.tier for level in self.levels)]

    def close(self) -> None:
        """Close every tier."""
        self._io.run(self.levels.close())
        self._io.run(self.host.close())
