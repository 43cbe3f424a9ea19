"""The thread of the HTTP server: what happens when it fails, and when its daemon is busy."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.server import Server
from kvshare_store.errors import UnavailableError
from kvshare_store.http import asking, guard, health, serving
from kvshare_store.http.address import entrance
from kvshare_store.http.history import History
from kvshare_store.http.serving import THREAD, HttpServer
from kvshare_store.observability.threads import Health
from tests.support import waiting
from tests.support.page import Numb
from tests.support.stores import SMALL

PATIENCE_S = 60.0


until = partial(waiting.until, seconds=PATIENCE_S)


@pytest.fixture
def numb(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Numb, HttpServer]]:
    monkeypatch.setattr(serving, "_SILENT_S", 0.2)
    monkeypatch.setattr(serving, "_UNREAD_S", 0.2)
    monkeypatch.setattr(guard, "_BODY_S", 0.2)
    monkeypatch.setattr(serving, "_DRAIN_S", 0)
    daemon = Numb()
    server = HttpServer(daemon, Health(), entrance(daemon.config))
    yield daemon, server
    server.close()


def get(server: HttpServer, path: str) -> httpx.Response:
    return httpx.get(server.address.url.rstrip("/") + path, timeout=PATIENCE_S)


def test_a_server_that_dies_shows_in_health_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uvicorn.Server.serve
    broken = threading.Event()
    broken.set()

    async def serve(self: uvicorn.Server, sockets: Any = None) -> None:
        if broken.is_set():
            raise RuntimeError("no more")
        await whole(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    daemon, health_ = Numb(), Health()
    server = HttpServer(daemon, health_, entrance(daemon.config))
    try:
        until(lambda: health_.failing(THREAD))
        assert health_.report()["reasons"] == {THREAD: "RuntimeError: no more"}
        broken.clear()
        until(lambda: bool(daemon.asked))
        assert get(server, "/healthz").status_code == 200
    finally:
        server.close()


def test_a_server_that_lives_is_well(home: Path) -> None:
    daemon = Server(StoreConfig(home=str(home), http="127.0.0.1:0", **SMALL))
    trouble = daemon.store.metrics.health
    trouble.failed(THREAD, RuntimeError("of a moment ago"))
    server = HttpServer(daemon, trouble, entrance(daemon.config))
    daemon.attach(server)
    try:
        until(lambda: not trouble.failing(THREAD))
        assert get(server, "/readyz").json() == {"ready": True, "state": "ok"}
        daemon.drain()
        answer = get(server, "/readyz")
        assert (answer.status_code, answer.json()["state"]) == (503, "draining")
    finally:
        daemon.close()
    with pytest.raises(httpx.ConnectError):
        get(server, "/healthz")
    with pytest.raises(UnavailableError):
        daemon.ask(protocol.Stats())


def test_counting_that_fails_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, "take", lambda *_: 1 / 0)
    daemon, health_ = Numb(), Health()
    server = HttpServer(daemon, health_, entrance(daemon.config))
    try:
        until(lambda: bool(daemon.asked))
        daemon.answers[0].set_result({})
        until(lambda: health_.failing(THREAD))
        assert "division by zero" in health_.report()["reasons"][THREAD]
    finally:
        server.close()


def test_a_bug_is_an_answer_and_is_counted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Server(StoreConfig(home=str(home), http="127.0.0.1:0", **SMALL))
    server = HttpServer(daemon, daemon.store.metrics.health, entrance(daemon.config))
    daemon.attach(server)
    try:
        monkeypatch.setattr(daemon.store.requests, "last", lambda *_, **__: 1 / 0)
        answer = get(server, "/api/requests")
        assert (answer.status_code, answer.json()["error"]) == (500, "internal")
        assert "see its log" in answer.json()["message"]
        assert daemon.store.metrics.errors == {"internal": 1}
        assert get(server, "/readyz").status_code == 200
    finally:
        daemon.close()


def test_who_waits_too_long_is_told_and_wants_no_answer(
    numb: tuple[Numb, HttpServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, server = numb
    monkeypatch.setattr(health, "READY_S", 0.1)
    answer = get(server, "/readyz")
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    monkeypatch.setattr(asking.Asking.__call__, "__defaults__", (0.1,))
    late = get(server, "/api/requests")
    assert (late.status_code, late.json()["error"]) == (504, "timeout")
    until(lambda: all(given_up() for _, given_up in daemon.asked[-2:]))


def test_closing_waits_for_no_answer(
    numb: tuple[Numb, HttpServer], caplog: pytest.LogCaptureFixture
) -> None:
    daemon, server = numb
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            get(server, "/api/requests")
        except httpx.HTTPError as error:
            caught.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    until(lambda: len(daemon.asked) > 1)
    server.close()
    asker.join(PATIENCE_S)
    assert not asker.is_alive()
    assert daemon.asked[-1][1](), "whoever works on it is told that nobody wants it"
    assert [record for record in caplog.records if record.exc_info] == [], "no fault of ours"


def test_connections_that_say_nothing_keep_nobody_out(numb: tuple[Numb, HttpServer]) -> None:
    """There are only so many, and half a request is nothing."""
    _, server = numb
    silent = [socket.create_connection(server.address) for _ in range(200)]
    try:
        for one in silent[::2]:
            one.sendall(b"GET /healthz HT")
        until(lambda: get(server, "/healthz").status_code == 200)
        assert silent[0].recv(1) == silent[1].recv(1) == b"", "ended by the other side"
    finally:
        for one in silent:
            one.close()


ALIVE = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def ended(there: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    there.settimeout(PATIENCE_S)
    said = b""
    try:
        while more := there.recv(65536):
            said += more
    except ConnectionResetError:
        pass
    return said


@pytest.mark.parametrize(
    "sent",
    [
        ALIVE,
        ALIVE + b"GET / HTTP/1.1\r\nX",
        b"POST /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\nx",
        b"POST /api/explain HTTP/1.1\r\nHost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\nx",
    ],
    ids=["nothing more", "half a request more", "a body that nobody reads", "half a body"],
)
def test_a_connection_ends_that_had_its_answer(numb: tuple[Numb, HttpServer], sent: bytes) -> None:
    with socket.create_connection(numb[1].address) as there:
        there.sendall(sent)
        assert ended(there).startswith(b"HTTP/1.1 ")


def test_half_a_request_after_an_answer_ends_too(numb: tuple[Numb, HttpServer]) -> None:
    with socket.create_connection(numb[1].address) as there:
        there.sendall(ALIVE)
        assert there.recv(65536).startswith(b"HTTP/1.1 200")
        there.sendall(b"GET / HTTP/1.1\r\nX")
        assert ended(there).count(b"HTTP/1.1") == 0


@pytest.mark.usefixtures("numb")
def test_a_connection_ends_whose_answers_nobody_reads() -> None:
    daemon = Numb()
    way = entrance(daemon.config)
    way.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    server = HttpServer(daemon, Health(), way)
    try:
        with socket.socket() as there:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            there.settimeout(PATIENCE_S)
            there.connect(server.address)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                there.sendall(ALIVE * 100_000)  # it takes no more at some time, and then ends it
    finally:
        server.close()


def test_a_body_byte_by_byte_has_one_deadline(numb: tuple[Numb, HttpServer]) -> None:
    head = b"POST /explain HTTP/1.1\r\nHost: 127.0.0.1\r\ncontent-length: 999\r\n\r\n"
    with socket.create_connection(numb[1].address) as there:
        there.sendall(head)
        there.settimeout(0.01)  # between two bytes
        said = b""
        deadline = time.monotonic() + PATIENCE_S
        while not said:
            assert time.monotonic() < deadline
            there.sendall(b" ")
            try:
                said = there.recv(65536)
            except TimeoutError:
                continue
        assert said.startswith(b"HTTP/1.1 408 ")


def test_only_so_many_connections_are_held(
    numb: tuple[Numb, HttpServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_SILENT_S", PATIENCE_S)
    monkeypatch.setattr(serving, "_OPEN", 3)
    _, server = numb
    until(lambda: get(server, "/healthz").status_code == 200)
    held = [socket.create_connection(server.address) for _ in range(6)]
    try:
        for one in held[3:]:
            assert ended(one) == b""
        held[0].sendall(ALIVE)
        assert held[0].recv(65536).startswith(b"HTTP/1.1 200")
    finally:
        for one in held:
            one.close()


def test_that_no_descriptor_is_left_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    try:
        say = serving.Unforeseen()
        for _ in range(3):
            say(loop, {"message": "m", "exception": OSError(errno.EMFILE, "Too many open files")})
        say(loop, {"message": "something else", "exception": OSError(errno.EPIPE, "pipe")})
    finally:
        loop.close()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["kvshare: the page cannot accept connections: Too many open files",
                    "something else"]  # fmt: skip
