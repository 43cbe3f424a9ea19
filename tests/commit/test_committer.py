"""The committer's thread: order and batches, and that no error leaves callers waiting."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest

from kvshare_store.commit import queue as commit_queue
from kvshare_store.commit.committer import Committer
from kvshare_store.commit.durable import Durable
from kvshare_store.commit.queue import Addition, CommitQueue, Removal
from kvshare_store.commit.room import Room
from kvshare_store.errors import (
    KVShareError,
    MissingBlockError,
    NoSpaceError,
    OverloadError,
    StorageError,
)
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import Vectors
from kvshare_store.observability.metrics import Metrics
from kvshare_store.plan.spans import Span

PATIENCE_S = 60.0


def addition(name: str) -> Addition:
    node = Node(
        id=name,
        namespace="n",
        token_bytes=b"",
        segments=(Span(0, 1, 0, 0, 0),),
        blocks=(f"block of {name}",),
        exact_rows=1,
    )
    return Addition(node, Vectors(np.zeros(1, np.float32), None))


T = TypeVar("T")


class Catalogue:
    """Records what it is told."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.error: KVShareError | None = None

    def add(self, rows: list[Addition]) -> set[str]:
        if self.error is not None:
            raise self.error
        self._log.append("rows " + " ".join(row.node.id for row in rows))
        return set()

    def delete(self, ids: list[str], stamps: list[int]) -> None:
        self._log.append("rows gone " + " ".join(ids))


class Nodes:
    """Records which nodes are given up. The node `left` is not here any more."""

    blocks = None

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def forget(self, node: Node) -> bool:
        self._log.append(f"given up {node.id}")
        return node.id != "left"

    def removed(self, removals: Iterable[Removal]) -> None:
        pass

    def committed(self, nodes: Iterable[Node]) -> None:
        pass


class Deletions(Room):
    """Records which blocks are deleted."""

    def __init__(self, log: list[str], nodes: Any) -> None:
        super().__init__(nodes, None)
        self._log = log

    def delete(self, names: Iterable[str]) -> None:
        self._log.append("blocks gone " + " ".join(names))


class Steps(Durable):
    """Work without blocks whose steps are recorded in `log`."""

    def __init__(
        self,
        log: list[str],
        nodes: Any,
        catalogue: Any,
        start: threading.Event,
        make_durable: Callable[[Node], None] | None,
    ) -> None:
        super().__init__(nodes, catalogue, None, Metrics())
        self.room = Deletions(log, nodes)
        self._log = log
        self._start = start
        self._make_durable = make_durable

    def _make(self, nodes: Sequence[Node]) -> list[KVShareError | None]:
        assert self._start.wait(PATIENCE_S)
        return [self._one_durable(node) for node in nodes]

    def _one_durable(self, node: Node) -> KVShareError | None:
        try:
            if self._make_durable is not None:
                self._make_durable(node)
        except KVShareError as error:
            return error
        self._log.append(f"durable {node.id}")
        return None

    def _with_room(self, commit: Callable[[], T], *, forgetting: bool) -> T:
        return commit()


class Desk:
    """A committer whose steps are recorded in `log`."""

    def __init__(self, make_durable: Callable[[Node], None] | None = None) -> None:
        self.log: list[str] = []
        self.catalogue = Catalogue(self.log)
        self.start = threading.Event()
        self.metrics = Metrics()
        self.health = self.metrics.health
        self.queue = CommitQueue(self.health)
        nodes: Any = Nodes(self.log)
        durable = Steps(self.log, nodes, self.catalogue, self.start, make_durable)
        self.committer = Committer(self.queue, nodes, durable, self.metrics)

    def run(self, *work: Addition | Removal) -> list[str]:
        for piece in work:
            self.queue.put(piece)
        self.start.set()
        settling = threading.Thread(target=self.queue.settle, daemon=True)
        settling.start()
        settling.join(PATIENCE_S)
        assert not settling.is_alive(), "nobody does the work any more"
        return self.log


def test_bytes_before_rows_and_rows_before_bytes() -> None:
    desk = Desk()
    log = desk.run(addition("a"), addition("b"), Removal(("a",), ("block of a",)), addition("c"))
    rows = [at for at, step in enumerate(log) if step.startswith("rows a")]
    assert log.index("durable a") < rows[0] < log.index("rows gone a")
    assert log.index("rows gone a") < log.index("blocks gone block of a")
    assert "durable c" in log
    desk.committer.close()


def test_a_node_that_comes_back_waits_until_its_predecessor_is_gone() -> None:
    desk = Desk()
    log = desk.run(addition("a"), Removal(("a",), ("block of a",)), addition("a"))
    assert log[-4:] == ["rows gone a", "blocks gone block of a", "durable a", "rows a"]
    desk.committer.close()


def test_a_node_that_waits_twice_is_one_row() -> None:
    """It left memory for want of room and was saved again, before it was durable. A commit with two
    rows of one id is refused, with all others in it."""
    desk = Desk()
    log = desk.run(*map(addition, ("first", "a", "b", "a")))
    rows = [step.split()[1:] for step in log if step.startswith("rows ")]
    assert all(len(names) == len({*names}) for names in rows)
    assert {name for names in rows for name in names} == {"first", "a", "b"}
    desk.committer.close()


def test_calls_keep_their_place_and_say_what_became_of_them() -> None:
    def refused() -> None:
        raise NoSpaceError("full")

    desk = Desk()
    desk.queue.put(addition("a"))
    desk.queue.call(lambda: desk.log.append("call"))
    desk.queue.put(addition("b"))
    desk.start.set()
    assert desk.queue.run(lambda: 7) == 7
    assert desk.log == ["durable a", "rows a", "call", "durable b", "rows b"]
    with pytest.raises(NoSpaceError):
        desk.queue.run(refused)
    desk.committer.close()


def test_what_waits_is_committed_in_one_go() -> None:
    desk = Desk()
    log = desk.run(*(addition(str(at)) for at in range(10)))
    assert sum(step.startswith("rows ") for step in log) <= 2
    desk.committer.close()


def test_one_that_fails_does_not_take_others_along() -> None:
    def full(node: Node) -> None:
        if node.id == "b":
            raise NoSpaceError("full")

    desk = Desk(full)
    log = desk.run(addition("a"), addition("b"), addition("c"))
    assert "given up b" in log
    assert desk.metrics.errors == {"no_space": 1}
    assert " ".join(step for step in log if step.startswith("rows")).split() in (
        ["rows", "a", "c"],
        ["rows", "a", "rows", "c"],
    )
    desk.committer.close()


def test_rows_that_are_refused_fail_their_nodes() -> None:
    desk = Desk()
    desk.catalogue.error = StorageError("refused")
    assert "given up a" in desk.run(addition("a"))
    assert desk.metrics.errors == {"storage": 1}
    desk.catalogue.error = None
    assert desk.run(addition("b"))[-1] == "rows b"
    desk.committer.close()


def test_a_refused_batch_counts_and_flush_says_so() -> None:
    desk = Desk()
    desk.catalogue.error = StorageError("refused")
    desk.run(addition("a"))
    assert desk.health.report()["reasons"] == {"kvshare-commit": "StorageError: refused"}
    for name in "bc":
        with pytest.raises(StorageError, match=r"1 prompts were not stored.*: refused\."):
            flush_after(desk, addition(name))
    with pytest.raises(StorageError, match="nothing can be stored at present"):
        desk.health.check_storing()
    desk.catalogue.error = None
    before = desk.queue.failures
    desk.run(addition("d"))
    desk.health.check_storing()
    assert desk.health.report()["state"] == "ok"
    desk.queue.flush(before)
    with pytest.raises(StorageError, match="3 prompts were not stored"):
        desk.queue.flush(since=0)
    desk.committer.close()


def flush_after(desk: Desk, work: Addition) -> None:
    before = desk.queue.failures
    desk.queue.put(work)
    desk.queue.flush(before)


def test_a_batch_of_which_some_were_stored_is_no_trouble() -> None:
    def refused(node: Node) -> None:
        if node.id == "b":
            raise StorageError("Input/output error")

    desk = Desk(refused)
    desk.queue.put(addition("z"))  # so that the others make one batch
    desk.run(addition("a"), addition("b"))
    desk.run(addition("c"))
    assert desk.health.report()["state"] == "ok"
    assert desk.queue.failures == 1
    desk.committer.close()


def test_no_room_and_nodes_that_left_are_no_failure_of_storage() -> None:
    def full(node: Node) -> None:
        raise MissingBlockError("left") if node.id == "left" else NoSpaceError("full")

    desk = Desk(full)
    desk.run(addition("left"), addition("large"))
    desk.queue.flush(since=0)
    assert desk.health.report()["state"] == "ok"
    desk.committer.close()


def test_a_prompt_whose_blocks_vanish_is_not_called_durable() -> None:
    def vanished(node: Node) -> None:
        raise MissingBlockError("a block is in no tier")

    desk = Desk(vanished)
    desk.start.set()
    with pytest.raises(StorageError, match=r"1 prompts were not stored.*in no tier"):
        flush_after(desk, addition("a"))
    assert desk.health.report()["state"] == "ok", "storage has refused nothing"
    desk.committer.close()


def test_flush_does_not_wait_for_what_is_ordered_later() -> None:
    """The queue never becomes empty, since each piece of work orders the next one."""
    names = map(str, itertools.count())
    desk = Desk(lambda _: desk.queue.put(addition(next(names))) if go.is_set() else None)
    go = threading.Event()
    go.set()
    desk.start.set()
    desk.queue.put(addition(next(names)))
    flushing = threading.Thread(target=desk.queue.flush)
    flushing.start()
    flushing.join(PATIENCE_S)
    hangs = flushing.is_alive()
    go.clear()
    flushing.join(PATIENCE_S)
    desk.committer.close()
    assert not hangs


def test_saves_wait_while_hundreds_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_queue, "_MOST_WAITING", 8)
    monkeypatch.setattr(commit_queue, "_PATIENCE_S", 0.01)
    desk = Desk()
    for at in range(80):  # one batch is taken at once
        desk.queue.put(addition(str(at)))
    with pytest.raises(OverloadError, match="save more slowly"):
        desk.queue.admit()
    monkeypatch.setattr(commit_queue, "_PATIENCE_S", 30.0)
    desk.start.set()
    desk.queue.admit()
    desk.committer.close()


def test_closing_finishes_what_was_ordered() -> None:
    desk = Desk()
    desk.start.set()
    for at in range(100):
        desk.queue.put(addition(str(at)))
    desk.committer.close()
    committed = [name for step in desk.log if step.startswith("rows") for name in step.split()[1:]]
    assert committed == [str(at) for at in range(100)]


def broken(node: Node) -> None:
    if node.id.startswith("bad"):
        raise ZeroDivisionError("a bug")


def test_work_that_cannot_be_done_takes_no_other_along() -> None:
    """Whatever error is raised: the node is given up, the thread lives on, the others are
    stored."""
    desk = Desk(broken)
    log = desk.run(addition("a"), addition("bad"), addition("c"))
    assert "given up bad" in log
    assert desk.metrics.errors == {"internal": 1}
    assert {name for step in log if step.startswith("rows") for name in step.split()[1:]} == {
        "a",
        "c",
    }
    desk.run(addition("d"))
    assert log[-1] == "rows d"
    report = desk.health.report()
    assert (report["state"], report["reasons"]) == ("ok", {})
    assert report["failures"]["kvshare-commit"] >= 1
    desk.committer.close()


def test_a_call_hands_its_error_to_whoever_waits() -> None:
    desk = Desk()
    desk.start.set()
    with pytest.raises(ZeroDivisionError):
        desk.queue.run(lambda: 1 // 0)
    assert desk.run(addition("a"))[-1] == "rows a"
    desk.committer.close()


def test_saves_are_refused_while_nothing_can_be_stored() -> None:
    desk = Desk(broken)
    desk.start.set()
    for at in range(3):
        desk.health.check_storing()
        desk.run(addition(f"bad {at}"))
    with pytest.raises(StorageError, match="ZeroDivisionError: a bug"):
        desk.health.check_storing()
    assert desk.health.report()["state"] == "degraded"
    desk.run(addition("good"))
    desk.health.check_storing()
    desk.committer.close()


def test_nobody_waits_for_a_committer_that_has_ended() -> None:
    desk = Desk()
    desk.committer.close()
    desk.queue.put(addition("a"))
    with pytest.raises(StorageError, match="restart the store"):
        desk.queue.flush()
    with pytest.raises(StorageError, match="restart the store"):
        desk.queue.run(lambda: None)
