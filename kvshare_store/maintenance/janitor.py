"""The one background job: garbage, expired nodes, quotas, merges, old versions of the catalogue.

It never makes a request wait. It holds the lock for one chunk at a time and reads and copies bytes
without it. Everything that it removes goes through the committer's queue.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from itertools import takewhile

import msgspec

from kvshare_store.bounded import pieces_with_pauses
from kvshare_store.commit.queue import Removal
from kvshare_store.commit.repository import Repository
from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError, StorageError
from kvshare_store.maintenance.empty_namespaces import EmptyNamespaces
from kvshare_store.maintenance.merging import Merger
from kvshare_store.maintenance.shared_garbage import SharedGarbage
from kvshare_store.observability.threads import Supervised, be_nice

log = logging.getLogger("kvshare")

_NAME = "kvshare-janitor"
_CHUNK = 64
"""Nodes or blocks handled under the lock in one go."""
_VERSIONS = 64
"""Versions after which a pass compacts a table that is in use."""
_TURN = 3
"""Passes after which another machine takes over the work on what is shared."""


class Collected(msgspec.Struct, frozen=True):
    """What a pass removed, or would remove."""

    nodes: int = 0
    """Nodes that nobody used for `ttl_seconds`, or that were over their namespace's quota."""
    blocks: int = 0
    """Blocks that no node uses any more."""
    bytes: int = 0
    """Bytes of these blocks."""
    merged: int = 0
    versions: int = 0
    """Old versions of the catalogue, and with them the rows that were deleted since."""


class Janitor:
    """One pass every `gc_seconds`, the first at once; `collect` makes one now."""

    def __init__(self, config: StoreConfig, repository: Repository, rewriter: Rewriter) -> None:
        self._config = config
        self._repository = repository
        self._nodes = repository.nodes
        self._blocks = repository.blocks
        self._queue = repository.queue
        self._uses = repository.uses
        self._health = repository.metrics.health
        self._pass = threading.Lock()
        self._stop = threading.Event()
        self._seen_versions: dict[str, int] = {}
        """Old versions of each table when they were last counted."""
        self.shared = self._shared_garbage()
        self._empty = EmptyNamespaces(repository)
        self.merger = Merger(config, self._nodes, rewriter)
        self._thread: Supervised | None = None
        if config.gc_seconds:
            self._thread = Supervised(_NAME, self._run, self._health, self._stop)

    def reload(self, config: StoreConfig) -> None:
        """Go on by other settings; the pace stays."""
        self._config = config
        self.merger.reload(config)

    def _shared_garbage(self) -> SharedGarbage | None:
        repository = self._repository
        catalog, condemned = repository.catalog, repository.condemned
        if catalog is None or condemned is None:
            return None
        turn_s = _TURN * (self._config.gc_seconds or 60.0)
        return SharedGarbage(self._nodes, catalog, condemned, repository.machine, turn_s)

    def _run(self) -> None:
        be_nice(15)
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
        """One pass. `dry_run` only says what it would do. `patient` does not compact tables that
        are being written to, unless they have many old versions."""
        with self._pass:
            if dry_run:
                return self._would_collect()
            self._nodes.remove_lost()
            if self._uses is not None:
                self._uses.exchange()
            nodes = self._remove_expired() + self._hold_quotas()
            self._done_so_far()
            blocks, nbytes = self._remove_garbage()
            merged = 0
            if self.shared is None or not patient or self.shared.my_turn():
                blocks += self._collect_shared(patient)
                merged = self.merger.merge(patient=patient, stopped=self._stop.is_set)
            self._empty.collect(patient=patient)
            return Collected(nodes, blocks, nbytes, merged, self._compact(patient))

    def _collect_shared(self, patient: bool) -> int:
        if self.shared is None:
            return 0
        return self.shared.collect(patient=patient, stopped=self._stop.is_set)

    def _would_collect(self) -> Collected:
        with self._nodes.lock:
            expired = set(self._expired())
        tree = self._nodes.tree
        names = {name for i in expired if (node := tree.get(i)) for name in node.blocks}
        freed = [name for name in names if tree.users(name) <= expired]
        gone = [*self._garbage(), *freed]
        return Collected(
            len(expired),
            len(gone),
            sum(map(self._blocks.size_of, gone)),
            len(self.merger.scattered()),
            sum(self._versions().values()),
        )

    # --- nodes -------------------------------------------------------------------------------

    def _ttl(self) -> float:
        """The latest uses of other machines may not be written down yet."""
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
        """Quotas may be new, or smaller than when the nodes were saved."""
        with self._nodes.lock:
            namespaces = self._nodes.tree.namespaces()
        return sum(map(self._hold_quota, namespaces))

    def _hold_quota(self, namespace: str) -> int:
        total = 0
        while not self._stop.is_set() and (gone := self._nodes.hold_quota(namespace)):
            total += gone
        return total

    # --- blocks ------------------------------------------------------------------------------

    def _garbage(self) -> list[str]:
        """Blocks of this machine's tiers that no node uses and no lease holds.

        A block gets its name and its node in one step under the lock. So blocks that were saved and
        are not committed yet are not among them, nor are slots that are being filled: they have no
        name yet.
        """
        found: list[str] = []
        for names in self._chunks(list(self._blocks.names())):
            with self._nodes.lock:
                found += [name for name in names if self._is_garbage(name)]
        return found

    def _is_garbage(self, name: str) -> bool:
        return not self._nodes.tree.uses(name) and not self._blocks.leases.pinned(name)

    def _remove_garbage(self) -> tuple[int, int]:
        """Remove garbage; returns the number of blocks and their bytes. The committer checks once
        more whether a block is in use."""
        garbage = self._garbage()
        nbytes = sum(map(self._blocks.size_of, garbage))
        for chunk in self._chunks(garbage):
            self._queue.put(Removal((), tuple(chunk)))
            self._done_so_far()
        return len(garbage), nbytes

    def _done_so_far(self) -> None:
        """Wait until the committer has done what was queued so far, and not for what follows."""
        self._queue.run(lambda: None)

    def _chunks(self, items: Sequence[str]) -> Iterator[Sequence[str]]:
        return takewhile(lambda _: not self._stop.is_set(), pieces_with_pauses(items, _CHUNK))

    # --- the catalogue -----------------------------------------------------------------------

    def _versions(self) -> dict[str, int]:
        catalog = self._repository.catalog
        return catalog.old_versions() if catalog is not None else {}

    def _compact(self, patient: bool) -> int:
        """Drop old versions, table by table. A patient pass skips a table that was written to since
        the last pass."""
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
