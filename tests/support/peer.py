"""A peer of the daemon that sends whatever it likes; it is not a proper client."""

from __future__ import annotations

import array
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvshare_store.daemon import protocol, wire
from kvshare_store.daemon.address import connect

PATIENCE_S = 60.0


class Peer:
    """One connection. `OSError` once the daemon has closed it."""

    def __init__(self, home: Path, patience: float = PATIENCE_S) -> None:
        self.socket = connect(home)
        self.socket.settimeout(patience)
        self._frames = wire.Frames()
        self._heard: list[wire.Frame] = []

    def send(self, body: bytes, request_id: bytes = b"request1") -> None:
        """Send one frame."""
        self.socket.sendall(wire.HEADER.pack(len(body), request_id) + body)

    def send_with(self, body: bytes, descriptors: Sequence[int]) -> None:
        """Send one frame, and descriptors along with it."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        frame = wire.HEADER.pack(len(body), b"request1") + body
        self.socket.sendmsg([frame], [rights])

    def receive(self) -> protocol.Reply | None:
        """The next answer; None once the daemon has closed the connection. `TimeoutError` if
        nothing comes."""
        while not self._heard:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:  # closed before everything was read
                data = b""
            if not data:
                return None
            self._heard += self._frames.feed(data)
        return protocol.decode_reply(self._heard.pop(0).body)

    def ask(self, message: Any) -> protocol.Reply:
        """Send a message and wait for the answer."""
        self.send(protocol.encode(message))
        reply = self.receive()
        assert reply is not None, "the daemon has hung up"
        return reply

    def hello(self) -> Self:
        """Say hello as a client does, but without an outbox."""
        assert not self.ask(protocol.Hello()).error
        return self

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
