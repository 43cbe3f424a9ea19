"""Rows of clients on other machines: out of the arena in pieces, and into a memory file of the
daemon's own from which they are saved as those of an outbox are.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

from kvshare_store.daemon import protocol
from kvshare_store.daemon.connection import Connection
from kvshare_store.daemon.engine_messages import PIECE_BYTES
from kvshare_store.errors import LeaseError, OverloadError, ProtocolError
from kvshare_store.store import Store

_BLOCK_BYTES = 512
"""Unit in which the system counts memory of files."""


def read_rows(store: Store, message: protocol.ReadRows) -> bytes:
    """A piece of a leased block. `LeaseError` if the lease has ended or names no such block."""
    ref = store.serving.leased_block(message.lease, message.block)
    arena = store.blocks.host.arena
    arena.check(ref)
    stop = min(message.start + PIECE_BYTES, ref.nbytes)
    piece = bytes(arena.rows(ref.offset, ref.nbytes)[message.start : stop])
    arena.check(ref)  # the same label: these are the rows that were planned
    return piece


@dataclass
class _Inbox:
    """Rows of one staged save."""

    staged: str
    descriptor: int
    """A copy of the client's: the client may go at any moment."""
    nbytes: int = 0
    """Of memory, as the system counts it: the place of a row says nothing about that."""
    last: float = field(default_factory=time.monotonic)
    """When the last rows came."""

    def empty(self) -> None:
        os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


class Inboxes:
    """Rows that remote clients have sent and not committed. Their memory is bounded. A client has
    more than half of it only until another needs room: then its save ends."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._inboxes: dict[str, _Inbox] = {}

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        with self._lock:
            return sum(inbox.nbytes for inbox in self._inboxes.values())

    def write(self, store: Store, client: Connection, message: protocol.WriteRows) -> None:
        """Keep some rows of a staged save of this client. `LeaseError` if it has no such save,
        `ProtocolError` beyond its rows, `OverloadError` while too many rows wait."""
        if not client.remote:
            raise ProtocolError("a client on the daemon's machine has an outbox")
        room = store.saving.wanted_bytes(message.staged, client.owner)
        stop = message.start + len(message.rows)
        if stop > room:
            raise ProtocolError(f"rows up to byte {stop:,} were sent for a save of {room:,} bytes")
        with self._lock:
            inbox = self._admit(store, client, message)
            left, at = memoryview(message.rows), message.start
            while len(left):
                written = os.pwrite(inbox.descriptor, left, at)
                left, at = left[written:], at + written
            inbox.nbytes = os.fstat(inbox.descriptor).st_blocks * _BLOCK_BYTES

    def _admit(self, store: Store, client: Connection, message: protocol.WriteRows) -> _Inbox:
        """Where the rows go. Hold the lock."""
        inbox = self._inboxes.get(client.owner)
        own = len(message.rows) + (inbox.nbytes if inbox is not None else 0)
        others = {name: it.nbytes for name, it in self._inboxes.items() if it is not inbox}
        if own + sum(others.values()) > self.most:
            largest = max(others, key=lambda name: others[name], default="")
            if own > self.most // 2 or others.get(largest, 0) <= self.most // 2:
                raise OverloadError("too many rows from other machines wait to be saved")
            self._end(store, largest)
        if client.gone:
            raise LeaseError("the client is gone")
        if client.outbox < 0:
            client.outbox = os.memfd_create("kvshare-inbox", os.MFD_CLOEXEC)
        if inbox is None:
            inbox = _Inbox(message.staged, os.dup(client.outbox))
            self._inboxes[client.owner] = inbox
        inbox.staged, inbox.last = message.staged, time.monotonic()
        return inbox

    def clear(self, client: Connection) -> None:
        """Give the memory of a client's rows back: its save has ended, or another begins."""
        with self._lock:
            inbox = self._inboxes.pop(client.owner, None)
            if inbox is not None:
                inbox.empty()

    def reap(self, store: Store, seconds: float) -> None:
        """End the saves for which no rows have come for so long."""
        since = time.monotonic() - seconds
        with self._lock:
            for owner in [name for name, inbox in self._inboxes.items() if inbox.last < since]:
                self._end(store, owner)

    def _end(self, store: Store, owner: str) -> None:
        inbox = self._inboxes.pop(owner)
        store.abandon(inbox.staged)  # before its rows go: it must not be committed without
        inbox.empty()
