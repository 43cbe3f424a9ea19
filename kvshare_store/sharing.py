"""Several machines, one catalogue: what others commit is learned, what they remove is forgotten.

LanceDB's commits order the metadata and rows are immutable, so nothing else has to be agreed on.
"""

from __future__ import annotations

import logging
import threading
import time

from kvshare_store.errors import KVShareError
from kvshare_store.metrics import Metrics
from kvshare_store.shelf import Shelf
from kvshare_store.threads import Supervised
from kvshare_store.tree.catalog import Catalog

log = logging.getLogger("kvshare")

_NAME = "kvshare-sync"
_SETTLED_S, _HEAL_S = 2.0, 60.0
"""Age of the nodes that are committed again when the catalogue has lost them."""


class Sharing:
    """Asks a shared catalogue every `seconds` what has changed. One thread; `close` stops it."""

    def __init__(self, catalog: Catalog, shelf: Shelf, seconds: float, metrics: Metrics) -> None:
        self._catalog = catalog
        self._shelf = shelf
        self._seconds = seconds
        self._metrics = metrics
        self._version = -1
        self._seen: set[str] = set()
        """Ids that the catalogue held when it was last asked, and what was committed since."""
        self._failing = False
        if not catalog.place.conditional:
            log.warning(
                "kvshare: %s has no conditional writes: of two commits at the same moment one is "
                "lost and repeated within %.0f s; removals may be lost as well",
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
        """Learn and forget what has changed since the last time; `StorageError` if it refuses."""
        ours = self._catalog.take_changes()  # first: what others do of it meanwhile is seen below
        self._seen -= ours.removed
        if self._catalog.place.conditional:  # else one that is missing may have been overwritten
            self._seen |= ours.added
        version = self._catalog.refresh()
        if version == self._version and not (ours.added or ours.removed):
            return
        ids = set(dict(self._catalog.ids()))
        self._shelf.unlearn(self._seen - ids)
        namespaces = self._catalog.namespaces()
        self._shelf.keep_registered({namespace.digest for namespace in namespaces})
        unknown = [node_id for node_id in ids - self._seen if node_id not in self._shelf.tree]
        if unknown:
            self._shelf.learn(namespaces, self._catalog.load(ids=unknown))
        self._seen, self._version = ids, version
        if not self._catalog.place.conditional:
            self._heal(ids)

    def _heal(self, ids: set[str]) -> None:
        """Without conditional writes two commits at the same moment leave one of them."""
        with self._shelf.lock:
            nodes = [node for node in self._shelf.tree if node.id not in ids]
        now = time.time()
        # a node that is still being written looks the same: committing it twice does no harm
        lost = [node for node in nodes if _SETTLED_S < now - node.created < _HEAL_S]
        if lost:
            log.info("kvshare: %d commits were overwritten and are repeated", len(lost))
            self._shelf.commit_again(lost)

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        self._thread.join()
