"""Lanes: what takes long in one holds up none of the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvshare_store.daemon import protocol
from kvshare_store.daemon.lanes import Lanes
from kvshare_store.errors import OverloadError

PATIENCE_S = 60.0


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
