"""Threads that answer requests: each kind of request has its lane, so that none waits for another.

`status` answers people, `notes` takes what engines report, `lookup` plans, `rows` sends rows to
other machines, `save` stores, `flush` waits for the disk, `chore` does what takes long, `explain`
plans once more for people, `purge` waits for leases, `reload` reads the settings again. Within a
lane clients take turns: one that asks for much keeps nobody else waiting but itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from kvshare_store.daemon import protocol
from kvshare_store.daemon.chores import CHORES
from kvshare_store.errors import InternalError, KVShareError, OverloadError

log = logging.getLogger("kvshare")

Work = Callable[[], None]

_STEP_S = 0.05
_OTHERS_S = 1.0
"""How long a client counts as asking after its last request."""


class _Size(NamedTuple):
    """Of a lane."""

    threads: int
    each: int
    """Of these, for one client at a time: the others stay free for others. While others ask too,
    each client has one."""
    queued: int = 1 << 30
    """Requests of one client that wait for a thread."""
    rest_s: float = 0.0
    """A thread rests after its work as long as that took, at most so long: clients that ask for one
    thing after the other leave half of a core to others."""


_SIZES = {
    "status": _Size(1, 1),
    "notes": _Size(1, 1),
    "lookup": _Size(4, 2, 64),
    "rows": _Size(2, 1, 64),
    "save": _Size(1, 1),
    "flush": _Size(1, 1),
    "chore": _Size(1, 1, 64, rest_s=0.1),
    "explain": _Size(1, 1, 8),
    "purge": _Size(1, 1, 8),
    "reload": _Size(1, 1),
}
_LANES: dict[type, str] = {
    **dict.fromkeys(
        (
            protocol.Decline,
            protocol.EngineCached,
            protocol.Prefilled,
            protocol.Finish,
            protocol.Observe,
            protocol.Working,
            protocol.NextLook,  # behind what the engine said of its work
            protocol.Looked,
            protocol.Failed,
        ),
        "notes",
    ),
    **dict.fromkeys((protocol.Plan, protocol.PlanNode, protocol.HasNodes), "lookup"),
    protocol.ReadRows: "rows",
    **dict.fromkeys(
        (
            protocol.Stage,
            protocol.WriteRows,
            protocol.Commit,
            protocol.Abandon,
            protocol.Forget,
        ),
        "save",
    ),
    protocol.Flush: "flush",
    **dict.fromkeys((*CHORES, protocol.Clear), "chore"),
    **dict.fromkeys((protocol.Explain, protocol.Diff), "explain"),
    protocol.Purge: "purge",
}
"""All others are what people ask: `status`."""


def lane_of(kind: type) -> str:
    """The lane that answers messages of a kind."""
    return _LANES.get(kind, "status")


class Lanes:
    """Work goes in; nothing that goes wrong in it ends a thread or stays unsaid."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._lanes = {name: _Lane(name, size, failed) for name, size in _SIZES.items()}

    def submit(self, client: str, kind: type, work: Work) -> None:
        """Do what a request of this kind asks for, in its lane, when it is the client's turn.

        `OverloadError` if too many such requests of the client wait already.
        """
        self._lanes[lane_of(kind)].put(client, work)

    def ask(self, client: str, kind: type, question: Callable[[], Any]) -> Future[Any]:
        """As `submit`, for somebody in this process: the future has the answer, or the error that
        came instead. Who cancels it before its turn is not answered."""
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(question())
            except KVShareError as error:
                future.set_exception(error)
            except BaseException as error:  # counted before anybody has the answer
                log.exception("kvshare: a question failed")
                self._failed(error)
                future.set_exception(InternalError("the daemon failed on this; see its log"))

        self.submit(client, kind, work)
        return future

    def waiting(self) -> dict[str, int]:
        """How many requests wait for a thread, by lane."""
        return {name: lane.waiting for name, lane in self._lanes.items()}

    def run(self, lane: str, work: Work) -> None:
        """Do something for nobody in particular, when it is its turn."""
        self._lanes[lane].put("", work)

    def close(self, seconds: float, meanwhile: Callable[[], object]) -> bool:
        """Drop what has not begun and wait for the rest, at most so long; whether all has ended.

        `meanwhile` is called again and again until then.
        """
        for lane in self._lanes.values():
            lane.close()
        for _ in range(max(1, round(seconds / _STEP_S))):
            meanwhile()
            if not any(lane.running for lane in self._lanes.values()):
                return True
            time.sleep(_STEP_S)
        return False


class _Lane:
    """Some threads, and a queue for each client. Clients take turns; each client's requests begin
    in the order of their arrival."""

    def __init__(self, name: str, size: _Size, failed: Callable[[BaseException], None]) -> None:
        self._size = size
        self._failed = failed
        self._pool = ThreadPoolExecutor(size.threads, f"kvshare-{name}")
        self._lock = threading.Lock()
        self._queues: dict[str, deque[Work]] = {}
        """Of clients for whom something waits, whose turn is next first."""
        self._busy: Counter[str] = Counter()
        """Threads that work for each client."""
        self._asker, self._others_until = "", 0.0
        """Who asked last, and until when others count as asking too."""
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether any work has begun and not ended."""
        return bool(self._busy)

    @property
    def waiting(self) -> int:
        """Work of all clients that has not begun."""
        with self._lock:
            return sum(map(len, self._queues.values()))

    def put(self, client: str, work: Work) -> None:
        """Do it when it is the client's turn; `OverloadError` if the client's queue is full."""
        with self._lock:
            if self._closed:
                return
            queue = self._queues.setdefault(client, deque())
            if len(queue) >= self._size.queued:
                raise OverloadError(f"{len(queue)} such requests wait already; ask again later")
            queue.append(work)
            if client != self._asker:
                self._others_until = time.monotonic() + _OTHERS_S if self._asker else 0.0
                self._asker = client
            self._begin()

    def close(self) -> None:
        """Begin nothing any more."""
        with self._lock:
            self._closed = True
            self._queues.clear()
        self._pool.shutdown(wait=False)

    def _begin(self) -> None:
        """Give free threads to the clients whose turn it is. Hold the lock."""
        each = 1 if time.monotonic() < self._others_until else self._size.each
        while self._busy.total() < self._size.threads:
            client = next((one for one in self._queues if self._busy[one] < each), None)
            if client is None:
                return
            queue = self._queues.pop(client)
            work = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind the others
            self._busy[client] += 1
            self._pool.submit(self._do, client, work)

    def _do(self, client: str, work: Work) -> None:
        start = time.monotonic()
        try:
            work()
        except BaseException as error:  # a bug must not go unnoticed, nor a library's panic
            log.exception("kvshare: work in a lane failed")
            self._failed(error)
        finally:
            if self._size.rest_s and not self._closed:
                time.sleep(min(self._size.rest_s, time.monotonic() - start))
            with self._lock:
                self._busy[client] -= 1
                if not self._busy[client]:
                    del self._busy[client]
                if not self._closed:
                    self._begin()
