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

from kvshare_store.errors import (
    ClaimedBlockError,
    InternalError,
    KVShareError,
    MissError,
    NoSpaceError,
    OverloadError,
    StorageError,
)
from kvshare_store.threads import STORING, Health, Supervised
from kvshare_store.tree.catalog import Catalog, Vectors
from kvshare_store.tree.node import Node

log = logging.getLogger("kvshare")

T = TypeVar("T")

_BATCH = 64
"""Pieces of work taken at once: their blocks are written side by side, their rows in one commit."""
_MOST_WAITING = 512
"""Pieces of work that wait. Beyond that saves wait, or what `flush` waits for had no bound."""
_SHOWN = 200
"""Letters of an error: LanceDB's are long."""
_PATIENCE_S = 1.0
"""How long a save waits for that."""


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
        committed: Callable[
            [Sequence[Node], set[str]], list[KVShareError | None]
        ] = lambda nodes, known: [None] * len(nodes),
    ) -> None:
        """`make_durable` and `committed` (rows are there, of `known` nodes another machine's) say
        for each node what went wrong, or None; `failed` hears of each node that is given up."""
        self._catalog = catalog
        self._make_durable = make_durable
        self._delete_blocks = delete_blocks
        self._failed = failed
        self._committed = committed
        self._queue: queue.Queue[Work | None] = queue.Queue()
        self._taken = threading.Condition()
        self._follow_ups = 0
        """Pieces of work that others have led to."""
        self._health = health
        self.failures = 0
        """Nodes so far that storage refused, for want of anything but room."""
        self._last = ""
        """Why, of the last one."""
        self._thread = Supervised(STORING, self._run, health)

    def order(self, work: Work) -> None:
        """Queue one piece of work."""
        if threading.current_thread().name == STORING:
            self._follow_ups += 1
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

    def settle(self) -> None:
        """Return once everything ordered so far is done, and what that ordered in its turn."""
        before = self._follow_ups
        self.run(lambda: None)
        if self._follow_ups != before:
            self.run(lambda: None)

    def flush(self, since: int | None = None) -> None:
        """`settle`, then `StorageError` if storage refuses nodes, or has refused one since there
        were `since` `failures` (None: since now)."""
        before = self.failures if since is None else since
        self.settle()
        lost = self.failures - before
        if lost or self._health.failing(STORING):
            raise StorageError(
                f"{lost or 'the last'} prompts were not stored and are forgotten: {self._last}. "
                "See to the home's disk and its catalogue, restart the store, and save them again"
            )

    def admit(self) -> None:
        """Wait until there is room for one more save; `OverloadError` after a second. Do not hold
        the shelf's lock: what is waited for may need it."""
        with self._taken:
            if self._taken.wait_for(lambda: self._queue.qsize() < _MOST_WAITING, _PATIENCE_S):
                return
        raise OverloadError(
            f"{self._queue.qsize():,} prompts wait to be made durable; save more slowly"
        )

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
            self._attempt([work for work in batch if work is not None])
            if None in batch:
                return

    def _take(self) -> list[Work | None]:
        batch = [self._queue.get()]
        while len(batch) < _BATCH and batch[-1] is not None:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        with self._taken:
            self._taken.notify_all()
        return batch

    def _attempt(self, batch: list[Work]) -> None:
        """Do it. After an error that nobody expected each piece is tried alone: one that cannot be
        done is given up, and takes no other along. What was done before is done once more, which
        changes nothing."""
        try:
            self._do(batch)
        except BaseException as error:  # a panic of a library is no Exception
            log.exception("kvshare: %d pieces of work failed", len(batch))
            if len(batch) == 1:
                self._health.failed(STORING, error)
                self._give_up(batch[0], InternalError(f"{type(error).__name__}: {error}"))
                return
            for work in batch:
                self._attempt([work])

    def _give_up(self, work: Work, error: InternalError) -> None:
        if not isinstance(work, Addition):
            return
        try:
            self._fail(work.node, error)
        except BaseException:  # the rest of the batch must not suffer
            log.exception("kvshare: node %s could not be given up", work.node.id[:12])

    def _fail(self, node: Node, error: KVShareError) -> None:
        if _is_refusal(error):
            self.failures += 1
            self._last = str(error)[:_SHOWN]
        self._failed(node, error)

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
        ended = self._stored(additions)
        for addition, error in zip(additions, ended, strict=True):
            if error is not None:
                self._fail(addition.node, error)
        refusal = next((error for error in ended if error and _is_refusal(error)), None)
        if None in ended:
            self._health.well(STORING)
        elif refusal is not None:
            text = str(refusal)[:_SHOWN]
            log.warning("kvshare: %d prompts were not stored: %s", len(ended), text)
            self._health.failed(STORING, refusal)

    def _stored(self, additions: Sequence[Addition]) -> list[KVShareError | None]:
        """Blocks, then rows; for each node what went wrong, or None."""
        ended = self._make_durable([addition.node for addition in additions])
        durable = [at for at, error in enumerate(ended) if error is None]
        if self._catalog is None or not durable:
            return ended
        nodes = [additions[at].node for at in durable]
        try:
            known = self._catalog.add([additions[at] for at in durable])
            confirmed = self._committed(nodes, known)
        except KVShareError as error:
            confirmed = [error] * len(durable)
        for at, outcome in zip(durable, confirmed, strict=True):
            ended[at] = outcome
        return ended

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


def _is_refusal(error: KVShareError) -> bool:
    """Whether storage has refused what it should take. A node that left before it was durable and
    a budget that is full are nothing of that kind."""
    return not isinstance(error, MissError | NoSpaceError | ClaimedBlockError)


def _do_errand(errand: Errand) -> None:
    if errand.done.done():
        return
    try:
        errand.done.set_result(errand.run())
    except BaseException as error:  # noqa: BLE001 - whoever waits for it deals with it
        errand.done.set_exception(error)
