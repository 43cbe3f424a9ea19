"""The one background job: garbage, what is too old, quotas, merges, and LanceDB's old versions.

It never makes a request wait: the lock is held for one chunk at a time, bytes are read and copied
outside it, and everything that is removed goes through the committer's queue.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from kvshare_store.commit.queue import Removal
from kvshare_store.commit.repository import Repository
from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError, MissError, MissingBlockError, StorageError
from kvshare_store.machines.shared_garbage import SharedGarbage
from kvshare_store.maintenance.empty_namespaces import EmptyNamespaces
from kvshare_store.nodes.merge import copy_rows, merged_node, wants_merge
from kvshare_store.nodes.node import Node
from kvshare_store.save.staging import block_sizes
from kvshare_store.tensors.frame import Block, block_name
from kvshare_store.threads import Supervised

log = logging.getLogger("kvshare")

_NAME = "kvshare-janitor"
_CHUNK = 64
"""Nodes or blocks removed, or looked at, in one go."""
_MERGES = 8
"""Nodes merged in one pass; the others wait for the next."""
_VERSIONS = 64
"""Versions of the catalogue after which a pass compacts it although it is in use."""
_TURN = 3
"""Passes after which another machine takes the upkeep of what is shared over."""
_MERGE_AGAIN_S, _MERGE_AGAIN_LATEST_S = 60.0, 86_400.0
"""When a merge that failed is tried again: after the first, twice that after the second, …"""
_SOURCES = 8
"""Blocks kept in memory while rows are gathered from them."""


class Collected(msgspec.Struct, frozen=True):
    """What a pass removed, or would remove."""

    nodes: int = 0
    """Nodes that nobody used for `ttl_seconds`, or that were over their namespace's quota."""
    blocks: int = 0
    """Blocks that no node uses any more."""
    bytes: int = 0
    """What those blocks took."""
    merged: int = 0
    versions: int = 0
    """Old versions of the catalogue, and with them the rows that were deleted since."""


class _Unmerged(NamedTuple):
    """How often a merge has failed, and when (monotonic) it is tried again."""

    times: int
    again: float


class Janitor:
    """One pass every `gc_seconds`, the first at once; `collect` makes one now."""

    def __init__(self, config: StoreConfig, repository: Repository, rewriter: Rewriter) -> None:
        self._config = config
        self._repository = repository
        self._nodes = repository.nodes
        self._blocks = repository.blocks
        self._queue = repository.queue
        self._uses = repository.uses
        self._rewriter = rewriter
        self._health = repository.metrics.health
        self._pass = threading.Lock()
        self._stop = threading.Event()
        self._seen_versions: dict[str, int] = {}
        """Old versions of each table when they were last counted."""
        self._unmerged: dict[str, _Unmerged] = {}
        """Nodes whose merge has failed."""
        self._shared = self._shared_garbage()
        self._empty = EmptyNamespaces(repository)
        self._thread: Supervised | None = None
        if config.gc_seconds:
            self._thread = Supervised(_NAME, self._run, self._health, self._stop)

    def reload(self, config: StoreConfig) -> None:
        """Go on by other settings; the pace stays."""
        self._config = config

    def _shared_garbage(self) -> SharedGarbage | None:
        repository = self._repository
        catalog, condemned = repository.catalog, repository.condemned
        if catalog is None or condemned is None:
            return None
        turn_s = _TURN * (self._config.gc_seconds or 60.0)
        return SharedGarbage(self._nodes, catalog, condemned, repository.machine, turn_s)

    def _run(self) -> None:
        if hasattr(os, "gettid"):  # on Linux niceness is a thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        while not self._stop.is_set():
            try:
                self.collect(patient=True)
                self._health.well(_NAME)
            except KVShareError as error:
                log.warning("kvshare: garbage was not collected: %s", error)
            self._stop.wait(self._config.gc_seconds)

    def close(self) -> None:
        """Stop after the step that is being done."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def collect(self, *, dry_run: bool = False, patient: bool = False) -> Collected:
        """One pass. `dry_run` only says what it would do; `patient` leaves the catalogue alone
        while it is written to, but not for ever."""
        with self._pass:
            if dry_run:
                return self._would_collect()
            self._nodes.remove_lost()
            if self._uses is not None:
                self._uses.exchange()
            nodes = self._remove_expired() + self._hold_quotas()
            self._done_so_far()
            blocks, nbytes = self._remove_orphans()
            merged = 0
            if self._shared is None or not patient or self._shared.my_turn():
                blocks += self._collect_shared(patient)
                merged = self._merge(patient)
            self._empty.collect(patient=patient)
            return Collected(nodes, blocks, nbytes, merged, self._compact(patient))

    def _collect_shared(self, patient: bool) -> int:
        if self._shared is None:
            return 0
        return self._shared.collect(patient=patient, stopped=self._stop.is_set)

    def _would_collect(self) -> Collected:
        with self._nodes.lock:
            expired = set(self._expired())
        tree = self._nodes.tree
        names = {name for i in expired if (node := tree.get(i)) for name in node.blocks}
        freed = [name for name in names if tree.users(name) <= expired]
        gone = [*self._orphans(), *freed]
        return Collected(
            len(expired),
            len(gone),
            sum(map(self._blocks.size_of, gone)),
            len(self._scattered()),
            sum(self._versions().values()),
        )

    # --- nodes -------------------------------------------------------------------------------

    def _ttl(self) -> float:
        """Of other machines' uses the latest may not be written down yet."""
        late = self._uses.period if self._repository.shared and self._uses else 0.0
        return self._config.ttl_seconds + late

    def _expired(self) -> list[str]:
        return self._nodes.tree.idle(self._ttl()) if self._config.ttl_seconds else []

    def _remove_expired(self) -> int:
        with self._nodes.lock:
            expired = self._expired()
        return sum(self._remove_idle(chunk) for chunk in self._chunks(expired))

    def _remove_idle(self, ids: Sequence[str]) -> int:
        with self._nodes.lock:  # one may have been used since
            still = [i for i in ids if self._nodes.tree.idle_for(i) >= self._ttl()]
            self._nodes.remove(still)
        return len(still)

    def _hold_quotas(self) -> int:
        """A quota may be new, or smaller than it was when the nodes were saved."""
        with self._nodes.lock:
            namespaces = self._nodes.tree.namespaces()
        return sum(self._nodes.hold_quota(namespace) for namespace in namespaces)

    # --- blocks ------------------------------------------------------------------------------

    def _orphans(self) -> list[str]:
        """Blocks of this machine's tiers that no node uses and no lease holds.

        A block gets its name and its node in one step under the lock, so what was saved and is not
        committed yet is none of them; nor are slots that are being filled: they have no name.
        """
        found: list[str] = []
        for names in self._chunks(list(self._blocks.names())):
            with self._nodes.lock:
                found += [name for name in names if self._is_orphan(name)]
        return found

    def _is_orphan(self, name: str) -> bool:
        return not self._nodes.tree.uses(name) and not self._blocks.leases.pinned(name)

    def _remove_orphans(self) -> tuple[int, int]:
        """How many, and their bytes. The committer looks once more whether they are in use."""
        orphans = self._orphans()
        nbytes = sum(map(self._blocks.size_of, orphans))
        for chunk in self._chunks(orphans):
            self._queue.put(Removal((), tuple(chunk)))
            self._done_so_far()
        return len(orphans), nbytes

    def _done_so_far(self) -> None:
        """Wait for the committer, however busy it is kept."""
        self._queue.run(lambda: None)

    def _chunks(self, items: Sequence[str]) -> Iterator[Sequence[str]]:
        for start in range(0, len(items), _CHUNK):
            if self._stop.is_set():
                return
            yield items[start : start + _CHUNK]

    # --- merges ------------------------------------------------------------------------------

    def _scattered(self) -> list[Node]:
        """Nodes to merge, the one used last first."""
        config, tree = self._config, self._nodes.tree
        limits = config.block_tokens, config.max_chain, config.max_scatter
        with self._nodes.lock:
            nodes = list(tree)[::-1]
        found: list[Node] = []
        for start in range(0, len(nodes), _CHUNK):
            with self._nodes.lock:
                some = nodes[start : start + _CHUNK]
                found += [n for n in some if n.id in tree and wants_merge(n, tree, *limits)]
        return found

    def _merge(self, patient: bool) -> int:
        merged = 0
        for node in self._mergeable(patient)[:_MERGES]:
            if self._stop.is_set():
                break
            try:
                merged += self._merge_one(node)
                self._unmerged.pop(node.id, None)
            except KVShareError as error:  # rows that are gone or lossy, no room, or a refusal
                self._postpone(node)
                level = logging.INFO if isinstance(error, MissError) else logging.WARNING
                log.log(level, "kvshare: node %s was not merged: %s", node.id[:12], error)
        return merged

    def _mergeable(self, patient: bool) -> list[Node]:
        """Nodes to merge; those whose merge has failed last, or, in a patient pass, later."""
        nodes, now = self._scattered(), time.monotonic()
        ids = {node.id for node in nodes}
        self._unmerged = {i: failed for i, failed in self._unmerged.items() if i in ids}
        later = {i for i, failed in self._unmerged.items() if failed.again > now}
        last = [] if patient else [node for node in nodes if node.id in later]
        return [node for node in nodes if node.id not in later] + last

    def _postpone(self, node: Node) -> None:
        times = self._unmerged[node.id].times + 1 if node.id in self._unmerged else 1
        pause = min(_MERGE_AGAIN_S * 2.0 ** (times - 1), _MERGE_AGAIN_LATEST_S)
        self._unmerged[node.id] = _Unmerged(times, time.monotonic() + pause)

    def _merge_one(self, node: Node) -> bool:
        namespace = self._nodes.namespaces.get(node.namespace)
        if namespace is None:
            return False
        step, row_bytes = self._config.block_tokens, namespace.layout.row_bytes
        sizes = [rows * row_bytes for rows in block_sizes(node.length, step)]
        names = self._gather(node, sizes, step)
        if not names:
            return False
        merged = merged_node(node, names, sizes, step)
        return self._rewriter.swap(node, merged)

    def _gather(self, node: Node, sizes: Sequence[int], step: int) -> list[str]:
        """Copy the node's rows into new blocks of the host tier; their names, in order."""
        read = functools.lru_cache(_SOURCES)(self._read)
        names: list[str] = []
        try:
            for start, nbytes in zip(range(0, node.length, step), sizes, strict=True):
                stop = min(start + step, node.length)
                names.append(self._copied(node, start, stop, nbytes, read))
        except KVShareError:
            self._nodes.remove_unused(names)
            raise
        return names

    def _copied(
        self, node: Node, start: int, stop: int, nbytes: int, read: Callable[[str], Block]
    ) -> str:
        pool, offset = self._blocks.pool, self._nodes.reserve(nbytes)
        try:
            block = copy_rows(node, start, stop, read, pool.reserved(offset))
            name = block_name(block)
            pool.seal(offset, name, block)
        finally:
            pool.cancel(offset)  # nothing, once it is sealed
        return name

    def _read(self, name: str) -> Block:
        """As `BlockStore.read`; a block that is gone or bad takes its nodes along."""
        try:
            block = self._blocks.read(name)
        except MissError:
            self._nodes.remove_lost([name])
            raise
        if block.lossy:  # under a new name nobody would know that they were changed
            raise MissingBlockError(f"of block {name[:12]} there are only lossy rows")
        return block

    # --- the catalogue -----------------------------------------------------------------------

    def _versions(self) -> dict[str, int]:
        catalog = self._repository.catalog
        return catalog.old_versions() if catalog is not None else {}

    def _compact(self, patient: bool) -> int:
        """Drop old versions, table by table; a patient pass waits until nobody has written to a
        table since the last one."""
        catalog, uses = self._repository.catalog, self._uses
        if catalog is None or self._stop.is_set():
            return 0
        try:
            if uses is not None:
                uses.prune()
            self._repository.queue.run(self._repository.durable.room.hold_budget)
            seen, self._seen_versions = self._seen_versions, self._versions()
            due = {name: old for name, old in self._seen_versions.items() if old}
            if patient:
                due = {n: old for n, old in due.items() if old == seen.get(n) or old >= _VERSIONS}
            if due:
                catalog.compact(due)
                self._seen_versions = self._versions()
        except StorageError as error:
            if not self._repository.shared:
                raise
            log.info("kvshare: another machine compacts the catalogue: %s", error)
            return 0
        return sum(due.values())
