"""Work to be made durable or removed, in the order in which it was queued."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple, TypeVar

from kvshare_store.errors import KVShareError, OverloadError, StorageError
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import Vectors
from kvshare_store.observability.threads import STORING, Health

T = TypeVar("T")

_BATCH = 64
"""Pieces of work taken at once: their blocks are written in parallel, their rows in one commit."""
_MOST_WAITING = 512
"""Most pieces of work that may wait. Beyond that saves wait: otherwise the time of a `flush` would
have no bound."""
_PATIENCE_S = 1.0
"""Seconds that a save waits for room in the queue."""
_SHOWN = 200
"""Most characters of an error that are kept: LanceDB's are long."""


class Addition(NamedTuple):
    """A node to make durable."""

    node: Node
    vectors: Vectors


class Removal(NamedTuple):
    """Nodes to forget, then the blocks that no other node uses.

    With `stamps`, only rows that have one of these: in a shared catalogue another machine may have
    written a newer one.
    """

    nodes: tuple[str, ...]
    blocks: tuple[str, ...]
    stamps: tuple[int, ...] = ()
    instead: str = ""
    """The node that takes their place, if there is one."""
    number: int = 0
    """Tells it from another of the same nodes. 0: it names no block that must stay until then."""


class Call(NamedTuple):
    """Any other function to run in the committer's thread, and the future of the caller."""

    run: Callable[[], Any]
    done: Future[Any]

    def do(self) -> None:
        """Run it, unless it has run already."""
        if self.done.done():
            return
        try:
            self.done.set_result(self.run())
        except BaseException as error:  # noqa: BLE001 - whoever waits for it deals with it
            self.done.set_exception(error)


Work = Addition | Removal | Call


class CommitQueue:
    """The committer's work, and its progress. Thread-safe."""

    def __init__(self, health: Health) -> None:
        self._queue: queue.Queue[Work | None] = queue.Queue()
        self._taken = threading.Condition()
        self._follow_ups = 0
        """Pieces of work that other work has queued."""
        self._health = health
        self._closing = self._ended = False
        self.failures = 0
        """Nodes so far that storage refused, for any reason but lack of room."""
        self._last = ""
        """The reason of the last refusal."""
        self.unremoved = ""
        """Why rows of nodes that were removed are still there, or nothing."""
        self._began: float | None = None
        """When the committer took its current work (monotonic); None while it is idle."""

    # --- whoever wants something done --------------------------------------------------------

    def put(self, work: Work) -> None:
        """Queue one piece of work."""
        if threading.current_thread().name == STORING:
            self._follow_ups += 1
        self._queue.put(work)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Queue a function; the future has its result or error."""
        done: Future[T] = Future()
        self.put(Call(function, done))
        return done

    def run(self, function: Callable[[], T]) -> T:
        """Queue a function and wait for it; `StorageError` if it will never run."""
        done = self.call(function)
        while not wait([done], 1.0).done:
            if self._ended:
                raise StorageError("nothing is made durable any more: restart the store")
        return done.result()

    def settle(self) -> None:
        """Wait until everything queued so far is done, and what that has queued in turn."""
        before = self._follow_ups
        self.run(lambda: None)
        if self._follow_ups != before:
            self.run(lambda: None)

    def flush(self, since: int | None = None, *, removed: bool = False) -> None:
        """`settle`, then `StorageError` if storage refuses nodes, or has refused one since there
        were `since` `failures` (None: since now). `removed`: `check_removed` too."""
        before = self.failures if since is None else since
        if removed:
            self.check_removed()
        else:
            self.settle()
        lost = self.failures - before
        if lost or self._health.failing(STORING):
            raise StorageError(
                f"{lost or 'the last'} prompts were not stored and are forgotten: {self._last}. "
                "See to the home's disk and its catalogue, restart the store, and save them again"
            )

    def check_removed(self) -> None:
        """`settle`, then `StorageError` if the catalogue still has rows of removed nodes."""
        self.settle()
        if self.unremoved:
            raise StorageError(
                f"prompts that were removed are back after a restart: {self.unremoved}. See to the "
                "home's disk and its catalogue; removing them is tried again with the next save, "
                "every gc_seconds, and when the store is closed"
            )

    def admit(self) -> None:
        """Wait until there is room for one more save; `OverloadError` after a second.

        Do not hold the lock of the nodes: the work that makes room may need it.
        """
        with self._taken:
            if self._taken.wait_for(lambda: self._queue.qsize() < _MOST_WAITING, _PATIENCE_S):
                return
        raise OverloadError(
            f"{self._queue.qsize():,} prompts wait to be made durable; save more slowly"
        )

    def report(self) -> dict[str, float]:
        """Pieces of work `waiting`, nodes `refused` so far, and `seconds` that the committer has
        spent on its current work."""
        began = self._began
        seconds = 0.0 if began is None else time.monotonic() - began
        return {"waiting": self._queue.qsize(), "refused": self.failures, "seconds": seconds}

    def close(self) -> None:
        """Accept no more work."""
        self._queue.put(None)

    # --- the committer -----------------------------------------------------------------------

    def take(self) -> list[Work]:
        """The next pieces of work, oldest first; empty once everything is done and the queue is
        closed. Waits for work."""
        self._began = None
        batch = [] if self._closing else self._waiting()
        self._began = time.monotonic()
        self._closing = self._closing or None in batch
        work = [each for each in batch if each is not None]
        self._ended = not work
        return work

    def _waiting(self) -> list[Work | None]:
        batch = [self._queue.get()]
        while len(batch) < _BATCH and batch[-1] is not None:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        with self._taken:
            self._taken.notify_all()
        return batch

    def failed(self, error: KVShareError) -> None:
        """Storage has refused a node."""
        self.failures += 1
        self._last = shown(error)


def shown(error: KVShareError) -> str:
    """The text that is kept of an error."""
    return str(error)[:_SHOWN]
