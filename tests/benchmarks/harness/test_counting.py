"""A stopwatch around what counts."""

from __future__ import annotations

import threading
import time

from benchmarks.harness.counting import COUNTING, CountedDaemon, Stopwatch
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import Decline
from kvshare_store.observability.metrics import Metrics
from tests.support.stores import SMALL


class Counts:
    """Something that counts, and calls itself."""

    def outer(self) -> str:
        self.inner()
        return "done"

    def inner(self) -> None:
        time.sleep(0.02)


def test_calls_are_timed_once_in_every_thread() -> None:
    class Watched(Counts):
        pass

    watch = Stopwatch()
    for name in ("outer", "inner"):
        watch.wrap(Watched, name)
    threads = [threading.Thread(target=Watched().inner) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert watch.calls == 3
    assert watch.seconds >= 0.06
    assert Watched().outer() == "done"
    assert watch.calls == 4, "a call inside a call that is timed is a part of it"


def test_whatever_counts_is_watched() -> None:
    """A new way to count needs a place in the list, or `metrics` would leave it out."""
    asked = {"counts", "declined", "errors", "evictions", "moves", "usage", "durations"}
    others = {"timed", "forget"}
    """`timed` calls `observe`; what is forgotten is no request."""
    public = {name for name in vars(Metrics) if not name.startswith("_")}
    assert public == {*COUNTING, *asked, *others}


def test_a_daemon_says_what_it_has_counted(tmp_path) -> None:
    daemon = CountedDaemon(StoreConfig(home=str(tmp_path / "home"), **SMALL))
    with daemon.running(), Client(tmp_path / "home") as client:
        seconds, calls = daemon.read()
        client.call(Decline("short_prompt", 9))
        more, later = daemon.read()
    assert later > calls
    assert 0 < more - seconds < 1
