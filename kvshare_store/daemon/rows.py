"""Rows of clients on other machines: out of the arena in pieces, and into a memory file of the
daemon's own from which they are saved as those of an outbox are.
"""

from __future__ import annotations

import os
import threading

from kvshare_store.daemon import protocol
from kvshare_store.daemon.connection import Connection
from kvshare_store.errors import LeaseError, OverloadError, ProtocolError
from kvshare_store.store import Store


def read_rows(store: Store, message: protocol.ReadRows) -> bytes:
    """A piece of a leased block. `LeaseError` if the lease has ended or names no such block."""
    ref = store.leased_block(message.lease, message.block)
    arena = store.blocks.host.arena
    arena.check(ref)
    stop = min(message.start + protocol.PIECE_BYTES, ref.nbytes)
    piece = bytes(arena.rows(ref.offset, ref.nbytes)[message.start : stop])
    arena.check(ref)  # the same label: these are the rows that were planned
    return piece


class Inboxes:
    """Rows that remote clients have sent and not committed. Their memory is bounded."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        with self._lock:
            return sum(self._sizes.values())

    def write(self, store: Store, client: Connection, message: protocol.WriteRows) -> None:
        """Keep some rows of a staged save of this client. `LeaseError` if it has no such save,
        `ProtocolError` beyond its rows, `OverloadError` while too many rows wait."""
        if not client.remote:
            raise ProtocolError("a client on the daemon's machine has an outbox")
        room = store.staged_bytes(message.staged, client.owner)
        stop = message.start + len(message.rows)
        if stop > room:
            raise ProtocolError(f"rows up to byte {stop:,} were sent for a save of {room:,} bytes")
        with self._lock:
            size = max(stop, self._sizes.get(client.owner, 0))
            others = sum(self._sizes.values()) - self._sizes.get(client.owner, 0)
            if size + others > self.most:
                raise OverloadError("too many rows from other machines wait to be saved")
            if client.gone:
                raise LeaseError("the client is gone")
            self._sizes[client.owner] = size
            if client.outbox < 0:
                client.outbox = os.memfd_create("kvshare-inbox", os.MFD_CLOEXEC)
        left, at = memoryview(message.rows), message.start
        while len(left):
            written = os.pwrite(client.outbox, left, at)
            left, at = left[written:], at + written

    def clear(self, client: Connection) -> None:
        """Give the memory of a client's rows back: its save has ended, or another begins."""
        with self._lock:
            some = self._sizes.pop(client.owner, 0)
        if some and client.outbox >= 0:
            os.ftruncate(client.outbox, 0)
