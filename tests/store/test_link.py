"""The engine's end: a daemon that dies or hangs costs reuse and nothing else."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.link import Link, open_link
from kvshare_store.errors import DeadlineError, HomeError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.daemons import ClientDriver, Daemon
from kvshare_store.testing.oracle import prompt

pytestmark = pytest.mark.fault

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
TOKENS = np.asarray(prompt(1, 40), np.int32)
PATIENCE_S = 60.0


@pytest.fixture
def daemon(config: Callable[..., StoreConfig]) -> Iterator[Daemon]:
    with Daemon(config()) as running:
        yield running


@pytest.fixture
def link(daemon: Daemon) -> Iterator[Link]:
    opened = open_link(daemon.config, timeout=PATIENCE_S)
    yield opened
    end(opened)


def end(link: Link) -> None:
    """Close it, and end the daemon that it has started."""
    reviver = link._reviver
    if reviver is not None:
        reviver._thread.join(PATIENCE_S)
        if reviver.spawned is not None:
            reviver.spawned.send(signal.SIGKILL)
            assert reviver.spawned.wait(PATIENCE_S)
    link.close()


def planned(link: Link, seconds: float) -> ReusePlan | None:
    """What the scheduler does with a request."""
    request = link.ask(TOKENS, NAMESPACE, None)
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


def test_a_killed_daemon_is_brought_back(daemon: Daemon, link: Link, home: Path) -> None:
    save(home)
    first = planned_in_the_end(link)
    assert first.exact == 39
    daemon.kill()
    start = time.monotonic()
    assert planned(link, 0.2) is None
    assert time.monotonic() - start < 10.0
    assert planned(link, 0.2) is None, "the next requests do not wait at all"
    assert "unavailable" in link.failures
    assert planned_in_the_end(link).exact == 39
    assert link._reviver is not None
    assert link._reviver.spawned is not None
    assert not link._reviver.spawned.ended
    with Client(home, timeout=PATIENCE_S) as client:
        assert client.stats()["errors"].get("unavailable", 0) >= 1, "the new daemon is told"


def test_a_hanging_daemon_is_waited_for_once(daemon: Daemon, link: Link, home: Path) -> None:
    save(home)
    assert planned_in_the_end(link).exact == 39
    daemon.send(signal.SIGSTOP)
    try:
        assert planned(link, 0.2) is None
        start = time.monotonic()
        for _ in range(200):
            planned(link, 0.2)
        assert time.monotonic() - start < 10.0
    finally:
        daemon.send(signal.SIGCONT)
    assert planned_in_the_end(link).exact == 39
    assert daemon.process is not None
    assert daemon.process.poll() is None, "it kept its home"


def test_without_any_daemon_every_request_is_a_miss(config: Callable[..., StoreConfig]) -> None:
    link = open_link(config(host_bytes=1 << 60), timeout=PATIENCE_S)
    assert [planned(link, 0.1) for _ in range(5)] == [None] * 5
    assert link.failures
    end(link)


def test_failures_that_could_not_be_told_are_told_later(link: Link) -> None:
    link.failures = ["timeout", "unavailable"]
    link._paused_until = time.monotonic() + 60
    link._tell_failures()
    assert link.failures == ["timeout", "unavailable"]
    link._paused_until = 0.0
    link._tell_failures()
    assert link.failures == []


def test_a_home_that_cannot_be_used_is_said_at_once(
    config: Callable[..., StoreConfig], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(HomeError, match="choose another"):
        open_link(config(home=str(tmp_path / "file")))
