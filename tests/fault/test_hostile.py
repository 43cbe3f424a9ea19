"""Malicious clients: they cost the daemon nothing lasting, and other clients are served."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import psutil
import pytest

from kvshare_store.daemon import connection, protocol, switchboard, wire
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.connection import Limits
from kvshare_store.daemon.server import Server
from kvshare_store.errors import (
    DeadlineError,
    HomeError,
    NodeError,
    OverloadError,
    ProtocolError,
)
from kvshare_store.lookup import serving
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.save.staging import Reuse
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support import waiting
from tests.support.attacks import ATTACKS, RUBBISH, Attack, attacking, hoarded
from tests.support.daemons import ClientDriver, Daemon, DaemonProgram
from tests.support.fuzz import MIB, fuzz, left_over, requests, small
from tests.support.needs import need
from tests.support.oracle import Driver, RowBook, prompt
from tests.support.peer import Peer

pytestmark = pytest.mark.fault

SPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
PATIENCE_S = 60.0
tenants = itertools.count()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests: nothing that was done to it before may matter."""
    with DaemonProgram(small(str(tmp_path_factory.mktemp("hostile")))) as running:
        yield running


def held(daemon: Daemon) -> tuple[int, int]:
    """Memory in bytes, and open descriptors of a daemon."""
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    return process.memory_info().rss, process.num_fds()


def check_served(daemon: Daemon, seed: int) -> Namespace:
    """Another client, with a new tenant, stores and finds a prompt; returns the tenant's
    namespace."""
    space = SPACE.for_tenant(str(next(tenants)))
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as client:
        driver = ClientDriver(client, space)
        driver.save(prompt(seed, 64))
        assert driver.serve(prompt(seed, 64)).exact == 63
    return space


until = partial(waiting.until, seconds=PATIENCE_S)


def check_nothing_lasts(daemon: Daemon, before: tuple[int, int], room: int = 32 * MIB) -> None:
    check_served(daemon, 999)
    assert left_over(daemon) == {}
    until(lambda: held(daemon)[1] <= before[1] + 2)  # the store's own files open and close
    assert held(daemon)[0] < before[0] + room


def warmed_up(daemon: Daemon) -> tuple[int, int]:
    """What the daemon holds once everything has been used."""
    for seed in range(3):
        check_served(daemon, seed)
    left_over(daemon)
    return held(daemon)


# --- what is sent -----------------------------------------------------------------------------


def test_messages_that_no_client_would_send(daemon: Daemon) -> None:
    report = fuzz(daemon, 20_000, seed=7)
    assert report.left == {}
    assert report.grown_bytes < 48 * MIB
    assert {"fine", "protocol", "plan", "node", "cut off"} <= set(report.answers)
    assert not report.answers["internal"], daemon.log()


def test_connections_that_come_and_go(daemon: Daemon) -> None:
    before, chance = warmed_up(daemon), random.Random(1)
    for _ in range(10_000):
        with contextlib.suppress(OSError, OverloadError), Peer(daemon.config.home_path) as peer:
            peer.socket.sendall(chance.choice(RUBBISH))
    check_nothing_lasts(daemon, before)


@pytest.mark.parametrize("greeted", [False, True])
def test_a_message_that_is_too_long_is_refused_before_it_is_read(
    daemon: Daemon, greeted: bool
) -> None:
    before = warmed_up(daemon)
    with Peer(daemon.config.home_path) as peer:
        if greeted:
            peer.hello()
        peer.socket.sendall(wire.HEADER.pack(512 * MIB, bytes(8)))
        reply = peer.receive()
        assert reply is not None
        assert (reply.error, "over the limit" in reply.message) == ("protocol", True)
        assert peer.receive() is None, "it is cut off"
    check_nothing_lasts(daemon, before)


def test_descriptors_that_nobody_asked_for_are_closed(daemon: Daemon) -> None:
    before = warmed_up(daemon)
    reading, writing = os.pipe()
    with Peer(daemon.config.home_path) as peer:
        peer.hello()
        for _ in range(20):
            peer.send_with(protocol.encode(protocol.Stats()), [reading] * 8)
            assert peer.receive() is not None
        until(lambda: held(daemon)[1] <= before[1] + 4)  # none of the 160
    with Peer(daemon.config.home_path) as peer:
        peer.send_with(protocol.encode(protocol.Hello()), [reading])
        reply = peer.receive()
        assert reply is not None
        assert "no memory file" in reply.message, "reading from a pipe could wait for ever"
    os.close(reading)
    os.close(writing)
    check_nothing_lasts(daemon, before)


# --- what is not done -------------------------------------------------------------------------


def asks_for_ever(peer: Peer) -> None:
    while True:
        peer.send(protocol.encode(protocol.Stats()))


def test_a_client_that_stops_reading_is_cut_off(daemon: Daemon) -> None:
    before = warmed_up(daemon)
    with Peer(daemon.config.home_path) as peer:
        peer.hello()
        with pytest.raises(ConnectionError):
            asks_for_ever(peer)
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as client:
        assert client.stats()["daemon"]["cut_off"] >= 1
    check_nothing_lasts(daemon, before)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[Limits], Server]]:
    """`server(limits)`: a daemon in this process."""
    started: list[tuple[Server, threading.Thread]] = []

    def start(limits: Limits) -> Server:
        running = Server(small(str(tmp_path)), limits)
        thread = threading.Thread(target=running.serve)
        thread.start()
        started.append((running, thread))
        return running

    yield start
    for running, thread in started:
        running.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_one_that_says_no_hello_and_one_that_stalls_are_cut_off(
    server: Callable[[Limits], Server],
) -> None:
    running = server(Limits(hello_s=0.1, stalled_s=0.1))
    home = running.config.home_path
    with Peer(home) as silent, Peer(home) as slow, Client(home, timeout=PATIENCE_S) as client:
        client.greet()
        slow.hello()
        slow.socket.sendall(wire.HEADER.pack(100, bytes(8)) + b"the beginning")
        assert silent.receive() is None
        assert slow.receive() is None
        assert client.stats()["daemon"]["connections"] == 1, "one that is merely quiet stays"


def test_more_requests_than_it_takes_are_refused_and_can_be_repeated(
    server: Callable[[Limits], Server],
) -> None:
    running = server(Limits(requests=4))
    waiting = threading.Event()
    running.store.plan_soon = lambda *_, **__: waiting.wait(PATIENCE_S)  # type: ignore[assignment,method-assign]
    plan = protocol.Plan(SPACE, bytes(160))
    with Client(running.config.home_path, timeout=PATIENCE_S) as greedy:
        requests = [greedy.send(plan) for _ in range(6)]
        for refused in requests[4:]:
            with pytest.raises(OverloadError, match="ask again later") as error:
                greedy.receive(refused, PATIENCE_S)
            assert error.value.retryable
        with Client(running.config.home_path, timeout=PATIENCE_S) as other:
            assert other.stats()["daemon"]["requests"] == 5
        waiting.set()
        for accepted in requests[:4]:
            greedy.receive(accepted, PATIENCE_S)
        assert greedy.stats()["daemon"]["requests"] == 1


def test_who_asks_too_much_is_not_heard_for_a_while(
    server: Callable[[Limits], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To refuse one request after the other would take the processor from everybody else."""
    monkeypatch.setattr(switchboard, "_BUSY_S", PATIENCE_S)
    running = server(Limits(requests=1))
    waiting = threading.Event()
    running.store.plan_soon = lambda *_, **__: waiting.wait(PATIENCE_S)  # type: ignore[assignment,method-assign]
    home, plan = running.config.home_path, protocol.Plan(SPACE, bytes(160))
    with Client(home, timeout=PATIENCE_S) as greedy, Client(home, timeout=PATIENCE_S) as other:
        accepted, refused = greedy.send(plan), greedy.send(plan)
        with pytest.raises(OverloadError, match="ask again later"):
            greedy.receive(refused, PATIENCE_S)
        unheard = greedy.send(plan)
        assert other.stats()["daemon"]["requests"] == 2
        waiting.set()
        greedy.receive(accepted, PATIENCE_S)
        assert other.stats()["daemon"]["requests"] == 1
        with pytest.raises(DeadlineError):
            greedy.receive(unheard, 0.1)


def many(body: bytes, count: int) -> bytes:
    """The same message again and again, to be sent in one piece."""
    return count * (wire.HEADER.pack(len(body), b"request1") + body)


def test_who_sends_much_at_once_is_refused_some_of_it_at_a_time(
    server: Callable[[Limits], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switchboard, "_BUSY_S", PATIENCE_S)
    monkeypatch.setattr(connection, "_AT_ONCE", 4)
    running = server(Limits(requests=1))
    waiting = threading.Event()
    running.store.plan_soon = lambda *_, **__: waiting.wait(PATIENCE_S)  # type: ignore[assignment,method-assign]
    with Peer(running.config.home_path) as greedy:
        greedy.hello()
        for _ in range(4):  # from here on it may have any number under way
            assert not greedy.ask(protocol.Stats()).error
        greedy.socket.sendall(many(protocol.encode(protocol.Plan(SPACE, bytes(160))), 20))
        for _ in range(3):
            reply = greedy.receive()
            assert reply is not None
            assert reply.error == "overload"
        greedy.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            greedy.receive()
        waiting.set()


def test_who_sends_much_at_once_keeps_nobody_waiting(
    server: Callable[[Limits], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read brings ten thousand small messages, which are a tenth of a second of work."""
    monkeypatch.setattr(connection, "_AT_ONCE", 2)
    running = server(Limits())
    request, heard = running.request, list[str]()
    begun, asked = threading.Event(), threading.Event()

    def noted(one: connection.Connection, frame: wire.Frame) -> None:
        if not heard:
            begun.set()
            assert asked.wait(PATIENCE_S)
        heard.append(one.owner)
        request(one, frame)

    with Peer(running.config.home_path) as greedy, Peer(running.config.home_path) as other:
        greedy.hello()
        other.hello()
        running.request = noted  # type: ignore[method-assign]
        stats = protocol.encode(protocol.Stats())
        greedy.socket.sendall(many(stats, 20))
        assert begun.wait(PATIENCE_S)
        other.send(stats)
        asked.set()
        assert other.receive() is not None
        assert all(greedy.receive() is not None for _ in range(20)), "all are answered some time"
    assert [one != heard[0] for one in heard].index(True) < 10


def test_all_that_was_sent_counts_when_its_client_has_gone(
    server: Callable[[Limits], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_AT_ONCE", 2)
    running = server(Limits())
    with Peer(running.config.home_path) as peer:
        peer.hello()
        peer.socket.sendall(many(protocol.encode(protocol.Decline("policy_off", 1)), 21))
    until(lambda: running.store.metrics.declined == {"policy_off": 21})
    until(lambda: not running.switchboard.connections)


def test_connections_are_let_in_a_few_at_a_time(
    server: Callable[[Limits], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens one after the other leaves the processor to those who are there."""
    monkeypatch.setattr(switchboard, "_AT_ONCE", 2)
    monkeypatch.setattr(switchboard, "_PAUSE_S", PATIENCE_S)
    running = server(Limits())
    with ExitStack() as opened:
        home = running.config.home_path
        clients = [opened.enter_context(Client(home, timeout=PATIENCE_S)) for _ in range(2)]
        for client in clients:
            client.greet()
        opened.enter_context(Peer(home))
        for client in clients:
            assert client.stats()["daemon"]["connections"] == 2


def test_bytes_under_way_are_counted_over_all_connections(
    server: Callable[[Limits], Server],
) -> None:
    home = server(Limits(all_request_bytes=10_000)).config.home_path
    with Peer(home) as one, Peer(home) as two:
        one.hello()
        two.hello()
        one.socket.sendall(wire.HEADER.pack(9_000, bytes(8)) + b"the beginning")
        until(lambda: two.ask(protocol.Decline("x" * 100, 1)).error == "")
        two.send(bytes(2_000))
        reply = two.receive()
        assert reply is not None
        assert reply.error == "overload"
        one.close()
        until(lambda: (two.send(bytes(2_000)), two.receive().error)[1] == "protocol")  # type: ignore[union-attr]


# --- what is held -----------------------------------------------------------------------------


def test_a_client_that_holds_all_it_can(daemon: Daemon) -> None:
    """Leases, staged saves and the connection: all of it ends with the connection."""
    before = warmed_up(daemon)
    space = check_served(daemon, 1)
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as greedy:
        for _ in range(200):
            assert greedy.plan(prompt(1, 64), space).lease
        staged = greedy.stage(np.asarray(prompt(77, 4000), np.int32), space, Reuse())
        assert staged.id
        assert greedy.stats()["leases"] == 200
        check_served(daemon, 2)
    check_nothing_lasts(daemon, before)


def test_leases_of_one_client_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_LEASES", 3)
    with Store(small(str(tmp_path))) as store:
        Driver(store, SPACE).save(prompt(1, 64))
        plans = [store.plan(prompt(1, 64), SPACE, owner="greedy") for _ in range(4)]
        assert [plan.declined for plan in plans] == ["", "", "", "too_many_leases"]
        assert store.plan(prompt(1, 64), SPACE, owner="other").lease
        store.finish(plans[0], Outcome(exact=63, recomputed=1))
        assert store.plan(prompt(1, 64), SPACE, owner="greedy").lease
        store.reap({"greedy"})
        assert store.plan(prompt(1, 64), SPACE, owner="greedy").lease


def test_a_burst_of_lookups_delays_its_own_client(server: Callable[[Limits], Server]) -> None:
    """Lookups beyond its queue are refused; another client's lookup is answered at once."""
    running = server(Limits())
    plan_soon, event = running.store.plan_soon, threading.Event()

    def stuck(tokens: Any, namespace: Namespace, **others: Any) -> Any:
        assert namespace.tenant or event.wait(PATIENCE_S)
        return plan_soon(tokens, namespace, **others)

    running.store.plan_soon = stuck  # type: ignore[method-assign]
    home = running.config.home_path
    with Client(home, timeout=PATIENCE_S) as greedy, Client(home, timeout=PATIENCE_S) as other:
        plans = (protocol.Plan(SPACE, bytes(160), request=f"chat-{n}") for n in range(100))
        asked = list(map(greedy.send, plans))
        with pytest.raises(OverloadError, match="ask again later"):
            greedy.receive(asked[-1], PATIENCE_S)
        for _ in range(3):
            plan = other.plan(prompt(1, 64), SPACE.for_tenant("other"))
            assert plan.declined == "empty_store"
        running.store.reload(msgspec.structs.replace(running.config, plan_deadline_ms=1e-3))
        event.set()
        late = msgspec.convert(greedy.receive(asked[10], PATIENCE_S), ReusePlan)
        assert late.declined == "late", "nobody makes plans that nobody waits for"
        (logged,) = other.call(protocol.ListRequests(request="chat-10"))
        assert (logged["reason"], logged["model"]) == ("late", SPACE.model)


def test_a_purge_that_waits_holds_up_nobody_and_ends_with_its_client(
    server: Callable[[Limits], Server],
) -> None:
    running = server(Limits())
    home = running.config.home_path
    with Client(home, timeout=PATIENCE_S) as holder:
        driver = ClientDriver(holder, SPACE)
        node = driver.save(prompt(1, 64))
        assert holder.plan(prompt(1, 64), SPACE).lease
        with Client(home, timeout=PATIENCE_S) as hostile:
            for patience in (1e300, float("nan"), 601.0, -1.0):
                with pytest.raises(ProtocolError):
                    hostile.call(protocol.Purge(SPACE.digest, None, patience))
            hostile.send(protocol.Purge(SPACE.digest, None, 600.0))
            until(lambda: SPACE.digest in running.store.nodes.namespaces.closed)
            assert holder.call(protocol.Collect(True)) is not None
            with pytest.raises(NodeError):
                holder.call(protocol.Pin(str(node)))
        until(lambda: SPACE.digest not in running.store.nodes.namespaces.closed)


def test_reports_of_numbers_that_cannot_be(daemon: Daemon) -> None:
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as client:
        for tokens in (2**63 - 1, -1):
            with pytest.raises(ProtocolError):
                client.call(protocol.EngineCached(tokens))
        assert client.stats()["tokens_engine_cached"] < 2**60


def test_the_fuzzer_sends_every_kind_of_request() -> None:
    sent = {type(message) for message in requests()}
    assert sent == set(get_args(protocol.Request)) - {protocol.Stop}


def test_more_connections_than_it_takes(server: Callable[[Limits], Server]) -> None:
    home = server(Limits(connections=8)).config.home_path
    with contextlib.ExitStack() as peers:
        silent = [peers.enter_context(Peer(home)) for _ in range(8)]
        first = [peers.enter_context(Peer(home)).hello() for _ in range(8)]
        assert all(one.receive() is None for one in silent), "who says hello comes first"
        with Client(home, timeout=PATIENCE_S) as client, pytest.raises(OverloadError, match="8"):
            client.stats()
        first.pop().close()
        with Client(home, timeout=PATIENCE_S) as client:
            until(lambda: _served(client))


def _served(client: Client) -> bool:
    try:
        return bool(client.stats())
    except OverloadError:
        return False


def test_it_has_descriptors_for_all_its_clients(daemon: Daemon) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    need(most >= 4096, "room for 4,096 descriptors")
    assert daemon.process is not None
    assert psutil.Process(daemon.process.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == most


# --- who it is --------------------------------------------------------------------------------

OTHER = "import os, sys, socket; os.setgid(54321); os.setuid(54321); os.chdir(sys.argv[1]);"


def test_another_user_is_not_let_in(daemon: Daemon) -> None:
    """Even if the file system would allow it: the kernel tells who the peer is."""
    need(os.geteuid() == 0, "root")
    home = daemon.config.home_path
    with opened_to_all(home):
        os.chmod(home / "kvshare.sock", 0o666)
        code = OTHER + (
            "s = socket.socket(socket.AF_UNIX); s.connect('kvshare.sock'); s.settimeout(60);"
            "print(s.recv(100))"
        )
        said = subprocess.run(
            [sys.executable, "-c", code, str(home)], capture_output=True, text=True, check=False
        )
    assert said.stdout == "b''\n" or "Reset" in said.stderr, said


def test_a_socket_of_another_user_is_not_believed(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    home = tmp_path / "home"
    home.mkdir()
    code = OTHER + (
        "s = socket.socket(socket.AF_UNIX); s.bind('kvshare.sock'); s.listen();"
        "print(1, flush=True);"
        "c = s.accept()[0]; print(c.recv(1000), flush=True)"
    )
    with opened_to_all(home):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, text=True
        )
        with other:
            assert other.stdout is not None
            assert other.stdout.readline() == "1\n"
            with Client(home) as client, pytest.raises(HomeError, match="belongs to user 54321"):
                client.plan(prompt(1, 40), SPACE)
            assert other.stdout.readline() == "b''\n", "it was told nothing"


@contextlib.contextmanager
def opened_to_all(home: Path) -> Iterator[None]:
    """Every folder on the path can be entered, and the last one can be written to."""
    above = [folder for folder in home.parents if folder.stat().st_mode & 0o077 != 0o077]
    modes = [(folder, folder.stat().st_mode) for folder in (home, *above)]
    for folder, mode in modes:
        folder.chmod(mode | (0o077 if folder == home else 0o011))
    yield
    for folder, mode in modes:
        folder.chmod(mode)


# --- the end during each ----------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_it_ends_in_good_order_under_attack(attack: Attack, tmp_path: Path) -> None:
    config = msgspec.structs.replace(small(str(tmp_path)), drain_seconds=1.0)
    book = RowBook(SPACE.layout)
    home = config.home_path
    with Daemon(config) as daemon, attacking(attack, home), Client(home, timeout=60.0) as client:
        driver = ClientDriver(client, SPACE, book)
        for seed in range(5):
            driver.save(prompt(seed, 64))
        if attack is hoarded:
            until(lambda: client.stats()["leases"] > 0)
            assert client.stats()["staged"] > 0
        assert daemon.end() == 0, daemon.log()
    with Store(config) as store:
        found = Driver(store, SPACE, book)
        assert [found.serve(prompt(seed, 64)).exact for seed in range(5)] == [63] * 5


def test_a_frozen_client_is_not_dead(daemon: Daemon) -> None:
    """It keeps what it holds until its connection ends, however long it stands still."""
    code = (
        "import sys, time\nfrom tests.support.daemons import *\n"
        "from kvshare_store.tensors.layout import KVLayout\n"
        "from tests.support.oracle import prompt\n"
        "client = Client(sys.argv[1], timeout=60)\n"
        "space = Namespace('model', KVLayout(2, 1, 4, 'float32')).for_tenant(sys.argv[2])\n"
        "assert client.plan(prompt(888, 64), space).lease\n"
        "print('holding', flush=True)\ntime.sleep(600)\n"
    )
    tenant = check_served(daemon, 888).tenant
    environment = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(daemon.config.home_path), tenant]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as frozen:
        try:
            assert frozen.stdout is not None
            assert frozen.stdout.readline() == b"holding\n"
            frozen.send_signal(signal.SIGSTOP)
            with Client(daemon.config.home_path, timeout=PATIENCE_S) as client:
                for _ in range(3):  # it looks for dead clients once a second
                    time.sleep(1.0)
                    assert client.stats()["leases"] == 1
                frozen.kill()
                until(lambda: client.stats()["leases"] == 0)
        finally:
            frozen.kill()


def test_a_socket_pair_is_of_this_user() -> None:
    one, two = socket.socketpair()
    with one, two:
        assert wire.peer(one) == (os.getpid(), os.getuid())
