"""Threads that restart after errors, and what is known about their health."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from kvshare_store.errors import StorageError

log = logging.getLogger("kvshare")

STORING = "kvshare-commit"
"""The thread without which nothing can be stored."""
_IN_A_ROW = 3
"""After so many failures of that thread saves are refused ..."""
_REFUSED_S = 10.0
"""... for so many seconds; then one save is tried again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0


class _Trouble(NamedTuple):
    error: str
    in_a_row: int
    at: float


class Health:
    """Unexpected errors in the threads of one store. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._troubles: dict[str, _Trouble] = {}
        self._failures: Counter[str] = Counter()
        self._well: dict[str, float] = {}
        """When each part last succeeded, Unix seconds."""
        self._threads: dict[str, threading.Thread] = {}

    def failed(self, part: str, error: BaseException) -> None:
        """A part has met an unexpected error, or cannot do its work."""
        with self._lock:
            self._failures[part] += 1
            before = self._troubles.get(part)
            in_a_row = 1 + (before.in_a_row if before else 0)
            what = f"{type(error).__name__}: {error}"[:200]
            self._troubles[part] = _Trouble(what, in_a_row, self._clock())

    def watch(self, thread: threading.Thread) -> None:
        """A thread was started: `report` says whether it still runs."""
        self._threads[thread.name] = thread

    def well(self, part: str) -> None:
        """A part has done its work."""
        self._well[part] = time.time()
        if part in self._troubles:
            with self._lock:
                self._troubles.pop(part, None)

    def failing(self, part: str) -> bool:
        """Whether the last attempt of a part failed."""
        return part in self._troubles

    def check_storing(self) -> None:
        """`StorageError` while storing keeps failing, for unexpected reasons or because storage
        refuses every prompt."""
        trouble = self._troubles.get(STORING)
        if trouble is None or trouble.in_a_row < _IN_A_ROW:
            return
        if self._clock() - trouble.at < _REFUSED_S:
            raise StorageError(
                f"nothing can be stored at present ({trouble.error}); lookups go on. "
                "The daemon's log says more"
            )

    def report(self) -> dict[str, Any]:
        """`state` (`ok` or `degraded`), `reasons` by part, `failures` so far by part, when each
        part was `well` last, and whether each of the `threads` runs."""
        with self._lock:
            reasons = {part: trouble.error for part, trouble in self._troubles.items()}
            failures = dict(self._failures)
        state = "degraded" if reasons else "ok"
        return {
            "state": state,
            "reasons": reasons,
            "failures": failures,
            "well": dict(self._well),
            "threads": {name: thread.is_alive() for name, thread in dict(self._threads).items()},
        }


class Supervised:
    """A thread that runs `body` until it returns, and starts it again after an error.

    Between starts it pauses; the pause doubles while it keeps failing. `stop` ends the pause, and
    the thread with it.
    """

    def __init__(
        self,
        name: str,
        body: Callable[[], None],
        health: Health,
        stop: threading.Event | None = None,
    ) -> None:
        self._name = name
        self._body = body
        self._health = health
        self._stop = stop or threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        health.watch(self._thread)

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                self._body()
                return
            except BaseException as error:  # a panic of a library is no Exception
                log.exception("kvshare: thread %s failed and is started again", self._name)
                self._health.failed(self._name, error)
            if time.monotonic() - began > _LONGEST_PAUSE_S:
                pause = _FIRST_PAUSE_S
            if self._stop.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    @property
    def alive(self) -> bool:
        """Whether it has not returned."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        self._thread.join(timeout)


def be_nice(niceness: int) -> None:
    """Give every other thread of the machine priority over the calling one."""
    if hasattr(os, "gettid"):  # on Linux niceness is a thread's own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
