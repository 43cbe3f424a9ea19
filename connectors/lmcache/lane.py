"""A thread that processes tasks and signals each finished one on an event descriptor."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from kvshare_connectors.lmcache.shelf import Shelf

from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError

log = logging.getLogger("kvshare")
R = TypeVar("R")
_numbers = itertools.count(1)
_INTERNAL = "internal"


class Failures:
    """Failures by kind: all are counted, the first of each kind is logged. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.last = ""
        """Why the last task of any lane failed; empty when it did not."""

    def failed(self, error: Exception, what: str) -> None:
        """A task has failed."""
        kind = str(error.kind) if isinstance(error, KVShareError) else _INTERNAL
        with self._lock:
            first = not self._counts[kind]
            self._counts[kind] += 1
            self.last = f"{kind}: {error}"
        if first:
            log.warning(
                "kvshare: %s failed, LMCache goes on without it (more of kind %r are only "
                "counted): %s", what, kind, error, exc_info=kind == _INTERNAL,
            )  # fmt: skip

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        with self._lock:
            return dict(self._counts)


class Lane(Generic[R]):
    """Tasks of one kind, one after another. `fd` is readable when a task has been done."""

    def __init__(self, name: str, config: StoreConfig, failures: Failures) -> None:
        self._name = name
        self._config = config
        self._failures = failures
        self._tasks: queue.SimpleQueue[tuple[int, Callable[[Shelf], R], R] | None]
        self._tasks = queue.SimpleQueue()
        self._done: dict[int, R] = {}
        self._lock = threading.Lock()
        self._ending = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"kvshare-{name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether tasks are processed."""
        return self._thread.is_alive()

    def submit(self, work: Callable[[Shelf], R], failed: R) -> int:
        """Do `work` soon; its result is `failed` if it raises. Returns the task's number."""
        number = next(_numbers)
        self._tasks.put((number, work, failed))
        return number

    def result(self, number: int) -> R | None:
        """The result of a task, once; None if it is not done."""
        with self._lock:
            return self._done.pop(number, None)

    def results(self) -> dict[int, R]:
        """All results since the last call."""
        with self._lock:
            done, self._done = self._done, {}
        return done

    def close(self) -> None:
        """Finish the task in progress; tasks that have not begun fail."""
        self._ending = True
        self._tasks.put(None)
        self._thread.join()
        os.close(self.fd)

    def _run(self) -> None:
        with Shelf(self._config) as shelf:
            while (task := self._tasks.get()) is not None:
                number, work, failed = task
                result = failed if self._ending else self._result(shelf, work, failed)
                with self._lock:
                    self._done[number] = result
                os.eventfd_write(self.fd, 1)

    def _result(self, shelf: Shelf, work: Callable[[Shelf], R], failed: R) -> R:
        try:
            result = work(shelf)
        except Exception as error:  # noqa: BLE001 - LMCache waits for every task to be answered
            self._failures.failed(error, f"a {self._name}")
            return failed
        self._failures.last = ""
        return result
