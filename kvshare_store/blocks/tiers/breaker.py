"""A circuit breaker: after some failures in a row nobody is asked for a while."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from kvshare_store.errors import (
    DeadlineError,
    MissError,
    NoSpaceError,
    StorageError,
    UnavailableError,
)

State = Literal["closed", "open", "half-open"]
_JITTER = 0.2
"""Share by which a pause varies, so that machines that lost one server come back one by one."""


class Breaker:
    """closed: every call goes through. open: every call is refused at once. half-open: the pause
    is over; one call at a time goes through as the probe, the others are refused.

    A probe that succeeds closes the breaker; one that fails opens it for twice as long. Used from
    one event loop.
    """

    def __init__(
        self,
        failures: int = 3,
        pause_s: float = 1.0,
        longest_pause_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = failures
        self._first_pause_s = self._pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._clock = clock
        self._failures = 0
        self._opens_until: float | None = None
        self._probing = False
        self.refused = 0
        """Calls that were not made."""

    @property
    def state(self) -> State:
        """Where it is now."""
        if self._opens_until is None:
            return "closed"
        return "open" if self._clock() < self._opens_until else "half-open"

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """Around one call; `UnavailableError` if it is refused.

        What a cancelled call would have said is not known: it counts as nothing.
        """
        probe = self._enter(what)
        try:
            yield
        except (UnavailableError, DeadlineError, StorageError):
            self._failed(probe)
            raise
        except (MissError, NoSpaceError):
            self._answered(probe)
            raise
        else:
            self._answered(probe)
        finally:
            if probe:
                self._probing = False

    def _enter(self, what: str) -> bool:
        if self.state == "closed":
            return False
        if self.state == "open" or self._probing:
            self.refused += 1
            raise UnavailableError(f"{what} failed {self._limit} times in a row; asked again later")
        self._probing = True
        return True

    def _failed(self, probe: bool) -> None:
        if probe:
            self._open(min(2 * self._pause_s, self._longest_pause_s))
        elif self._opens_until is None:
            self._failures += 1
            if self._failures >= self._limit:
                self._open(self._first_pause_s)

    def _open(self, pause_s: float) -> None:
        self._pause_s = pause_s
        pause_s *= random.uniform(1 - _JITTER, 1 + _JITTER)
        self._opens_until = self._clock() + pause_s

    def _answered(self, probe: bool) -> None:
        # what began before the breaker opened says nothing about now
        if probe or self._opens_until is None:
            self._failures = 0
            self._opens_until = None
