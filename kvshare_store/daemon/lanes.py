"""Threads that answer requests: each kind of request has its lane, so that none waits for another.

`status` answers people, `notes` takes what engines report, `lookup` plans, `save` stores in the
order of arrival, `flush` waits for the disk, `chore` does what takes long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvshare_store.daemon import protocol
from kvshare_store.daemon.chores import CHORES

log = logging.getLogger("kvshare")

_STEP_S = 0.05

_THREADS = {"status": 1, "notes": 1, "lookup": 4, "save": 1, "flush": 1, "chore": 1}
_LANES: dict[type, str] = {
    **dict.fromkeys(
        (
            protocol.Decline,
            protocol.EngineCached,
            protocol.Finish,
            protocol.Observe,
            protocol.Working,
            protocol.Failed,
        ),
        "notes",
    ),
    protocol.Plan: "lookup",
    **dict.fromkeys((protocol.Stage, protocol.Commit, protocol.Abandon), "save"),
    protocol.Flush: "flush",
    **dict.fromkeys((*CHORES, protocol.Clear), "chore"),
}
"""All others are what people ask: `status`."""


class Lanes:
    """Work goes in; nothing that goes wrong in it ends a thread or stays unsaid."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._pools = {
            name: ThreadPoolExecutor(count, f"kvshare-{name}") for name, count in _THREADS.items()
        }
        self._going_on: set[Future[None]] = set()

    def submit(self, kind: type, work: Callable[[], None]) -> None:
        """Do what a request of this kind asks for, in its lane."""
        self.run(_LANES.get(kind, "status"), work)

    def run(self, lane: str, work: Callable[[], None]) -> Future[None]:
        """Do something in a lane, after what is queued there. One thread's."""
        future = self._pools[lane].submit(self._guarded, work)
        self._going_on.add(future)
        future.add_done_callback(self._going_on.discard)
        return future

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # a bug must not go unnoticed, nor a library's panic
            log.exception("kvshare: work in a lane failed")
            self._failed(error)

    def close(self, seconds: float, meanwhile: Callable[[], object]) -> bool:
        """Drop what has not begun and wait for the rest, at most so long; whether all has ended.

        `meanwhile` is called again and again until then.
        """
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for _ in range(max(1, round(seconds / _STEP_S))):
            meanwhile()
            if not wait(list(self._going_on), _STEP_S).not_done:
                return True
        return False
