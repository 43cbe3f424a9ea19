"""Frames on a stream connection: length, request id, body. Both sides are one machine.

A frame is `length of the body (uint32, little-endian)`, `request id (8 bytes)`, `body`. The answer
to a request has the same id. A descriptor travels with the first byte of a frame (SCM_RIGHTS).
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator

HEADER = struct.Struct("<I8s")
NO_REQUEST = bytes(8)
"""Id of what answers no request: why a connection was refused."""
_PEER = struct.Struct("3i")
_DESCRIPTOR = array.array("i", [0]).itemsize

MIB = 1 << 20
MESSAGE_BYTES = 16 * MIB
"""The largest message that a daemon accepts: a prompt of four million tokens."""


class Frame:
    """A message that is being received. Its `body` grows until it is complete."""

    def __init__(self, request_id: bytes, nbytes: int, kept: bool) -> None:
        self.id = request_id
        self.nbytes = nbytes
        self.kept = kept
        """False: the body is read and dropped."""
        self.body = bytearray()
        self._left = nbytes

    def take(self, data: memoryview) -> int:
        """Take the bytes of this frame from the beginning of `data`; returns how many."""
        count = min(self._left, len(data))
        if self.kept:
            self.body += data[:count]
        self._left -= count
        return count

    @property
    def complete(self) -> bool:
        """Whether the whole body has come."""
        return not self._left


class Frames:
    """Cuts a stream of bytes into frames.

    `admit(nbytes)` is called when a header is complete, before any of the body is kept. A frame
    that it refuses is read and dropped, and comes out with `kept` False.
    """

    def __init__(self, admit: Callable[[int], bool] = lambda _: True) -> None:
        self._admit = admit
        self._head = bytearray()
        self.frame: Frame | None = None
        """The current, incomplete frame."""

    @property
    def midway(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return bool(self._head) or self.frame is not None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Each frame that `data` completes, before anything after it is looked at."""
        rest = memoryview(data)
        while len(rest):
            if self.frame is None:
                rest = rest[self._take_header(rest) :]
            if self.frame is not None:
                rest = rest[self.frame.take(rest) :]
                if self.frame.complete:
                    frame, self.frame = self.frame, None
                    yield frame

    def _take_header(self, data: memoryview) -> int:
        count = min(HEADER.size - len(self._head), len(data))
        self._head += data[:count]
        if len(self._head) == HEADER.size:
            nbytes, request_id = HEADER.unpack(self._head)
            self._head.clear()
            self.frame = Frame(request_id, nbytes, self._admit(nbytes))
        return count


class Outgoing:
    """Bytes to be sent on a non-blocking socket, each piece perhaps with a descriptor."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[memoryview, int]] = deque()
        self.nbytes = 0

    def put(self, request_id: bytes, body: bytes, descriptor: int = -1) -> None:
        """Queue a frame. The descriptor must stay open until it is sent."""
        frame = memoryview(HEADER.pack(len(body), request_id) + body)
        self._pieces.append((frame, descriptor))
        self.nbytes += len(frame)

    def flush(self, connection: socket.socket) -> int:
        """Send what the socket accepts now; returns how many bytes. `OSError` if the other side is
        gone."""
        sent = 0
        while self._pieces:
            piece, descriptor = self._pieces[0]
            try:
                count = _send(connection, piece, descriptor)
            except BlockingIOError:
                break
            sent += count
            if count == len(piece):
                self._pieces.popleft()
            else:
                self._pieces[0] = piece[count:], -1
        self.nbytes -= sent
        return sent

    def clear(self) -> None:
        """Drop everything."""
        self._pieces.clear()
        self.nbytes = 0


def _send(connection: socket.socket, data: memoryview, descriptor: int) -> int:
    if descriptor < 0:
        return connection.send(data)
    rights = array.array("i", [descriptor])
    return connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def receive(connection: socket.socket, nbytes: int) -> tuple[bytes, list[int]]:
    """Bytes and at most one descriptor; the system closes any others that were sent along.

    `BlockingIOError` if nothing is there, no bytes if the other side is gone. Where no descriptor
    is expected, use plain `recv`: the system then closes them all.
    """
    room = socket.CMSG_LEN(_DESCRIPTOR)
    data, ancillary, _, _ = connection.recvmsg(nbytes, room, socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(raw[: len(raw) - len(raw) % _DESCRIPTOR])
    return data, list(found)


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other side, from the kernel.

    The process id is 0 if the process lives in a namespace that this one cannot see.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _ = _PEER.unpack(raw)
    return pid, uid


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that nobody wants."""
    for descriptor in descriptors:
        os.close(descriptor)
