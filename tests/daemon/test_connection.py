"""How much of what a client sends is taken at once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol, wire
from kvshare_store.daemon.connection import Budget, Connection, Limits
from tests.support.daemons import serving
from tests.support.peer import PATIENCE_S, Peer

MANY = 300


@pytest.fixture
def connection() -> Iterator[Connection]:
    """A client that has sent `MANY` messages, of which none is taken."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(MANY * (wire.HEADER.pack(4, bytes(8)) + b"body"))
        client = Connection(ours, Limits(), Budget(1 << 30, 1 << 30), monotonic())
        client.greeted = True
        client.read(monotonic())
        yield client


def taken(connection: Connection) -> int:
    return sum(1 for _ in connection.take())


def test_a_new_client_has_one_more_request_under_way_with_each_answer(
    connection: Connection,
) -> None:
    assert taken(connection) == 1
    assert connection.room == 0
    connection.done(4)
    assert taken(connection) == 2
    for _ in range(2):
        connection.done(4)
    assert taken(connection) == 4


def test_a_client_whose_messages_are_valid_has_any_number_under_way(
    connection: Connection,
) -> None:
    for _ in range(8):
        taken(connection)
        while connection.under_way:
            connection.done(4)
    assert taken(connection) == 64
    assert connection.room == 64


def test_a_client_with_a_malformed_message_has_one_request_under_way(
    connection: Connection,
) -> None:
    taken(connection)
    connection.done(4, malformed=True)
    for _ in range(100):
        assert taken(connection) == 1
        connection.done(4)


def test_a_request_that_waits_does_not_keep_the_next_one_waiting(tmp_path: Path) -> None:
    over = threading.Event()
    config = StoreConfig(home=str(tmp_path / "home"), semantic="never")
    with serving(config) as server, Peer(config.home_path) as peer:
        peer.hello()
        server.store.nodes.queue.call(lambda: over.wait(PATIENCE_S))
        try:
            for _ in range(8):
                peer.send(protocol.encode(protocol.Flush()), b"a flush.")
            reply = peer.ask(protocol.Stats())
        finally:
            over.set()
    assert not reply.error
