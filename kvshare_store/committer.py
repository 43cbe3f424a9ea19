"""What happens to a node after its rows are in the host tier: bytes, then metadata, off the path.

One thread, in order: blocks become durable, then node rows are committed in a batch; node rows are
removed before their blocks. docs/design/ordering.md says what a crash after each step leaves.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from kvshare_store.errors import KVShareError, StorageError
from kvshare_store.tree.catalog import Catalog, Vectors
from kvshare_store.tree.node import Node

log = logging.getLogger("kvshare")

_BATCH = 32
_COMPACT_EVERY = 64


class Addition(NamedTuple):
    """A node to make durable."""

    node: Node
    vectors: Vectors


class Removal(NamedTuple):
    """Nodes to forget, then the blocks that nobody else uses."""

    nodes: tuple[str, ...]
    blocks: tuple[str, ...]


class Committer:
    """Runs additions and removals in the order they were ordered."""

    def __init__(
        self,
        catalog: Catalog | None,
        make_durable: Callable[[Node], None],
        describe: Callable[[Addition], Addition],
        delete_blocks: Callable[[list[str]], None],
        failed: Callable[[Node, KVShareError], None],
    ) -> None:
        self._catalog = catalog
        self._make_durable = make_durable
        self._describe = describe
        self._delete_blocks = delete_blocks
        self._failed = failed
        self._queue: queue.Queue[Addition | Removal | None] = queue.Queue()
        self._commits = 0
        self._thread = threading.Thread(target=self._run, name="kvshare-commit", daemon=True)
        self._thread.start()

    def order(self, work: Addition | Removal) -> None:
        """Queue one piece of work."""
        self._queue.put(work)

    def flush(self) -> None:
        """Return once everything ordered so far is done; `StorageError` if nobody is doing it."""
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks:
                if not self._thread.is_alive():
                    raise StorageError("nothing is made durable any more: restart the store")
                self._queue.all_tasks_done.wait(1.0)

    def close(self) -> None:
        """Finish what is queued and stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        if hasattr(os, "gettid"):  # on Linux niceness is a thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            batch = self._take()
            try:
                self._do([work for work in batch if work is not None])
            finally:
                for _ in batch:
                    self._queue.task_done()
            if None in batch:
                return

    def _take(self) -> list[Addition | Removal | None]:
        batch = [self._queue.get()]
        while len(batch) < _BATCH and batch[-1] is not None:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _do(self, batch: list[Addition | Removal]) -> None:
        """Keep the order between additions and removals, and commit what touches in one go."""
        additions: list[Addition] = []
        for work in batch:
            if isinstance(work, Addition):
                additions.append(work)
            else:
                self._add(additions)
                additions = []
                self._remove(work)
        self._add(additions)

    def _add(self, additions: list[Addition]) -> None:
        durable = []
        for addition in additions:
            try:
                self._make_durable(addition.node)
                durable.append(self._describe(addition))
            except KVShareError as error:
                self._failed(addition.node, error)
        if self._catalog is None or not durable:
            return
        try:
            self._catalog.add(durable)
        except KVShareError as error:
            for addition in durable:
                self._failed(addition.node, error)
            return
        self._commits += 1
        if self._commits % _COMPACT_EVERY == 0:
            self._compact(self._catalog)

    def _compact(self, catalog: Catalog) -> None:
        try:
            catalog.compact()
        except KVShareError as error:
            log.warning("kvshare: the catalogue was not compacted: %s", error)

    def _remove(self, removal: Removal) -> None:
        try:
            if self._catalog is not None:
                self._catalog.delete(removal.nodes)
            self._delete_blocks(list(removal.blocks))
        except KVShareError as error:
            log.warning("kvshare: removal left garbage behind: %s", error)
