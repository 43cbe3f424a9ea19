"""How long the code that counts takes: a stopwatch around it, in an engine and in a daemon.

`python -m benchmarks.harness.counting HOME FILE` is that daemon. It writes what its stopwatch says
to FILE when it gets SIGUSR1.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.harness.daemons import serve, serving
from kvshare_store.config import StoreConfig
from kvshare_store.observability.metrics import Metrics

COUNTING = ("add", "add_all", "decline", "error", "moved", "evicted", "used", "labels", "observe")
"""What the daemon's code calls to count."""
_PATIENCE_S = 30.0


class Stopwatch:
    """Seconds that wrapped functions have taken in this process, in whatever thread."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        self._lock = threading.Lock()
        self._inside = threading.local()

    def wrap(self, owner: Any, name: str) -> None:
        """Time every call of `owner.name`, but for calls inside a call that is timed."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "now", False):
                return function(*args, **kwargs)
            self._inside.now, start = True, perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(perf_counter() - start)
                self._inside.now = False

        setattr(owner, name, timed)

    def _add(self, seconds: float) -> None:
        with self._lock:
            self.seconds += seconds
            self.calls += 1


def watch_engine(watch: Stopwatch) -> None:
    """Time what counts in an engine, before one is made in this process."""
    from kvshare_connectors.vllm.connector import KVShareConnector
    from kvshare_connectors.vllm.metrics import KVSharePromMetrics, KVShareStats, Tally

    for name in ("ended", "unserved", "looked_up", "take"):
        watch.wrap(Tally, name)
    for name in ("aggregate", "reduce", "is_empty"):
        watch.wrap(KVShareStats, name)
    watch.wrap(KVShareConnector, "get_kv_connector_stats")
    watch.wrap(KVSharePromMetrics, "observe")


class CountedDaemon:
    """The daemon with a stopwatch in it, which writes what that says when it is asked to."""

    def __init__(self, config: StoreConfig) -> None:
        self._config, self._file = config, config.home_path.with_name("counted.json")

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it serves."""
        with serving(self._config, "benchmarks.harness.counting", str(self._file)) as process:
            self._pid = process.pid
            yield

    def read(self) -> tuple[float, int]:
        """Seconds and calls so far."""
        self._file.unlink(missing_ok=True)
        os.kill(self._pid, signal.SIGUSR1)
        deadline = time.monotonic() + _PATIENCE_S
        while not self._file.exists():
            if time.monotonic() > deadline:
                raise RuntimeError("the daemon does not say what it has counted")
            time.sleep(0.01)
        seconds, calls = json.loads(self._file.read_text())
        return seconds, calls


def _counted(home: str, file: Path) -> None:
    """The daemon's program."""
    watch = Stopwatch()
    for name in COUNTING:
        watch.wrap(Metrics, name)

    def say(*_: object) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps((watch.seconds, watch.calls)))  # a signal must not wait
        partial.rename(file)

    signal.signal(signal.SIGUSR1, say)
    serve(home)


if __name__ == "__main__":
    _counted(sys.argv[1], Path(sys.argv[2]))
