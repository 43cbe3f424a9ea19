"""A committer that waits, and a store that is opened again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvshare_store.commit.queue import CommitQueue
from tests.support.oracle import Driver

PATIENCE_S = 60.0


def hold(queue: CommitQueue, go_on: threading.Event) -> None:
    """The committer does nothing more until the event."""
    held = threading.Event()

    def wait() -> None:
        held.set()
        assert go_on.wait(PATIENCE_S)

    queue.call(wait)
    assert held.wait(PATIENCE_S)


def reopened(engine: Driver, driver: Callable[..., Driver]) -> Driver:
    engine.store.flush()
    engine.store.close()
    again = driver()
    assert again.store.stats()["errors"] == {}, "every row has its blocks"
    return again
