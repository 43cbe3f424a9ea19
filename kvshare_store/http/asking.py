"""Questions from the HTTP server's event loop to the daemon, and what its errors are over HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from kvshare_store.config import StoreConfig
from kvshare_store.errors import DeadlineError, ErrorKind, KVShareError
from kvshare_store.http.history import History

QUESTION_S = 15.0
"""How long somebody waits for an answer."""
CHORE_S = 900.0
"""How long for what removes something; a purge alone may wait ten minutes for leases."""

_STATUS = {
    ErrorKind.CONFIG: 400,
    ErrorKind.PLAN: 400,
    ErrorKind.PROTOCOL: 400,
    ErrorKind.NODE: 404,
    ErrorKind.NAMESPACE: 404,
    ErrorKind.HOME: 409,
    ErrorKind.BUSY: 409,
    ErrorKind.OVERLOAD: 503,
    ErrorKind.UNAVAILABLE: 503,
    ErrorKind.TIMEOUT: 504,
}


class Daemon(Protocol):
    """What the HTTP server needs of the daemon."""

    config: StoreConfig

    def ask(self, message: Any, given_up: Callable[[], bool]) -> Future[Any]:
        """The answer to a message, in plain types."""


class Asking:
    """One daemon, asked from an event loop. Nothing here waits in a thread."""

    def __init__(self, daemon: Daemon, history: History) -> None:
        self._daemon = daemon
        self.history = history
        self.config = daemon.config

    async def __call__(self, message: Any, seconds: float = QUESTION_S) -> Any:
        """The answer; `DeadlineError` if it is not there in time. Nobody wants it after that."""
        given_up = threading.Event()
        try:
            answer = self._daemon.ask(message, given_up.is_set)
            return await asyncio.wait_for(asyncio.wrap_future(answer), seconds)
        except TimeoutError as error:
            raise DeadlineError(
                f"the daemon has not answered in {seconds:.0f} s; it is busy with something longer"
            ) from error
        finally:
            given_up.set()


def status_of(error: KVShareError) -> int:
    """The HTTP status that says what kind of error this is."""
    return _STATUS.get(error.kind, 503 if error.retryable else 500)
