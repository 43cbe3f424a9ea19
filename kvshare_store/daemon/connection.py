"""The daemon's end of one client's connection, and what a client may take of the daemon."""

from __future__ import annotations

import itertools
import os
import selectors
import socket
from collections.abc import Iterator
from typing import NamedTuple

from kvshare_store.daemon import wire
from kvshare_store.daemon.protocol import Role
from kvshare_store.daemon.wire import MIB, Frame, Frames, Outgoing, Stream
from kvshare_store.errors import ProtocolError

_READ_BYTES = 1 << 18
"""Read from one connection at a time."""
_AT_ONCE = 64
"""So many messages of one connection are taken before the next one has its turn."""
_numbers = itertools.count(1)


class Limits(NamedTuple):
    """What clients may take. docs/design/daemon.md says what happens to one that takes more."""

    connections: int = 1024
    hello_bytes: int = 4096
    """A message of somebody who has not said hello."""
    hello_s: float = 5.0
    """Time to say hello in."""
    message_bytes: int = wire.MESSAGE_BYTES
    requests: int = 1024
    """Requests of one connection that are not answered yet, and their bytes ..."""
    request_bytes: int = 64 * MIB
    all_requests: int = 8192
    """... and those of all connections."""
    all_request_bytes: int = 256 * MIB
    answer_bytes: int = 4 * MIB
    """Answers that one client has not read, beside the newest."""
    stalled_s: float = 30.0
    """Time in which some of a message must come, or some of an answer be read."""


class Budget:
    """Requests and bytes that may be under way. One thread's."""

    def __init__(self, count: int, nbytes: int, above: Budget | None = None) -> None:
        self._count = count
        self._nbytes = nbytes
        self._above = above
        self.taken = 0
        """Requests under way."""

    def take(self, nbytes: int) -> bool:
        """Take room for a request; False, and nothing taken, if there is none."""
        if self.taken >= self._count or nbytes > self._nbytes:
            return False
        if self._above is not None and not self._above.take(nbytes):
            return False
        self.taken += 1
        self._nbytes -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        """Give the room back."""
        self.taken -= 1
        self._nbytes += nbytes
        if self._above is not None:
            self._above.give(nbytes)


class Connection:
    """One client. What it holds is held under the name `owner`, and ends with the connection."""

    def __init__(self, stream: Stream, limits: Limits, above: Budget, now: float) -> None:
        """`stream`: a socket of this machine, or one with TLS."""
        self.role: Role = "admin"
        """What it may ask for; less, if its hello says so."""
        self.stream = stream
        self.owner = f"client-{next(_numbers)}"
        self.greeted = False
        self.remote = not isinstance(stream, socket.socket)
        """It is on another machine, so nothing is mapped: rows travel as messages."""
        self.outbox = -1
        """Descriptor of the client's memory file, from its hello; of a remote client's, the
        daemon's own."""
        self.gone = False
        """Nothing more comes from it or goes to it."""
        self.ended = False
        """It is gone, and nothing that it had asked for is under way."""
        self.leaving = False
        """It is cut off once it has been told why."""
        self.unheard = False
        """It was told to ask later, and nothing is taken from it for a while."""
        self.behind = False
        """There may be messages that have been read and not taken."""
        self.events = selectors.EVENT_READ
        """What the loop waits for; 0 if for nothing."""
        self._answered = 0
        """Requests that were answered."""
        self._malformed = False
        """One of them was malformed."""
        self._limits = limits
        self._budget = Budget(limits.requests, limits.request_bytes, above)
        self._frames = Frames(self._admit)
        self._come: Iterator[Frame] = iter(())
        self._outgoing = Outgoing()
        self.began = self._moved = now

    # --- in ----------------------------------------------------------------------------------

    def read(self, now: float) -> None:
        """Read what `take` returns, once all that was read before is taken. `EOFError` or `OSError`
        if the client is gone."""
        data = self._receive()
        if not data:
            raise EOFError
        self._moved = now
        self._come = self._frames.feed(data)

    def take(self) -> Iterator[Frame]:
        """The next messages that have come, as many as others may wait for. `ProtocolError` where
        the client sends what it may not."""
        self.behind = False
        for _ in range(max(1, self.room)):
            frame = next(self._come, None)
            if frame is None:
                return
            yield frame
        self.behind = True

    def _receive(self) -> bytes:
        if self.greeted or not isinstance(self.stream, socket.socket):
            return self.stream.recv(_READ_BYTES if self.greeted else self._limits.hello_bytes)
        data, descriptors = wire.receive(self.stream, self._limits.hello_bytes)
        if self.outbox >= 0:
            wire.close_all(descriptors)
        elif descriptors:
            self.outbox = descriptors[0]
        return data

    def _admit(self, nbytes: int) -> bool:
        most = self._limits.message_bytes if self.greeted else self._limits.hello_bytes
        if nbytes > most:
            raise ProtocolError(f"a message of {nbytes:,} bytes is over the limit of {most:,}")
        return self._budget.take(nbytes)

    @property
    def under_way(self) -> int:
        """Requests that have begun to come and are not answered."""
        return self._budget.taken

    @property
    def room(self) -> int:
        """How many of its requests may begin now.

        A new client may have one under way, and one more for each that was answered. A client that
        has sent a malformed one may have one for good: were many of those answered at once, in all
        lanes, lookups of other clients would take ten times as long.
        """
        if self._answered >= _AT_ONCE and not self._malformed:
            return _AT_ONCE
        most = 1 if self._malformed else 1 + self._answered
        return most - self.under_way + self._frames.midway

    def done(self, nbytes: int, *, malformed: bool = False) -> None:
        """A request of `nbytes` bytes is answered; `malformed`: by a `ProtocolError`."""
        self._budget.give(nbytes)
        self._malformed = self._malformed or malformed
        self._answered += 1

    # --- out ---------------------------------------------------------------------------------

    def put(self, request_id: bytes, body: bytes, descriptor: int = -1) -> None:
        """Queue an answer. `OverflowError` if the client does not read those before it."""
        if self.gone:
            return
        if self._outgoing.nbytes > self._limits.answer_bytes:
            raise OverflowError("it does not read its answers")
        self._outgoing.put(request_id, body, descriptor)

    def flush(self, now: float) -> None:
        """Send what can be sent. A client that is gone is noticed when it is read from: what it
        had sent before still counts."""
        before = self._outgoing.nbytes
        try:
            sent = self._outgoing.flush(self.stream)
        except OSError:
            self._outgoing.clear()
            return
        if sent or not before:
            self._moved = now

    @property
    def unsent(self) -> int:
        """Bytes of answers that wait."""
        return self._outgoing.nbytes

    # --- the end -----------------------------------------------------------------------------

    def overdue(self, now: float) -> str:
        """Why it is to be cut off now, or nothing."""
        if not self.greeted:
            return "it says no hello" if now - self.began > self._limits.hello_s else ""
        stuck = self._frames.midway or self._outgoing.nbytes
        if stuck and now - self._moved > self._limits.stalled_s:
            return "a message to or from it has stalled"
        return ""

    def hang_up(self) -> None:
        """Close the connection; a message that was coming in is given up."""
        self.gone = True
        self.stream.close()
        self._outgoing.clear()
        self._come = iter(())
        frame = self._frames.frame
        if frame is not None and frame.kept:
            self.done(frame.nbytes)

    def let_go(self) -> None:
        """Close the outbox, once nobody reads from it."""
        if self.outbox >= 0:
            os.close(self.outbox)
            self.outbox = -1
