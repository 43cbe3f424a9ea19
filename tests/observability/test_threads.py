"""Threads that are started again, and what is said about them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvshare_store.blocks.io_loop import IoLoop
from kvshare_store.errors import StorageError
from kvshare_store.observability.threads import STORING, Health, Supervised
from tests.support.neighbours import Machine, until

PATIENCE_S = 60.0


def test_a_thread_that_fails_is_started_again() -> None:
    health, runs, done = Health(), [0], threading.Event()

    def body() -> None:
        runs[0] += 1
        if runs[0] == 1:
            raise ZeroDivisionError("a bug")
        if runs[0] == 2:
            raise SystemExit  # which Python itself takes for the end of a thread
        done.set()

    thread = Supervised("worker", body, health)
    assert done.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
    assert not thread.alive
    report = health.report()
    assert report["failures"] == {"worker": 2}
    assert report["reasons"] == {"worker": "SystemExit: "}
    health.well("worker")
    assert health.report()["state"] == "ok"


def test_one_that_keeps_failing_can_be_stopped() -> None:
    stop, began = threading.Event(), threading.Event()

    def body() -> None:
        began.set()
        raise ZeroDivisionError("a bug")

    thread = Supervised("worker", body, Health(), stop)
    assert began.wait(PATIENCE_S)
    stop.set()
    thread.join(PATIENCE_S)
    assert not thread.alive


def test_saves_are_tried_again_after_a_while() -> None:
    now = [0.0]
    health = Health(lambda: now[0])
    for _ in range(3):
        health.failed(STORING, IndexError("out of range"))
    with pytest.raises(StorageError, match="out of range"):
        health.check_storing()
    now[0] = 60.0
    health.check_storing()


@pytest.mark.parametrize(
    ("name", "part", "call"),
    [("kvshare-janitor", "janitor", "collect"), ("kvshare-sync", "sharing", "sync")],
)
def test_upkeep_goes_on_after_a_bug(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, part: str, call: str
) -> None:
    store = machine("a", gc_seconds=0.05).store
    worker, health = getattr(store, part), store.metrics.health
    works, calls = getattr(worker, call), list[int]()

    def broken(**_: Any) -> None:
        raise ZeroDivisionError("a bug")

    def mended(**options: Any) -> Any:
        calls.append(1)
        return works(**options)

    monkeypatch.setattr(worker, call, broken)
    until(lambda: name in health.report()["reasons"])
    assert health.report()["state"] == "degraded"
    monkeypatch.setattr(worker, call, mended)
    until(lambda: bool(calls) and health.report()["state"] == "ok")
    assert health.report()["threads"][name]
    assert health.report()["failures"][name] >= 1


def test_the_loop_of_the_tiers_survives_what_ends_a_loop() -> None:
    async def leave() -> None:
        raise SystemExit

    async def answer() -> int:
        return 7

    health = Health()
    io = IoLoop(health)
    io.submit(leave())
    assert io.run(answer(), PATIENCE_S) == 7
    assert health.report()["failures"] == {"kvshare-io": 1}
    io.close()
