"""The client's side of the connection. Nothing here waits longer than it is told.

The connection is the session: what a client holds ends with it. The first message opens it; the
hello goes first and the message follows at once, so nobody waits for a welcome.

A connection belongs to the process that opened it. A forked child drops its copy at once and opens
a connection of its own for its next message. Otherwise the two would take each other's answers, and
a child that lives on would keep the connection of a parent that has died.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import ssl
import time
import weakref
from typing import Any, Self

import msgspec

from kvshare_store.daemon import protocol, roles, wire
from kvshare_store.daemon.address import connect
from kvshare_store.daemon.network import Place, Remote
from kvshare_store.daemon.outbox import Outbox
from kvshare_store.daemon.protocol import Role
from kvshare_store.daemon.tls import MUST_HOLD, reason_of
from kvshare_store.daemon.wire import MIB, Frame, Frames, Outgoing, Stream
from kvshare_store.errors import (
    ConfigError,
    DeadlineError,
    DeniedError,
    KVShareError,
    OverloadError,
    ProtocolError,
    UnavailableError,
    error_for,
)

_READ_BYTES = 1 << 18
_REST_S = 0.02
_UNSENT_BYTES = 64 * MIB
"""Bytes that may wait to be sent to a daemon that does not read."""
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
"""All sessions of this process."""


class Session:
    """Requests to one daemon, and their answers."""

    def __init__(self, home: Place, timeout: float, role: Role = "admin") -> None:
        """`role`: what it asks for at most."""
        self.home = home
        """The home that the daemon serves, or the daemon of another machine."""
        self._timeout = timeout
        self.role = role
        self._ids = itertools.count(1)
        self._waiting: set[bytes] = set()
        self._answers: dict[bytes, protocol.Reply] = {}
        self._stream: Stream | None = None
        self._hello = b""
        self.heard = 0.0
        """When the daemon last said anything (monotonic seconds)."""
        self.welcome: protocol.Welcome | None = None
        """What the daemon of this connection has said about itself."""
        self.arena = -1
        """Descriptor of the daemon's arena, from its welcome."""
        self.outbox: Outbox | None = None
        """The outbox of this connection. A new connection gets a new one, because the daemon may
        still be reading rows of a save of the old connection."""
        _sessions.add(self)

    # --- the connection ----------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether a connection is open, as far as is known."""
        return self._stream is not None

    @property
    def remote(self) -> bool:
        """Whether the daemon is on another machine, so that no memory is shared with it."""
        return isinstance(self.home, Remote)

    @property
    def greeted(self) -> bool:
        """Whether the daemon of this connection has answered the hello."""
        return self.welcome is not None

    def open(self) -> None:
        """Connect and say hello, without waiting; nothing if that is done already."""
        if self._stream is not None:
            return
        hello = protocol.Hello(role=self.role)
        self._frames, self._outgoing = Frames(), Outgoing()
        if isinstance(self.home, Remote):
            self._stream = self.home.connect()
            self._hello = self._put(hello)
        else:
            self._stream = connect(self.home)
            self.outbox = Outbox()
            self._hello = self._put(hello, self.outbox.descriptor)
        self._flush()

    def _open_within(self, seconds: float) -> None:
        """As `open`; while too many connect at once, try again."""
        deadline = time.monotonic() + seconds
        if isinstance(self.home, Remote):
            self.home.resolve(seconds)
        while True:
            try:
                self.open()
                return
            except OverloadError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_REST_S)

    def reconnect(self) -> None:
        """Forget what is in flight; the next message opens a new connection."""
        self._hang_up()

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._waiting.clear()
        self._answers.clear()
        self.welcome = None
        if self.arena >= 0:
            os.close(self.arena)
            self.arena = -1
        if self.outbox is not None:
            self.outbox.close()
            self.outbox = None

    def _lost(self, error: Exception | None = None) -> KVShareError:
        unwelcome = self.remote and self.welcome is None
        if isinstance(self.home, Remote):
            self.home.doubt()
        self._hang_up()
        gone: KVShareError = UnavailableError(f"the daemon of {self.home} is gone")
        if isinstance(error, ssl.SSLError):
            gone = DeniedError(f"no TLS with {self.home}: {reason_of(error)}; {MUST_HOLD}")
        elif unwelcome:
            gone = UnavailableError(
                f"{self.home} does not answer, or does not like our certificate: see its log"
            )
        gone.__cause__ = error
        return gone

    def close(self) -> None:
        """Let go of the connection."""
        self._hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- requests ----------------------------------------------------------------------------

    def send(self, message: protocol.Request) -> bytes:
        """Send without waiting; `receive` the answer by the returned id.

        `UnavailableError` if there is no daemon, or it has stopped reading.
        """
        self.open()
        request_id = self._put(message)
        self._flush()
        return request_id

    def _put(self, message: protocol.Request, descriptor: int = -1) -> bytes:
        if self._outgoing.nbytes > _UNSENT_BYTES:
            raise UnavailableError(f"the daemon of {self.home} takes no messages")
        request_id = next(self._ids).to_bytes(8, "little")
        self._outgoing.put(request_id, _encoded(message), descriptor)
        self._waiting.add(request_id)
        return request_id

    def _flush(self) -> None:
        assert self._stream is not None
        try:
            self._outgoing.flush(self._stream)
        except ssl.SSLCertVerificationError as error:  # it is we who hang up
            raise self._lost(error) from error
        except OSError as error:
            raise self._refusal() or self._lost(error) from error

    def _refusal(self) -> KVShareError | None:
        """Why the daemon has hung up, if it has said so."""
        with contextlib.suppress(DeadlineError):
            try:
                while self._stream is not None:
                    self._take(0.0)
            except KVShareError as error:
                return error
        return None

    def receive(self, request_id: bytes, timeout: float) -> Any:
        """The answer to a request, raw; `DeadlineError` after `timeout` seconds.

        After that, ask again later, or `forget` the request. `UnavailableError` if the connection
        was lost meanwhile.
        """
        deadline = time.monotonic() + timeout
        while request_id not in self._answers:
            if request_id not in self._waiting:
                raise UnavailableError("the answer was lost when the daemon went away")
            try:
                self._take(_left(deadline))
            except DeadlineError as error:
                message = f"the daemon of {self.home} did not answer in {timeout:.2f} s"
                raise DeadlineError(message) from error
        reply = self._answers.pop(request_id)
        if reply.error:
            raise error_for(reply.error, reply.message)
        return reply.result

    def _take(self, seconds: float) -> None:
        """Take in what has come; `DeadlineError` if nothing comes within `seconds`."""
        assert self._stream is not None
        waiting = select.poll()
        writes = self._outgoing.nbytes and wire.waits_to_write(self._stream)
        unsent = select.POLLOUT if writes else 0
        waiting.register(self._stream, select.POLLIN | unsent)
        events = waiting.poll(seconds * 1e3)
        if not events:
            raise DeadlineError("no answer has come")
        if events[0][1] & select.POLLIN:
            for frame in self._frames.feed(self._read()):
                self._answered(frame)
        elif events[0][1] & (select.POLLHUP | select.POLLERR):
            raise self._lost()
        else:
            self._flush()

    def _read(self) -> bytes:
        assert self._stream is not None
        try:
            if self.welcome is not None or not isinstance(self._stream, socket.socket):
                data = self._stream.recv(_READ_BYTES)
            else:
                data, descriptors = wire.receive(self._stream, _READ_BYTES)
                if descriptors:
                    self.arena = descriptors[0]
        except BlockingIOError:  # a part of TLS's own talk
            return b""
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost(EOFError())
        self.heard = time.monotonic()
        return data

    def _answered(self, frame: Frame) -> None:
        reply = protocol.decode_reply(frame.body)
        if frame.id == wire.NO_REQUEST or (frame.id == self._hello and reply.error):
            self._hang_up()  # it has cut us off, and says why
            raise error_for(reply.error, reply.message)
        if frame.id == self._hello:
            self.welcome = msgspec.convert(reply.result, protocol.Welcome)
        if frame.id in self._waiting:  # late answers of abandoned requests are dropped
            self._waiting.discard(frame.id)
            self._answers[frame.id] = reply

    def forget(self, request_id: bytes) -> None:
        """Nobody wants the answer to this request any more."""
        self._waiting.discard(request_id)
        self._answers.pop(request_id, None)

    def look(self) -> None:
        """Take in what has come, without waiting; `UnavailableError` if the daemon is gone."""
        with contextlib.suppress(DeadlineError):
            while self._stream is not None:
                self._take(0.0)

    def tell(self, message: protocol.Request) -> None:
        """Send without wanting the answer. What the daemon has said it denies is not sent."""
        self.look()  # answers that nobody reads would fill the socket
        if self.welcome is None or roles.allows(type(message), self.welcome.role):
            self.forget(self.send(message))

    def greet(self, timeout: float | None = None) -> protocol.Welcome:
        """Connect if need be and wait for the daemon's welcome.

        `UnavailableError` if there is no daemon, `ProtocolError` if it speaks another version.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        self._open_within(_left(deadline))
        if self.welcome is None:
            self.receive(self._hello, _left(deadline))
        if self.welcome is None:
            raise ProtocolError("the daemon has sent no welcome")
        return self.welcome

    def call(self, message: protocol.Request, timeout: float | None = None) -> Any:
        """Send and wait. A connection that was lost before is opened anew."""
        with contextlib.suppress(UnavailableError):
            self.look()
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        self._open_within(_left(deadline))
        request_id = self.send(message)
        try:
            return self.receive(request_id, _left(deadline))
        finally:
            self.forget(request_id)


def _left(deadline: float) -> float:
    """Seconds until then."""
    return max(0.0, deadline - time.monotonic())


def _encoded(message: protocol.Request) -> bytes:
    """`ConfigError` for what no message can hold: arguments that are not UTF-8, endless numbers."""
    try:
        return protocol.encode(message)
    except UnicodeEncodeError as error:
        raise ConfigError("a name or path is not UTF-8, which the daemon cannot be told") from error
    except OverflowError as error:
        raise ConfigError("a number is larger than any that the daemon can be told") from error


def _leave_to_parent() -> None:
    """In a forked child: the connections of the parent are the parent's alone."""
    for session in list(_sessions):
        session.reconnect()


os.register_at_fork(after_in_child=_leave_to_parent)
