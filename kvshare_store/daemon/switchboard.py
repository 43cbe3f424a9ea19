"""The loop that moves messages between connections and those who answer them. One thread.

It never decodes a request, waits for a medium or takes the store's lock. So every client is heard
at once, whatever the others do.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvshare_store.daemon import protocol, wire
from kvshare_store.daemon.connection import Budget, Connection, Limits
from kvshare_store.daemon.tls import reason_of
from kvshare_store.daemon.wire import Frame
from kvshare_store.errors import KVShareError, OverloadError, ProtocolError
from kvshare_store.observability.logs import Seldom

log = logging.getLogger("kvshare")

Socket = socket.socket

_REST_S = 0.5
"""How long no connection is accepted after the system has refused one."""
_AT_ONCE, _PAUSE_S = 8, 0.004
"""So many connections are accepted, then none for so long: two thousand a second, which leaves the
processor to those who are connected."""
_BUSY_S = 0.02
"""How long a client that was told to ask later is not heard."""
_STUCK_S = 0.004
"""After so long one more request is taken of a client that has as many under way as it may have:
they may wait for a medium, and what it asks now may not."""


class Answer(NamedTuple):
    """An answer to a request of `nbytes` bytes. `malformed`: it was no valid message."""

    connection: Connection
    request_id: bytes
    body: bytes
    nbytes: int
    malformed: bool


class Owner(Protocol):
    """Answers requests. Called in the loop's thread, so nothing here may wait."""

    def hello(self, connection: Connection, body: bytes) -> tuple[bytes, int]:
        """The answer to a first message, and a descriptor that goes with it.

        `KVShareError` if the client is not let in.
        """

    def request(self, connection: Connection, frame: Frame) -> None:
        """A request: `Switchboard.answer` it some time. `KVShareError` if that is the answer."""

    def left(self, connection: Connection) -> None:
        """The client is gone and all that it had asked for is done."""


class Door(Protocol):
    """Where clients come in."""

    @property
    def socket(self) -> Socket:
        """It is ready to be read from when somebody is there."""

    def accept(self) -> wire.Stream | None:
        """The next client, or None if it is not let in or has gone. `BlockingIOError` if nobody is
        there; another `OSError` where the system lets nobody in for now."""

    def close(self) -> None:
        """Let nobody in any more."""


class Switchboard:
    """Connections of some doors."""

    def __init__(self, doors: Sequence[Door], owner: Owner, limits: Limits) -> None:
        self._doors = {door.socket: door for door in doors}
        self._owner = owner
        self._limits = limits
        self._budget = Budget(limits.all_requests, limits.all_request_bytes)
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._waking = threading.RLock()
        self._answers: deque[Answer] = deque()
        self._checked = self._closed_until = 0.0
        self._open = False
        self._accepted = 0
        self._unheard: deque[tuple[float, Connection]] = deque()
        """Clients that were told to ask later, and when they are heard again."""
        self._behind: deque[Connection] = deque()
        """Clients that may have sent more than was taken in one turn."""
        self._stuck_until = 0.0
        self._seldom = Seldom(log)
        self.connections: set[Connection] = set()
        self.cut_off = 0
        """Clients that were disconnected for misbehaving."""
        self._let_in(True)

    @property
    def under_way(self) -> int:
        """Requests of all clients that are not answered yet."""
        return self._budget.taken

    # --- from other threads ----------------------------------------------------------------------

    def answer(
        self,
        connection: Connection,
        request_id: bytes,
        body: bytes,
        nbytes: int,
        *,
        malformed: bool = False,
    ) -> None:
        """Answer a request of `nbytes` bytes. `malformed`: it was no valid message."""
        self._answers.append(Answer(connection, request_id, body, nbytes, malformed))
        self.wake()

    def wake(self) -> None:
        """End the wait of the current turn; safe in a signal handler."""
        with self._waking:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # --- the loop ----------------------------------------------------------------------------

    def turn(self, seconds: float) -> bool:
        """One turn: move what can be moved, waiting up to `seconds` for it. Returns whether any
        client was heard."""
        heard = False
        for key, events in self._selector.select(self._until_due(seconds)):
            if isinstance(key.data, Connection):
                heard = True
                self._serve(key.data, events)
            elif key.data is not None:
                self._accept(key.data)
            else:
                os.eventfd_read(self._wake)
        while self._answers:
            self._deliver(self._answers.popleft())
        self._look_after(time.monotonic())
        return heard

    def _serve(self, connection: Connection, events: int) -> None:
        """An error on one connection ends that connection and nothing else. No events: go on with
        what it has sent."""
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(connection)
            if events & selectors.EVENT_READ and not connection.gone:
                self._read(connection)
            if not events and not connection.gone:
                self._hear(connection)
        except Exception:  # a bug costs only the client that met it
            log.exception("kvshare: a connection failed")
            self._cut(connection, "the daemon failed on what it sent")

    def _read(self, connection: Connection) -> None:
        try:
            connection.read(time.monotonic())
        except BlockingIOError:
            return
        except (EOFError, OSError) as error:
            if isinstance(error, ssl.SSLError):
                self.cut_off += 1
                peer = getattr(connection.stream, "peer", "a client")
                self._seldom.warn("tls", f"TLS with {peer} failed: {reason_of(error)}")
            self._hang_up(connection)
            return
        self._hear(connection)

    def _hear(self, connection: Connection) -> None:
        """Some of what it has sent: everybody else is heard before more of it."""
        try:
            for frame in connection.take():
                self._dispatch(connection, frame)
                if connection.leaving or connection.gone:
                    return
        except ProtocolError as error:
            self._refuse(connection, wire.NO_REQUEST, error)
            return
        if connection.behind and not connection.unheard:
            self._behind.append(connection)
        self._watch(connection)

    def _dispatch(self, connection: Connection, frame: Frame) -> None:
        if not frame.kept:
            error = OverloadError("too many requests are under way; ask again later")
            self._turn_away(connection, frame.id, error)
            return
        try:
            if connection.greeted:
                self._owner.request(connection, frame)
                return
            body, descriptor = self._owner.hello(connection, bytes(frame.body))
        except KVShareError as error:
            connection.done(frame.nbytes, malformed=isinstance(error, ProtocolError))
            if connection.greeted:
                self._turn_away(connection, frame.id, error)
            else:
                self._refuse(connection, frame.id, error)
            return
        connection.done(frame.nbytes)
        connection.greeted = True
        self._put(connection, frame.id, body, descriptor)

    def _turn_away(self, connection: Connection, request_id: bytes, error: KVShareError) -> None:
        """Answer with an error. Whoever asks too much is not heard for a while: to refuse one
        request after the other would take the processor from everybody else."""
        if isinstance(error, OverloadError) and not connection.unheard:
            connection.unheard = True
            self._unheard.append((time.monotonic() + _BUSY_S, connection))
        self._put(connection, request_id, protocol.encode_error(error))

    # --- answers -----------------------------------------------------------------------------

    def _deliver(self, answer: Answer) -> None:
        connection = answer.connection
        connection.done(answer.nbytes, malformed=answer.malformed)
        if not connection.gone:
            self._put(connection, answer.request_id, answer.body)
        elif not connection.under_way:
            self._left(connection)

    def _put(
        self, connection: Connection, request_id: bytes, body: bytes, descriptor: int = -1
    ) -> None:
        try:
            connection.put(request_id, body, descriptor)
        except OverflowError as error:
            self._cut(connection, str(error))
            return
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        connection.flush(time.monotonic())
        if connection.leaving and not connection.unsent:
            self._hang_up(connection)
            return
        self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        """Wait for what is wanted of a connection now."""
        waits = connection.leaving or connection.unheard or connection.behind
        read = 0 if waits else selectors.EVENT_READ
        events = read | (selectors.EVENT_WRITE if connection.unsent else 0)
        if events == connection.events:
            return
        if not connection.events:
            self._selector.register(connection.stream, events, connection)
        elif not events:
            self._selector.unregister(connection.stream)
        else:
            self._selector.modify(connection.stream, events, connection)
        connection.events = events

    # --- coming and going ------------------------------------------------------------------------

    def _let_in(self, wanted: bool) -> None:
        for opening, door in self._doors.items() if wanted != self._open else ():
            if wanted:
                self._selector.register(opening, selectors.EVENT_READ, door)
            else:
                self._selector.unregister(opening)
        self._open = wanted

    def _accept(self, door: Door) -> None:
        """Let one client in, so that those who are connected are heard before the next one."""
        try:
            stream = door.accept()
        except (BlockingIOError, ConnectionError):  # whoever was there has gone
            return
        except OSError as error:  # no descriptors left: existing connections go on
            log.warning("kvshare: a connection was not accepted: %s", error)
            self._closed_until = time.monotonic() + _REST_S
            self._let_in(False)
            return
        self._accepted += 1
        if self._accepted % _AT_ONCE == 0:
            self._closed_until = time.monotonic() + _PAUSE_S
            self._let_in(False)
        if stream is not None:
            self._welcome(Connection(stream, self._limits, self._budget, time.monotonic()))

    def _welcome(self, connection: Connection) -> None:
        if len(self.connections) >= self._limits.connections:
            silent = [one for one in self.connections if not one.greeted]
            if silent:  # a client that means well says hello at once
                self._cut(min(silent, key=lambda one: one.began), "it says no hello")
        self.connections.add(connection)
        self._selector.register(connection.stream, selectors.EVENT_READ, connection)
        if len(self.connections) > self._limits.connections:
            if connection.remote:  # its handshake would have to be made first
                self._cut(connection, "there are too many clients")
                return
            error = OverloadError(f"{len(self.connections) - 1:,} clients are connected already")
            self._refuse(connection, wire.NO_REQUEST, error)

    def _refuse(self, connection: Connection, request_id: bytes, error: KVShareError) -> None:
        """Send the reason, then disconnect."""
        self.cut_off += 1
        connection.leaving = True
        self._put(connection, request_id, protocol.encode_error(error))

    def _cut(self, connection: Connection, reason: str) -> None:
        self.cut_off += 1
        told = f"{connection.owner} was disconnected: {reason}"
        if connection.greeted:
            log.warning("kvshare: %s", told)
        else:  # anybody who reaches the port can bring this about
            self._seldom.warn("cut", told)
        self._hang_up(connection)

    def _hang_up(self, connection: Connection) -> None:
        if connection.gone:
            return
        if connection.events:
            self._selector.unregister(connection.stream)
        self.connections.discard(connection)
        connection.hang_up()
        if not connection.under_way:
            self._left(connection)

    def _left(self, connection: Connection) -> None:
        if connection.ended:
            return
        connection.ended = True
        connection.let_go()
        if connection.greeted:
            self._owner.left(connection)

    def _until_due(self, seconds: float) -> float:
        """Seconds until somebody is heard or let in again, at most `seconds`."""
        if any(connection.room > 0 for connection in self._behind):
            return 0.0
        due = [self._unheard[0][0]] if self._unheard else []
        if self._behind:
            due.append(self._stuck_until)
        if not self._open:
            due.append(self._closed_until)
        return max(0.0, min([seconds, *(at - time.monotonic() for at in due)]))

    def _look_after(self, now: float) -> None:
        """Hear clients and accept connections again when it is time; once a second, disconnect
        overdue clients."""
        heard = self._on_turn(now)
        while self._unheard and self._unheard[0][0] <= now:
            connection = self._unheard.popleft()[1]
            connection.unheard = False
            heard.append(connection)
        for connection in heard:
            self._serve(connection, 0)
        if not self._open and now >= self._closed_until:
            self._let_in(True)
        if now - self._checked < 1.0:
            return
        self._checked = now
        for connection in list(self.connections):
            if reason := connection.overdue(now):
                self._cut(connection, reason)

    def _on_turn(self, now: float) -> list[Connection]:
        """Of the clients that are behind, those of whom more may be taken now."""
        all_of_them = now >= self._stuck_until
        if all_of_them:
            self._stuck_until = now + _STUCK_S
        heard: list[Connection] = []
        for _ in range(len(self._behind)):
            connection = self._behind.popleft()
            on_turn = all_of_them or connection.room > 0
            (heard if on_turn else self._behind).append(connection)
        return heard

    def stop_listening(self) -> None:
        """Accept no more connections; the socket is removed."""
        self._let_in(False)
        self._closed_until = float("inf")
        for door in self._doors.values():
            door.close()

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self.connections):
            self._hang_up(connection)
        self._selector.close()
        with self._waking:  # somebody may still answer
            os.close(self._wake)
            self._wake = -1
