"""The client's end where no memory is shared: leased rows are fetched, rows to be saved are sent.

Both keep a few pieces under way, so that the network is never idle and never full.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from kvshare_store.daemon import protocol
from kvshare_store.daemon.engine_messages import PIECE_BYTES
from kvshare_store.daemon.session import Session
from kvshare_store.errors import DeadlineError, LeaseError
from kvshare_store.errors.wording import short
from kvshare_store.plan import BlockRef

_UNDER_WAY = 6
"""Pieces. Together they are less than what a daemon keeps for a client that does not read."""
_PATIENCE_S = 10.0
"""For one piece."""
_SAVE_S = 600.0
"""For all rows of a save."""


class LeasedRows(Protocol):
    """Rows of leased blocks, wherever they are: what `ArenaView` has."""

    def rows(self, offset: int, nbytes: int) -> memoryview:
        """The rows of the block whose `BlockRef` has this offset."""

    def check(self, ref: BlockRef) -> None:
        """`LeaseError` unless these are the rows that the plan named."""


class Fetched:
    """Leased blocks that have come over the network."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[BlockRef, bytearray]] = {}

    def add(self, ref: BlockRef) -> bytearray:
        """Where the rows of a block are to be put."""
        return self._rows.setdefault(ref.offset, (ref, bytearray(ref.nbytes)))[1]

    def rows(self, offset: int, nbytes: int) -> memoryview:
        """As `LeasedRows`; `LeaseError` for a block that was not fetched."""
        if offset not in self._rows:
            raise LeaseError(f"the block at {offset:,} was not fetched")
        return memoryview(self._rows[offset][1])[:nbytes]

    def check(self, ref: BlockRef) -> None:
        """As `LeasedRows`."""
        if self._rows.get(ref.offset, (None,))[0] != ref:
            raise LeaseError(f"block {short(ref.name)} was not fetched")


class _Piece(NamedTuple):
    request_id: bytes
    target: memoryview
    """Where it goes; empty for a piece that was sent."""


class _Pieces:
    """Requests under way, answered in the order in which they were sent."""

    def __init__(self, session: Session, seconds: float) -> None:
        self._session = session
        self._deadline = time.monotonic() + seconds
        self._pieces: deque[_Piece] = deque()

    def send(self, message: protocol.Request, target: memoryview) -> None:
        """Send one; first take in the oldest where many are under way."""
        if len(self._pieces) >= _UNDER_WAY:
            self._take()
        self._pieces.append(_Piece(self._session.send(message), target))

    def settle(self) -> None:
        """Wait for all of them."""
        while self._pieces:
            self._take()

    def _take(self) -> None:
        request_id, target = self._pieces.popleft()
        left = min(_PATIENCE_S, self._deadline - time.monotonic())
        try:
            found = self._session.receive(request_id, max(0.0, left))
        except BaseException:
            for piece in (request_id, *(one.request_id for one in self._pieces)):
                self._session.forget(piece)
            self._pieces.clear()
            raise
        if not len(target):
            return
        if not isinstance(found, bytes) or len(found) != len(target):
            raise LeaseError("the daemon has sent other rows than it was asked for")
        target[:] = found


def fetch(session: Session, lease: str, refs: Sequence[BlockRef], seconds: float = 60.0) -> Fetched:
    """The rows of leased blocks. `LeaseError` if the lease has ended, `DeadlineError` if they do
    not come within `seconds`."""
    if seconds <= 0:
        raise DeadlineError("there is no time left to fetch rows in")
    fetched, pieces = Fetched(), _Pieces(session, seconds)
    for ref in dict.fromkeys(refs):
        rows = memoryview(fetched.add(ref))
        for start in range(0, ref.nbytes, PIECE_BYTES):
            message = protocol.ReadRows(lease, ref.name, start)
            pieces.send(message, rows[start : start + PIECE_BYTES])
    pieces.settle()
    return fetched


class WireOutbox:
    """What an `Outbox` is, for a daemon on another machine: rows are sent as they are written."""

    def __init__(self, session: Session, staged: str) -> None:
        self._staged = staged
        self._pieces = _Pieces(session, _SAVE_S)

    def write(self, offset: int, data: Any) -> int:
        """As `Outbox.write`; whatever the daemon says to a piece is raised later."""
        rows = memoryview(data).cast("B")
        for start, piece in _cut(rows):
            message = protocol.WriteRows(self._staged, offset + start, bytes(piece))
            self._pieces.send(message, memoryview(b""))
        return len(rows)

    def settle(self) -> None:
        """Wait until the daemon has all rows."""
        self._pieces.settle()


def _cut(rows: memoryview) -> Iterator[tuple[int, memoryview]]:
    for start in range(0, len(rows), PIECE_BYTES):
        yield start, rows[start : start + PIECE_BYTES]
