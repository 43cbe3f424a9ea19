"""What happens to a node after its rows are in the host tier: bytes, then metadata, off the path.

One thread: the blocks of a batch become durable, then its node rows are committed together; node
rows are removed before their blocks. docs/design/ordering.md says what a crash leaves after each.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple, TypeVar

from kvshare_store.errors import InternalError, KVShareError, StorageError
from kvshare_store.threads import STORING, Health, Supervised
from kvshare_store.tree.catalog import Catalog, Vectors
from kvshare_store.tree.node import Node

log = logging.getLogger("kvshare")

T = TypeVar("T")

_BATCH = 64
"""Pieces of work taken at once: their blocks are written side by side, their rows in one commit."""


class Addition(NamedTuple):
    """A node to make durable."""

    node: Node
    vectors: Vectors


class Removal(NamedTuple):
    """Nodes to forget, then the blocks that nobody else uses. With `stamps`, only rows that have
    one of these: in a shared catalogue another machine may have written a new one."""

    nodes: tuple[str, ...]
    blocks: tuple[str, ...]
    stamps: tuple[int, ...] = ()


class Errand(NamedTuple):
    """Anything else that must happen in this thread, and who waits for it."""

    run: Callable[[], Any]
    done: Future[Any]


Work = Addition | Removal | Errand


class Committer:
    """Does its work in the order in which it was ordered."""

    def __init__(
        self,
        catalog: Catalog | None,
        make_durable: Callable[[Sequence[Node]], list[KVShareError | None]],
        delete_blocks: Callable[[list[str]], None],
        failed: Callable[[Node, KVShareError], None],
        health: Health,
        committed: Callable[[Sequence[Node], set[str]], None] = lambda nodes, known: None,
    ) -> None:
        self._catalog = catalog
        self._make_durable = make_durable
        self._delete_blocks = delete_blocks
        self._failed = failed
        self._committed = committed
        self._queue: queue.Queue[Work | None] = queue.Queue()
        self._health = health
        self._thread = Supervised(STORING, self._run, health)

    def order(self, work: Work) -> None:
        """Queue one piece of work."""
        self._queue.put(work)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Queue a function; the future has what it returns or raises."""
        done: Future[T] = Future()
        self.order(Errand(function, done))
        return done

    def run(self, function: Callable[[], T]) -> T:
        """Queue a function and wait for it; `StorageError` if nobody will ever do it."""
        done = self.call(function)
        while not wait([done], 1.0).done:
            self._check_alive()
        return done.result()

    def flush(self) -> None:
        """Return once everything ordered so far is done; `StorageError` if nobody is doing it."""
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks:
                self._check_alive()
                self._queue.all_tasks_done.wait(1.0)

    def _check_alive(self) -> None:
        if not self._thread.alive:
            raise StorageError("nothing is made durable any more: restart the store")

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
                self._attempt([work for work in batch if work is not None])
            finally:
                for _ in batch:
                    self._queue.task_done()
            if None in batch:
                return

    def _take(self) -> list[Work | None]:
        batch = [self._queue.get()]
        while len(batch) < _BATCH and batch[-1] is not None:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _attempt(self, batch: list[Work]) -> None:
        """Do it. After an error that nobody expected each piece is tried alone: one that cannot be
        done is given up, and takes no other along. What was done before is done once more, which
        changes nothing."""
        try:
            self._do(batch)
            if any(isinstance(work, Addition) for work in batch):
                self._health.well(STORING)
        except BaseException as error:  # a panic of a library is no Exception
            log.exception("kvshare: %d pieces of work failed", len(batch))
            self._health.failed(STORING, error)
            if len(batch) == 1:
                self._give_up(batch[0], InternalError(f"{type(error).__name__}: {error}"))
                return
            for work in batch:
                self._attempt([work])

    def _give_up(self, work: Work, error: InternalError) -> None:
        if not isinstance(work, Addition):
            return
        try:
            self._failed(work.node, error)
        except BaseException:  # the rest of the batch must not suffer
            log.exception("kvshare: node %s could not be given up", work.node.id[:12])

    def _do(self, batch: list[Work]) -> None:
        """What can be done in one go is: additions first, or a node that takes another's place
        could be lost with it. Only one that comes back waits until its predecessor is gone."""
        additions: list[Addition] = []
        removals: list[Removal] = []
        for work in batch:
            if isinstance(work, Removal):
                removals.append(work)
                continue
            if isinstance(work, Errand) or any(work.node.id in gone.nodes for gone in removals):
                self._add(additions)
                self._remove(removals)
                additions, removals = [], []
            if isinstance(work, Addition):
                additions.append(work)
            else:
                _do_errand(work)
        self._add(additions)
        self._remove(removals)

    def _add(self, additions: list[Addition]) -> None:
        if not additions:
            return
        durable = []
        ended = self._make_durable([addition.node for addition in additions])
        for addition, error in zip(additions, ended, strict=True):
            if error is not None:
                self._failed(addition.node, error)
            else:
                durable.append(addition)
        if self._catalog is None or not durable:
            return
        try:
            known = self._catalog.add(durable)
        except KVShareError as error:
            for addition in durable:
                self._failed(addition.node, error)
        else:
            self._committed([addition.node for addition in durable], known)

    def _remove(self, removals: list[Removal]) -> None:
        if not removals:
            return
        blocks = [block for removal in removals for block in removal.blocks]
        try:
            self._remove_rows([removal for removal in removals if removal.nodes])
            self._delete_blocks(list(dict.fromkeys(blocks)))
        except KVShareError as error:
            log.warning("kvshare: removal left garbage behind: %s", error)

    def _remove_rows(self, removals: list[Removal]) -> None:
        """In one commit; those that say which form of a row they mean, in another."""
        if self._catalog is None:
            return
        for some in ([r for r in removals if not r.stamps], [r for r in removals if r.stamps]):
            if some:
                nodes = [node for removal in some for node in removal.nodes]
                self._catalog.delete(nodes, [stamp for r in some for stamp in r.stamps])


def _do_errand(errand: Errand) -> None:
    if errand.done.done():
        return
    try:
        errand.done.set_result(errand.run())
    except BaseException as error:  # noqa: BLE001 - whoever waits for it deals with it
        errand.done.set_exception(error)
