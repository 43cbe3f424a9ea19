"""The HTTP server: a supervised thread of the daemon with an event loop of its own."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvshare_store.daemon import protocol
from kvshare_store.errors import InternalError, KVShareError
from kvshare_store.http.address import BACKLOG, Entrance
from kvshare_store.http.app import application
from kvshare_store.http.asking import Asking, Daemon
from kvshare_store.http.history import STEP_S, History
from kvshare_store.observability.logs import Seldom
from kvshare_store.observability.threads import Health, Supervised, be_nice

log = logging.getLogger("kvshare")

THREAD = "kvshare-http"
_CONNECTIONS = 128
"""Above this number a request is answered with 503."""
_OPEN = 2 * _CONNECTIONS
"""Above this number a connection is ended unread: engines need descriptors, too."""
_HEADER_BYTES = 16 << 10
_SILENT_S = 5.0
"""How long a connection may be without a whole request: before the first, and after each."""
_UNREAD_S = 20.0
"""How long a client may leave an answer unread."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NICENESS = 5
"""Plans go before pages."""
_DRAIN_S = 2
"""How long answers that are on their way may take when the daemon ends."""


class HttpServer:
    """Serves the page of one daemon until it is closed."""

    def __init__(self, daemon: Daemon, health: Health, entrance: Entrance) -> None:
        self.address = entrance.address
        self._socket = entrance.listener
        self._asking = Asking(daemon, History())
        self._app = application(self._asking, entrance.token)
        self._health = health
        self._closing = threading.Event()
        self._server: uvicorn.Server | None = None
        self._thread = Supervised(THREAD, self._serve, health, self._closing)

    def close(self) -> None:
        """Stop listening, finish what is being answered, end the thread."""
        self._closing.set()
        if self._server is not None:
            _end(self._server)
        self._thread.join(_DRAIN_S + 3.0)
        self._socket.close()

    def _serve(self) -> None:
        if self._closing.is_set():
            return
        be_nice(_NICENESS)
        try:
            asyncio.run(self._run())
        except SystemExit as error:  # how uvicorn says that it could not start
            raise InternalError("the HTTP server could not start") from error
        if not self._closing.is_set():
            raise InternalError("the HTTP server ended by itself")

    async def _run(self) -> None:
        self._server = server = uvicorn.Server(_settings(self._app))
        if self._closing.is_set():
            return
        asyncio.get_running_loop().set_exception_handler(Unforeseen())
        sampling = asyncio.create_task(self._sample())
        sampling.add_done_callback(lambda _: _end(server))
        # a copy: it closes what it is given, and may have to start again
        with self._socket.dup() as listener:
            await server.serve([listener])
        if sampling.done():  # it has failed, and the server has ended with it
            sampling.result()
        sampling.cancel()

    async def _sample(self) -> None:
        """Every few seconds: what happened since. That it goes on says that the thread is well."""
        while True:
            try:
                self._asking.history.take(await self._asking(protocol.Stats()))
                self._health.well(THREAD)
            except KVShareError as error:
                log.info("kvshare: the page has no numbers of this moment: %s", error)
            await asyncio.sleep(STEP_S)


def _end(server: uvicorn.Server) -> None:
    server.should_exit = True


class Unforeseen:
    """What the event loop says of trouble; seldom where it repeats itself every second."""

    def __init__(self) -> None:
        self._seldom = Seldom(log)

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            text = f"the page cannot accept connections: {error.strerror}"
            self._seldom.warn("exhausted", text, logging.ERROR)
        else:
            loop.default_exception_handler(context)


class _Connection(H11Protocol):
    """One on which nothing is asked, or nothing read, ends soon: there are only so many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silence = self._after(_SILENT_S, self._end_silent)
        self._unread: asyncio.TimerHandle | None = None
        if len(self.connections) > _OPEN:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence.cancel()
        self._read()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The next request may have come already; if not, it is waited for."""
        super().on_response_complete()
        self._wait(_UNREAD_S if self.transport.is_closing() else _SILENT_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._after(_UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _wait(self, seconds: float) -> None:
        self._silence.cancel()
        self._silence = self._after(seconds, self._end_silent)

    def _after(self, seconds: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, act)

    def _end_silent(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return  # a request is under way; when it ends, this waits again
        if self.transport.is_closing():
            self.transport.abort()
        else:
            self.transport.close()
            self._wait(_UNREAD_S)


def _is_news(record: logging.LogRecord) -> bool:
    """Not: that a request was cut off because the daemon ends."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _settings(app: ASGIApp) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,  # so many connections are accepted in one go
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=10 * int(_SILENT_S),  # never: `_Connection` ends it before
        timeout_graceful_shutdown=_DRAIN_S,
    )
