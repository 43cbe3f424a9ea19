"""Content-addressed blocks through the tiers: persist, read, lease, promote, delete, purge.

All bookkeeping happens under one lock that the Store shares; whatever waits for a medium happens
outside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from kvshare_store.blocks.io_loop import IoLoop
from kvshare_store.blocks.leases import Lease, LeaseBook
from kvshare_store.blocks.levels import Level, Levels
from kvshare_store.blocks.pool import BufferPool
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.errors import KVShareError, LeaseError, MissError, NoSpaceError
from kvshare_store.observability.metrics import Metrics
from kvshare_store.plan import BlockRef
from kvshare_store.tensors.frame import Block


class _Promotion(msgspec.Struct):
    """A block on its way into the host tier."""

    done: Future[None]
    users: int
    """Number of nodes that use it. If it is 0 and no lease holds the block, it need not come."""


class BlockStore:
    """Maps names to rows. It knows no nodes: the caller reports how many nodes use a block
    (`weigh`), and asks which blocks have left their last tier (`BufferPool.take_lost`)."""

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
        """The blocks that plans and clients hold."""
        return self.pool.leases

    # --- writing ------------------------------------------------------------------------------

    def persist(self, names: Sequence[str]) -> None:
        """Wait until every block is durable. Raises the first error; the other blocks may be
        durable."""
        if not self.levels:
            return
        with self.pool.persisting(names):
            self._io.run(self.levels.persist(list(dict.fromkeys(names)), self.host.peek))

    # --- reading ------------------------------------------------------------------------------

    def tier_of(self, name: str) -> str | None:
        """The fastest tier that holds the block, or None."""
        if self.host.has(name):
            return self.host.name
        level = self.pool.holder(name)
        return None if level is None else level.tier.name

    def size_of(self, name: str) -> int:
        """Bytes of a block in the fastest tier that has it; 0 if no tier has it."""
        level = self.levels.holder(name)
        return self.host.size(name) or (level and level.tier.size(name)) or 0

    def expect(self, names: Sequence[str], namespace: str) -> bool:
        """A node that was committed elsewhere, or before a restart, uses these blocks. A block that
        no tier of this machine has must be in a tier that other machines use too; False if there is
        no such tier."""
        absent = self.absent(names)
        for level in self.levels:
            absent = [name for name in absent if not level.has(name)]
        remotes = [level.remote for level in self.levels if level.remote is not None]
        for name in absent:
            for remote in remotes:
                remote.expect(name, namespace, 0)
        return not absent or bool(remotes)

    def absent(self, names: Iterable[str]) -> list[str]:
        """The given blocks that are not in the host."""
        return self.host.absent(names)

    def read(self, name: str) -> Block:
        """A copy of a block, verified if it comes from below the host. Raises `MissingBlockError`,
        or the error of the tier. Waits for the medium: do not hold the lock."""
        while True:
            with self._lock:
                ref = self.host.ref(name)
                if ref is None:
                    break
                block = self.host.peek(name)
            copied = bytes(block.data)  # checked by its label, as by any reader
            with contextlib.suppress(LeaseError):
                self.host.arena.check(ref)
                return msgspec.structs.replace(block, data=copied)
        return self._io.run(self.levels.get(name))[0]

    def copies_below(self, name: str) -> Iterator[tuple[str, Block | KVShareError]]:
        """Each tier below host that has the block and is this machine's own, with the verified
        block, or with the tier's error. Do not hold the lock."""
        for level in self.levels:
            if level.shared or not level.has(name):
                continue
            try:
                yield level.tier.name, self._io.run(level.tier.get(name))
            except KVShareError as error:
                yield level.tier.name, error

    def lease_soon(
        self,
        names: Sequence[str],
        users: Mapping[str, int],
        owner: str,
        seconds: float,
        timeout: float,
    ) -> Future[tuple[Lease, dict[str, BlockRef]]]:
        """Pin blocks now and bring them into the arena, without waiting in the caller's thread.

        `users`: how many nodes use each of the blocks that are not in the host (`absent`). The
        future has the lease, and the place of each block that is in the host after at most
        `timeout` seconds; later promotions continue for the next request. The future is done on
        return if every block is in the host already; otherwise it is completed in the I/O loop.
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
            for name in lease.names if self.levels else ():
                self.levels.touch(name)
            return lease, self.host.used(lease.names)

    def _promote(self, name: str, users: int) -> Future[None]:
        """Bring one block from below into the host; requests for the same block share one read."""
        running = self._promotions.get(name)
        if running is None:
            running = _Promotion(self._io.submit(self._fetch(name)), users)
            self._promotions[name] = running
        return running.done

    async def _fetch(self, name: str) -> None:
        try:
            block, level = await self.levels.get(name)
            self._place(name, block, level.tier.name)
            self._io.submit(self.levels.fill(name, block, level))  # waiters have its rows
        except MissError:  # counted where it happened
            with self._lock:
                if self.host.size(name) is None:
                    self.pool.lose(name)
        except KVShareError:
            pass  # counted; the block may be there for the next request
        finally:
            with self._lock:
                self._promotions.pop(name, None)

    def _place(self, name: str, block: Block, source: str) -> None:
        """Copy a block from the tier `source` into the host, if it is still needed there.

        The copy is made without the lock: a slot that is reserved and has no name belongs to the
        thread that fills it.
        """
        nbytes = len(block.data)
        with self._lock:
            if not self._lacks(name):
                return
            try:
                slot = self.pool.allocate(nbytes)
            except NoSpaceError as error:
                self._metrics.error(error.kind)
                return
        self.pool.reserved(slot)[:] = block.data
        with self._lock:
            if self._lacks(name):
                self.pool.place(slot, name, block)
                self.host.weigh(name, self._users_of(name))
                self._metrics.moved(source, self.host.name, nbytes)
            else:
                self.pool.cancel(slot)

    def _lacks(self, name: str) -> bool:
        """Whether the block belongs into the host and is not there. Hold the lock."""
        wanted = self.leases.pinned(name) or self._users_of(name)
        return bool(wanted) and self.host.size(name) is None

    def _users_of(self, name: str) -> int:
        """Number of nodes that use a block which is on its way into the host."""
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
        """Whether the number of nodes that use a block matters here."""
        return self.host.has(name) or name in self._promotions

    def weigh(self, name: str, users: int) -> None:
        """From now on so many nodes use the block, which changes its value. Hold the lock."""
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
        """Remove blocks that `pool.drop` returned from every tier below, and wait for it.

        Only one thread may delete and persist, so that a block which returns at that moment is not
        deleted together with its predecessor.
        """
        try:
            if names:
                self._io.run(self.levels.delete(names))
        finally:
            self.pool.deleted()

    def list_shared(self) -> dict[str, str]:
        """Blocks in a remote tier that several machines share, of all machines, with the namespace
        of each. Waits for the engine."""
        return self._io.run(self.levels.list_shared())

    def doubt_shared(self, names: Iterable[str] | None) -> None:
        """Other machines may have removed these blocks (None: any blocks) from the shared remote
        tier. A save that uses one of them writes it there again."""
        for tier in self.levels.shared():
            tier.doubt(names)

    def sure(self, names: Iterable[str]) -> bool:
        """Whether none of these blocks can have been removed from a shared remote tier."""
        return all(tier.sure(name) for tier in self.levels.shared() for name in names)

    def delete_shared(self, blocks: Mapping[str, str]) -> None:
        """Remove blocks that no machine needs from the shared remote tier; raises the first
        refusal. `blocks`: their namespaces, by name."""
        self._io.run(self.levels.delete_shared(blocks))

    def purge(self, namespace: str, names: Sequence[str]) -> dict[str, KVShareError]:
        """Remove a namespace, of which `names` are known, from every tier, including those that
        other machines use. Returns which tiers refused, and why.

        Its nodes must be gone, and no lease or save may use its blocks.
        """
        with self._lock:
            held = self.pool.drop_namespace(namespace)
        return self._io.run(self.levels.purge(namespace, sorted({*names, *held}), shared=True))

    def purge_copies(
        self, namespace: str, names: Sequence[str], keep: Collection[str]
    ) -> dict[str, KVShareError]:
        """Remove this machine's copies of a namespace's blocks below the host, of which `names` are
        known, except `keep`. Returns which tiers refused, and why."""
        return self._io.run(self.levels.purge(namespace, names, shared=False, keep=keep))

    def names(self) -> set[str]:
        """Every block in any tier of this machine."""
        own = [level.tier.names() for level in self.levels if not level.shared]
        return set(self.host.names()).union(*own)

    def report(self) -> dict[str, dict[str, Any]]:
        """Bytes, budget and blocks of each tier, as far as they are known, and its errors, in plain
        types. Never waits."""
        tiers: list[Tier] = [self.host, *(level.tier for level in self.levels)]
        return {
            tier.name: msgspec.structs.asdict(tier.counted()) | tier.trouble() for tier in tiers
        }

    def close(self) -> None:
        """Close every tier."""
        self._io.run(self.levels.close())
        self._io.run(self.host.close())
