"""A lock with a queue."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """A lock that threads get in the order in which they asked for it. Not reentrant."""

    def __init__(self) -> None:
        self._inner = threading.Lock()
        self._taken = False
        self.waiting: deque[threading.Lock] = deque()
        """One for each waiting thread, the first one first."""

    def __enter__(self) -> None:
        with self._inner:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self.waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # a signal: whoever comes next must not wait for this thread
            with self._inner:
                waits = turn in self.waiting
                if waits:
                    self.waiting.remove(turn)
            if not waits:
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._inner:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self._taken = False
