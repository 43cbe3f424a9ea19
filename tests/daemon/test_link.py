"""The engine's end: a daemon that dies or hangs costs reuse and nothing else."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from kvshare_store.blocks.tiers.disk import files
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import link as link_module
from kvshare_store.daemon import protocol, wire
from kvshare_store.daemon.address import home_taken
from kvshare_store.daemon.client import Client, plan_request
from kvshare_store.daemon.link import Link, open_link
from kvshare_store.daemon.server import Server
from kvshare_store.daemon.spawn import Spawned
from kvshare_store.errors import DeadlineError, HomeError, StorageError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node
from kvshare_store.plan import ReusePlan
from kvshare_store.tensors.layout import KVLayout
from tests.support import waiting
from tests.support.daemons import ClientDriver, Daemon, serving
from tests.support.oracle import prompt

pytestmark = pytest.mark.fault

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
TOKENS = np.asarray(prompt(1, 40), np.int32)
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def spawned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Processes of the daemons that links bring back; they end with the test."""
    found: list[int] = []
    spawn = link_module.spawn_daemon

    def watched(config: StoreConfig) -> Spawned:
        daemon = spawn(config)
        found.append(daemon.pid)
        return daemon

    monkeypatch.setattr(link_module, "spawn_daemon", watched)
    yield found
    for pid in found:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            process.kill()
            process.wait(PATIENCE_S)


@pytest.fixture
def daemon(config: Callable[..., StoreConfig]) -> Iterator[Daemon]:
    with Daemon(config()) as running:
        yield running


@pytest.fixture
def link(daemon: Daemon) -> Iterator[Link]:
    opened = open_link(daemon.config, timeout=PATIENCE_S)
    yield opened
    opened.close()


def asked(link: Link) -> bytes | None:
    return link.ask(plan_request(TOKENS, NAMESPACE, None))


def planned(link: Link, seconds: float) -> ReusePlan | None:
    """What the scheduler does with a request."""
    request = asked(link)
    if request is None:
        return None
    try:
        return link.answer(request, seconds)
    except DeadlineError:
        link.give_up(request)
        return None


def planned_in_the_end(link: Link) -> ReusePlan:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        plan = planned(link, 1.0)
        if plan is not None:
            return plan
        time.sleep(0.05)
    raise AssertionError("the link did not recover")


def save(home: Path) -> None:
    with Client(home, timeout=PATIENCE_S) as client:
        ClientDriver(client, NAMESPACE).save(TOKENS.tolist())
        client.flush()


def test_a_killed_daemon_is_brought_back(
    daemon: Daemon,
    link: Link,
    home: Path,
    spawned: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(home)
    first = planned_in_the_end(link)
    assert first.exact == 39
    spawn, may_start = link_module.spawn_daemon, threading.Event()

    def late(config: StoreConfig) -> Spawned:
        assert may_start.wait(PATIENCE_S), "a request waited for the new daemon"
        return spawn(config)

    monkeypatch.setattr(link_module, "spawn_daemon", late)
    daemon.kill()
    assert planned(link, PATIENCE_S) is None
    assert asked(link) is None, "the next requests are not even asked"
    assert "unavailable" in link.failures
    may_start.set()
    assert planned_in_the_end(link).exact == 39
    assert psutil.pid_exists(spawned[-1])
    with Client(home, timeout=PATIENCE_S) as client:
        assert client.stats()["errors"].get("unavailable", 0) >= 1, "the new daemon is told"


def test_where_somebody_else_starts_daemons_engines_only_wait(
    config: Callable[..., StoreConfig], home: Path, spawned: list[int]
) -> None:
    """Else an engine would hold the home when systemd or Kubernetes restarts its daemon."""
    theirs = config(start_daemon=False)
    link = open_link(theirs, timeout=0.3)
    try:
        assert planned(link, 0.2) is None
        assert not home_taken(home)
        with Daemon(theirs) as daemon:
            planned_in_the_end(link)
            daemon.kill()
            assert planned(link, 0.2) is None
    finally:
        link.close()
    assert spawned == []


def test_a_lookup_that_no_message_can_hold_is_its_own_miss(link: Link, spawned: list[int]) -> None:
    """The daemon cuts off whoever sends more than it takes, and with it the lookups of others."""
    planned_in_the_end(link)
    other = link.ask(plan_request(TOKENS, NAMESPACE, None))
    assert other is not None
    for count in (1 << 18, wire.MESSAGE_BYTES // 4, 8 << 20):
        asked = link.ask(plan_request(np.full(count, 7, np.int32), NAMESPACE, None))
        assert (asked is None) == (count >= wire.MESSAGE_BYTES // 4)
        if asked is not None:
            assert link.answer(asked, PATIENCE_S) is not None
    too_long = plan_request(TOKENS, NAMESPACE.for_tenant("x" * 1025), None)
    assert link.ask(too_long) is None, "its namespace has too long a name"
    assert link.answer(other, PATIENCE_S) is not None
    assert planned(link, PATIENCE_S) is not None
    assert link.failures == []
    assert spawned == []


def test_a_hanging_daemon_is_waited_for_a_few_times(
    daemon: Daemon, link: Link, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(home)
    assert planned_in_the_end(link).exact == 39
    daemon.send(signal.SIGSTOP)
    answer, now, waits = link.answer, time.monotonic(), list[float]()

    def watched(request: bytes, seconds: float) -> ReusePlan | None:
        waits.append(seconds)
        return answer(request, seconds)

    try:
        with monkeypatch.context() as patch:  # no pause ends, however slow this machine is
            patch.setattr(link_module, "time", SimpleNamespace(monotonic=lambda: now))
            patch.setattr(link, "answer", watched)
            assert [planned(link, 0.1) for _ in range(200)] == [None] * 200
        assert waits == [0.1] * 4
    finally:
        daemon.send(signal.SIGCONT)
    assert planned_in_the_end(link).exact == 39
    assert daemon.process is not None
    assert daemon.process.poll() is None, "it kept its home"


def test_without_any_daemon_every_request_is_a_miss(config: Callable[..., StoreConfig]) -> None:
    link = open_link(config(host_bytes=1 << 60), timeout=PATIENCE_S)
    assert [planned(link, 0.1) for _ in range(5)] == [None] * 5
    assert link.failures
    link.close()


def test_failures_that_could_not_be_told_are_told_later(link: Link) -> None:
    link.failures = ["timeout", "unavailable"]
    link.paused_until = time.monotonic() + 60
    assert planned(link, PATIENCE_S) is None
    assert link.failures == ["timeout", "unavailable"]
    link.paused_until = 0.0
    assert planned(link, PATIENCE_S) is not None
    assert link.failures == []


def test_a_home_that_cannot_be_used_is_said_at_once(
    config: Callable[..., StoreConfig], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(HomeError, match="choose another"):
        open_link(config(home=str(tmp_path / "file")))


# --- a daemon that is slow ------------------------------------------------------------------------


@pytest.fixture
def server(config: Callable[..., StoreConfig]) -> Iterator[Server]:
    with serving(config()) as running:
        yield running


def stuck(server: Server) -> threading.Event:
    """From now on the first tenant's lookups wait for the event."""
    plan_soon, event = server.store.plan_soon, threading.Event()

    def waiting(tokens: Any, namespace: Namespace, **others: Any) -> Any:
        if namespace.tenant == "a":
            assert event.wait(PATIENCE_S)
        return plan_soon(tokens, namespace, **others)

    server.store.plan_soon = waiting  # type: ignore[method-assign]
    return event


def test_a_late_plan_is_its_requests_miss_and_no_more(
    server: Server, spawned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pause, no new connection, no process: other requests are planned as ever."""
    event, link = stuck(server), Link(server.config)
    link.client.greet(PATIENCE_S)
    reconnects: list[None] = []
    monkeypatch.setattr(link.client, "reconnect", lambda: reconnects.append(None))
    late = link.ask(plan_request(TOKENS, NAMESPACE.for_tenant("a"), None))
    assert late is not None
    with pytest.raises(DeadlineError):
        link.answer(late, 0.01)
    link.give_up(late)
    other = link.ask(plan_request(TOKENS, NAMESPACE.for_tenant("b"), None))
    assert other is not None, "the next lookup is asked at once"
    plan = link.answer(other, PATIENCE_S)
    assert plan is not None
    assert plan.declined == "empty_store"
    assert reconnects == []
    assert link.client.connected
    assert spawned == []
    event.set()
    link.close()


def test_several_late_plans_in_a_row_are_a_hung_daemon(daemon: Daemon, spawned: list[int]) -> None:
    link = Link(daemon.config)
    link.client.greet(PATIENCE_S)
    link.pause = PATIENCE_S  # however slow this machine is
    daemon.send(signal.SIGSTOP)
    assert daemon.process is not None
    stopped = psutil.Process(daemon.process.pid)
    until(lambda: stopped.status() == psutil.STATUS_STOPPED, what="it works on")
    asked = 0
    while (request := link.ask(plan_request(TOKENS, NAMESPACE, None))) is not None:
        link.give_up(request)
        asked += 1
    daemon.send(signal.SIGCONT)
    assert asked == 4
    assert spawned == [], "one that hangs keeps the home: no other can serve it"
    link.paused_until = 0.0
    assert planned_in_the_end(link).declined == "empty_store"
    link.close()


def test_nobody_waits_for_a_hung_daemons_welcome(daemon: Daemon) -> None:
    """The lookup is on its way before the daemon has said anything."""
    link = Link(daemon.config)
    daemon.send(signal.SIGSTOP)
    try:
        request = link.ask(plan_request(TOKENS, NAMESPACE, None))
        assert request is not None
        assert not link.client.greeted
    finally:
        daemon.send(signal.SIGCONT)
    plan = link.answer(request, PATIENCE_S)
    assert plan is not None
    assert plan.declined == "empty_store"
    assert link.client.greeted
    link.close()


def test_it_is_said_that_the_daemon_is_gone(
    daemon: Daemon, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    planned_in_the_end(link)
    daemon.kill()
    assert planned(link, PATIENCE_S) is None
    assert "is gone; this engine starts one" in caplog.text
    assert "in time" not in caplog.text


def test_a_stuck_lookup_keeps_nobody_else_waiting(server: Server) -> None:
    """Neither another engine's lookups and saves, nor whoever asks how it is."""
    event = stuck(server)
    with Client(server.config.home_path, timeout=PATIENCE_S) as client:
        stuck_one = client.send(plan_request(TOKENS, NAMESPACE.for_tenant("a"), None))
        with Client(server.config.home_path, timeout=PATIENCE_S) as other:
            driver = ClientDriver(other, NAMESPACE)
            driver.save(TOKENS.tolist())
            other.flush()
            assert driver.serve(TOKENS.tolist()).exact == 39
            assert other.stats()["daemon"]["requests"] == 2
            assert other.call(protocol.ListNodes(3))
        event.set()
        client.receive(stuck_one, PATIENCE_S)


def test_status_waits_neither_for_the_lock_nor_for_the_disk(
    config: Callable[..., StoreConfig], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    with serving(config()):
        save(home)
    measured = threading.Event()
    measure = files.measure

    def slowly(path: str) -> tuple[int, int] | None:
        assert not path.endswith(".kvb") or measured.wait(PATIENCE_S)
        return measure(path)

    monkeypatch.setattr(files, "measure", slowly)
    with serving(config()) as running, Client(home, timeout=PATIENCE_S) as client:
        try:
            with running.store.nodes.lock:
                stats = client.stats()
            assert stats["nodes"] == 1
            assert stats["health"]["state"] == "ok"
        finally:
            measured.set()


# --- engines that work ----------------------------------------------------------------------------


until = partial(waiting.until, seconds=PATIENCE_S)


def works(server: Server) -> bool:
    """Whether the daemon takes an engine for working."""
    return bool(server.store.text.busy)


def test_a_new_daemon_hears_that_the_engine_works(config: Callable[..., StoreConfig]) -> None:
    with serving(config()) as first:
        link = open_link(first.config, timeout=PATIENCE_S)
        link.working(True)
        until(lambda: works(first))
    with serving(config()) as second:
        planned_in_the_end(link)
        until(lambda: works(second))
        link.working(False)
        until(lambda: not works(second))
        link.close()


def test_an_engine_that_left_is_not_working(server: Server) -> None:
    """What it said last is heard after its connection has ended, and before what it held ends."""
    working, event, heard = server.store.text.working, threading.Event(), list[bool]()

    def late(owner: str, busy: bool) -> None:
        assert event.wait(PATIENCE_S)
        working(owner, busy)
        heard.append(works(server))

    server.store.text.working = late  # type: ignore[method-assign]
    with Client(server.config.home_path, timeout=PATIENCE_S) as engine:
        engine.greet()
        engine.tell(protocol.Working(True))
        until(lambda: server.switchboard.under_way == 1)
    until(lambda: not server.switchboard.connections)
    event.set()
    until(lambda: bool(heard) and not works(server))
    assert heard == [True]


def test_a_list_is_of_one_moment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes are used, and so change their order, but not while they are listed."""
    lock, newest = server.store.nodes.lock, server.store.tree.newest
    used_meanwhile: list[bool] = []

    def use() -> None:
        used_meanwhile.append(lock.acquire(blocking=False))
        if used_meanwhile[-1]:
            lock.release()

    def watched(count: int) -> list[Node]:
        using = threading.Thread(target=use)
        using.start()
        using.join()
        return newest(count)

    monkeypatch.setattr(server.store.tree, "newest", watched)
    with Client(server.config.home_path, timeout=PATIENCE_S) as client:
        driver = ClientDriver(client, NAMESPACE)
        ids = {driver.save(prompt(seed, 16)) for seed in range(6)}
        listed = [node["id"] for node in client.call(protocol.ListNodes(100))]
    assert (len(listed), set(listed)) == (6, ids)
    assert used_meanwhile == [False]


def test_saves_are_refused_and_lookups_go_on_while_nothing_can_be_stored(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(nodes: object) -> None:
        raise ZeroDivisionError("a bug")

    with Client(server.config.home_path, timeout=PATIENCE_S) as client:
        driver = ClientDriver(client, NAMESPACE)
        driver.save(TOKENS.tolist())
        client.flush()
        with monkeypatch.context() as patch:
            patch.setattr(server.store.repository.durable, "store", broken)
            for seed in range(2, 5):
                driver.save(prompt(seed, 40))
                with pytest.raises(StorageError, match="1 prompts were not stored"):
                    client.flush()
            with pytest.raises(StorageError, match="nothing can be stored at present"):
                driver.save(prompt(9, 40))
        health = client.stats()["health"]
        assert health["state"] == "degraded"
        assert "ZeroDivisionError" in health["reasons"]["kvshare-commit"]
        assert driver.serve(TOKENS.tolist()).exact == 39
        assert client.stats()["nodes"] == 1, "what could not be stored is no node"
        server.store.metrics.health.well("kvshare-commit")
        driver.save(prompt(9, 40))
        client.flush()
        assert client.stats()["health"]["state"] == "ok"
