"""Several machines with one catalogue: each learns what others commit, and drops what they remove.

LanceDB's commits order the metadata. Each form of a row has a stamp. By the stamps a machine sees
which rows are new to it; whoever replaces or removes a row says which stamp is meant.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping

import numpy as np

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.faults import report
from kvshare_store.commit.repository import Repository
from kvshare_store.errors import KVShareError
from kvshare_store.maintenance.others_purges import OthersPurges
from kvshare_store.observability.threads import Supervised

log = logging.getLogger("kvshare")

_NAME = "kvshare-sync"
_SETTLED_S, _HEAL_S = 2.0, 60.0
"""Age of the nodes that are committed again when the catalogue has lost them."""
_OVERLAP_NS = 60 * 10**9
"""How far a stamp may lie behind that of a row committed earlier: the other machine may not have
known that row, and a save may wait for its commit. Stamps that are older still are found when all
stamps are read."""
_NO_STAMP = np.iinfo(np.int64).max
_REST = 50
"""Reading all stamps takes longer the more rows there are. It is repeated after this many times the
time that it took, …"""
_LONGEST_S = 5.0
"""… at the latest after this long if something is known to be missing, …"""
_EXPLAINED_S = 5.0
"""… and not before this long if nothing seems to be missing."""


class Sharing:
    """Asks a shared catalogue every `seconds` for changes. One thread; `close` stops it."""

    def __init__(
        self,
        catalog: Catalog,
        repository: Repository,
        seconds: float,
        purges: OthersPurges,
    ) -> None:
        self._catalog = catalog
        self._nodes = repository.nodes
        self._condemned = repository.condemned
        self._uses = repository.uses
        self._seconds = seconds
        self._metrics = metrics = repository.metrics
        self._purges = purges
        self._version = -1
        self._seen: dict[str, int] = {}
        """Stamps by id of the rows in the catalogue when it was last asked."""
        self._newest = 0
        self._rest = 0.0
        self._all_read = time.monotonic()
        """When all stamps were last read, and how long to wait before they are read again."""
        self._all_due = math.inf
        """When (monotonic seconds) all stamps must be read again; infinity while nothing has
        changed."""
        self._alone = threading.Lock()
        self._failing = False
        if not catalog.place.conditional:
            log.warning(
                "kvshare: %s has no conditional writes: of two commits at the same moment one is "
                "lost and repeated within %.0f s; removals may be lost as well, and blocks that no "
                "node uses stay in the remote",
                catalog.place, 2 * _SETTLED_S,
            )  # fmt: skip
        self._stop = threading.Event()
        self._thread = Supervised(_NAME, self._run, metrics.health, self._stop)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.sync()
                self._metrics.health.well(_NAME)
                self._failing = False
            except KVShareError as error:
                self._metrics.error(error.kind)
                if not self._failing:
                    log.warning("kvshare: the shared catalogue does not answer: %s", error)
                self._failing = True

    def sync(self) -> None:
        """Learn all changes since the last call; `StorageError` if the catalogue cannot be read."""
        with self._alone:
            if self._condemned is not None:
                self._condemned.look()
            if self._uses is not None and self._uses.due():
                self._uses.exchange()
            ours = self._catalog.take_changes()
            self._note(ours)  # first: what others make of it is seen below
            version = self._catalog.refresh()
            if version != self._version:
                first = self._version < 0  # which reads every stamp
                self._look_for_changes(explained=first or bool(ours))
                self._version = version
            if self._behind():
                self._must_read_all(min(self._rest, _LONGEST_S))
            if time.monotonic() >= self._all_due:
                self._look_at_all()
            self._purges.look()

    def _note(self, ours: Mapping[str, int | None]) -> None:
        for node_id, stamp in ours.items():
            if stamp is None:
                self._seen.pop(node_id, None)
            elif self._catalog.place.conditional:  # else another commit may have overwritten it
                self._seen[node_id] = stamp

    def _behind(self) -> bool:
        """Whether rows were removed, or were committed with an old stamp."""
        return self._catalog.count() != len(self._seen)

    def _look_for_changes(self, *, explained: bool) -> None:
        """Learn rows with new stamps. If they do not explain the table's new version, all stamps
        are read soon; otherwise they are read some time later."""
        recent = self._catalog.stamps(since=max(0, self._newest - _OVERLAP_NS))
        found = self._learn(recent)
        if (found or explained) and self._catalog.place.conditional:
            self._must_read_all(max(self._rest, _EXPLAINED_S))
        else:
            self._must_read_all(min(self._rest, _LONGEST_S))

    def _must_read_all(self, rest: float) -> None:
        """Read all stamps after this many seconds, unless they are due earlier."""
        self._all_due = min(self._all_due, self._all_read + rest)

    def _look_at_all(self) -> None:
        """Learn what was removed, and rows whose stamps are older than their commits."""
        begun, self._all_due = time.monotonic(), math.inf
        gone = self._removed()
        everything = None if gone is not None else self._catalog.stamps()
        if gone is None:
            gone = {i: stamp for i, stamp in self._seen.items() if i not in (everything or {})}
        if gone:
            self._nodes.learn_removals(gone)
            digests = self._catalog.records.digests()
            with self._nodes.lock:
                self._nodes.namespaces.keep_recorded(digests)
        for node_id in gone:
            del self._seen[node_id]
        if everything is not None:
            self._learn(everything)
            if not self._catalog.place.conditional:
                self._heal(everything)
        self._all_read = time.monotonic()
        self._rest = _REST * (self._all_read - begun)

    def _removed(self) -> dict[str, int] | None:
        """The rows that are gone, found by reading the column of stamps alone. None if something
        else has changed too, so that this column does not tell."""
        if not self._catalog.place.conditional:
            return None
        there = np.append(np.sort(self._catalog.all_stamps()), _NO_STAMP)
        seen = np.sort(np.fromiter(self._seen.values(), np.int64, len(self._seen)))
        here = there[there.searchsorted(seen)] == seen
        if np.count_nonzero(here) != len(there) - 1 or (seen[1:] == seen[:-1]).any():
            return None  # rows are new or changed, or several are of a release without stamps
        lost = set(seen[~here].tolist())
        return {i: stamp for i, stamp in self._seen.items() if stamp in lost} if lost else {}

    def _learn(self, stamps: dict[str, int]) -> int:
        """Read rows that are new or have a new stamp, and differ from what this machine has;
        returns how many have a stamp that was not seen before."""
        changed = [i for i, stamp in stamps.items() if self._seen.get(i) != stamp]
        unknown = [i for i in changed if not self._has(i, stamps[i])]
        if unknown:
            self._catalog.refresh()  # a commit of ours may have brought rows of new namespaces
            namespaces = self._catalog.records.read()
            used = self._uses.recorded(unknown) if self._uses is not None else {}
            rows = list(self._catalog.load(ids=unknown))
            self._nodes.learn(namespaces, rows, self._seen, used)
            report(self._catalog.take_faults(), self._metrics)
        self._seen |= stamps
        self._newest = max(self._newest, *stamps.values(), 0)
        return len(changed)

    def _has(self, node_id: str, stamp: int) -> bool:
        node = self._nodes.tree.get(node_id)
        return node is not None and node.stamp == stamp

    def _heal(self, stamps: dict[str, int]) -> None:
        """Commit nodes again that the catalogue has lost: without conditional writes, one of two
        commits at the same moment disappears."""
        with self._nodes.lock:
            nodes = [node for node in self._nodes.tree if node.id not in stamps]
        now = time.time()
        # a node that is still being written looks the same: committing it twice does no harm
        lost = [node for node in nodes if _SETTLED_S < now - node.created < _HEAL_S]
        if lost:
            log.info("kvshare: %d commits were overwritten and are repeated", len(lost))
            self._nodes.add_again(lost)

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        self._thread.join()
