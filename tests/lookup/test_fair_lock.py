"""The lock that lookups of short prompts take: in which order it is had."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from kvshare_store.lookup.fair_lock import FairLock

PATIENCE_S = 60.0


def test_a_fair_lock_is_had_in_the_order_of_asking() -> None:
    lock, order = FairLock(), list[int]()

    def ask(number: int) -> None:
        with lock:
            order.append(number)

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    with lock:
        for count, asker in enumerate(askers, 1):
            asker.start()
            while len(lock.waiting) < count:
                time.sleep(0.001)
    for asker in askers:
        asker.join(PATIENCE_S)
    assert order == list(range(8))
    with lock:
        pass


def test_who_gives_up_waiting_for_a_fair_lock_holds_nobody_up() -> None:
    """A signal ends the wait of the main thread."""
    lock = FairLock()
    with lock:
        signal.signal(signal.SIGUSR1, _interrupt)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(InterruptedError), lock:
            raise AssertionError("it is taken")
    had = threading.Event()
    threading.Thread(target=lambda: lock.__enter__() or had.set()).start()
    assert had.wait(PATIENCE_S)


def _interrupt(*_: object) -> None:
    raise InterruptedError
