"""Lanes: what takes long in one holds up none of the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest

from kvshare_store.daemon import protocol
from kvshare_store.daemon.lanes import Lanes
from kvshare_store.errors import OverloadError
from tests.support import waiting

PATIENCE_S = 60.0
until = partial(waiting.until, seconds=PATIENCE_S)


@pytest.fixture
def busy() -> Iterator[Lanes]:
    """Lanes with an explanation under way that lasts."""
    failures: list[BaseException] = []
    lanes, begun, over = Lanes(failures.append), threading.Event(), threading.Event()

    def last() -> None:
        begun.set()
        assert over.wait(PATIENCE_S)

    lanes.submit("one", protocol.Explain, last)
    assert begun.wait(PATIENCE_S)
    yield lanes
    over.set()
    assert lanes.close(PATIENCE_S, lambda: None)
    assert not failures


def test_explanations_hold_up_neither_chores_nor_new_settings(busy: Lanes) -> None:
    assert busy.ask("two", protocol.Pin, lambda: "pinned").result(PATIENCE_S) == "pinned"
    read = threading.Event()
    busy.run("reload", read.set)
    assert read.wait(PATIENCE_S)


def test_a_client_queues_few_explanations(busy: Lanes) -> None:
    for _ in range(8):
        busy.submit("one", protocol.Explain, lambda: None)
    with pytest.raises(OverloadError, match="8 such requests wait already"):
        busy.submit("one", protocol.Diff, lambda: None)
    busy.submit("two", protocol.Diff, lambda: None)
    assert {lane: count for lane, count in busy.waiting().items() if count} == {"explain": 9}


# --- one client beside others ---------------------------------------------------------------------


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    failures: list[BaseException] = []
    running = Lanes(failures.append)
    yield running
    assert running.close(PATIENCE_S, lambda: None)
    assert not failures


@pytest.mark.parametrize(("others", "begun"), [(False, 2), (True, 1)])
def test_a_client_has_two_threads_for_lookups_and_one_while_others_ask(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch, others: bool, begun: int
) -> None:
    monkeypatch.setattr("kvshare_store.daemon.lanes._OTHERS_S", PATIENCE_S)
    if others:
        lanes.ask("two", protocol.Plan, lambda: None).result(PATIENCE_S)
    at_once, over = threading.Semaphore(0), threading.Event()

    def look_up() -> None:
        at_once.release()
        assert over.wait(PATIENCE_S)

    for _ in range(3):
        lanes.submit("one", protocol.Plan, look_up)
    try:
        for _ in range(begun):
            assert at_once.acquire(timeout=PATIENCE_S)
        assert lanes.waiting()["lookup"] == 3 - begun
    finally:
        over.set()
    for _ in range(3 - begun):
        assert at_once.acquire(timeout=PATIENCE_S), "all are answered some time"


def test_a_client_queues_few_chores(lanes: Lanes) -> None:
    """They take long, and what a client holds ends after all that it has asked for."""
    begun, over = threading.Event(), threading.Event()

    def last() -> None:
        begun.set()
        assert over.wait(PATIENCE_S)

    lanes.submit("one", protocol.Collect, last)
    try:
        assert begun.wait(PATIENCE_S)
        for _ in range(64):
            lanes.submit("one", protocol.Collect, lambda: None)
        with pytest.raises(OverloadError, match="64 such requests wait already"):
            lanes.submit("one", protocol.Pin, lambda: None)
        lanes.submit("two", protocol.Collect, lambda: None)
    finally:
        over.set()


def test_chores_leave_time_to_others(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that asks for collections without end would else take a core."""
    rests: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=rests.append)
    monkeypatch.setattr("kvshare_store.daemon.lanes.time", clock)
    lanes.submit("one", protocol.Collect, lambda: time.sleep(0.11))
    until(lambda: rests == [0.1])
    lanes.ask("one", protocol.Plan, lambda: None).result(PATIENCE_S)
    lanes.submit("one", protocol.Collect, lambda: None)
    until(lambda: len(rests) == 2)
    assert 0.0 <= rests[1] < 0.1
