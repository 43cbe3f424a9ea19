"""Rows on their way from client to daemon: a client that tampers with its outbox harms only
itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.outbox import Outbox, Received
from kvshare_store.daemon.server import Server
from kvshare_store.errors import DeadlineError, LeaseError, PlanError
from kvshare_store.maintenance.check import check_blocks
from kvshare_store.namespace import Namespace
from kvshare_store.save.staging import Reuse
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver
from tests.support.neighbours import until
from tests.support.oracle import prompt
from tests.support.peer import Peer

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
ROW = 64
PATIENCE_S = 60.0


@pytest.fixture
def server(config: Callable[..., StoreConfig]) -> Iterator[Server]:
    """A daemon in a thread of this process."""
    server = Server(config())
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.stop()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.fixture
def engine(server: Server, home: Path) -> Iterator[ClientDriver]:
    with Client(home, timeout=PATIENCE_S) as client:
        yield ClientDriver(client, NAMESPACE)


def tokens_of(seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(prompt(seed, 40), np.int32)


# --- the file -----------------------------------------------------------------------------------


def test_bytes_arrive_as_they_were_written() -> None:
    outbox, target = Outbox(), bytearray(7)
    assert outbox.write(0, b"hello ") + outbox.write(6, np.frombuffer(b"world!!!", np.int32)) == 14
    Received(outbox.descriptor).read_into(4, memoryview(target))
    assert bytes(target) == b"o world"
    outbox.close()


def test_an_outbox_that_ends_too_early_is_an_error() -> None:
    outbox = Outbox()
    outbox.write(0, bytes(10))
    with pytest.raises(PlanError, match="ends at byte 10"):
        Received(outbox.descriptor).read_into(4, memoryview(bytearray(7)))
    outbox.clear()
    with pytest.raises(PlanError, match="ends at byte 0"):
        Received(outbox.descriptor).read_into(0, memoryview(bytearray(1)))
    outbox.close()
    with pytest.raises(PlanError, match="cannot be read"):
        Received(-1).read_into(0, memoryview(bytearray(1)))


# --- a client -----------------------------------------------------------------------------------


def test_its_memory_is_given_back_after_each_prompt(engine: ClientDriver) -> None:
    for seed in (1, 2):
        assert engine.save(prompt(seed, 400))
        assert engine.client.outbox is not None
        assert os.fstat(engine.client.outbox.descriptor).st_blocks == 0
        assert engine.serve(prompt(seed, 400)).exact == 399


@pytest.mark.parametrize("error", [LeaseError("the snapshot was released"), RuntimeError("a bug")])
def test_rows_that_cannot_be_made_end_the_save(engine: ClientDriver, error: Exception) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(8 * ROW)
        raise error

    staged = engine.client.stage(tokens_of(1), NAMESPACE, Reuse())
    with pytest.raises(type(error)):
        engine.client.commit(staged, broken())
    assert engine.client.stats()["staged"] == 0
    assert engine.client.outbox is not None
    assert os.fstat(engine.client.outbox.descriptor).st_size == 0
    assert engine.save(prompt(1, 40))


def test_too_few_rows_store_nothing(engine: ClientDriver) -> None:
    staged = engine.client.stage(tokens_of(1), NAMESPACE, Reuse())
    with pytest.raises(PlanError, match="before its last row"):
        engine.client.commit(staged, [bytes(8 * ROW)] * 4)
    stats = engine.client.stats()
    assert (stats["nodes"], stats["staged"], stats["reserved"]) == (0, 0, 0)
    assert stats["tiers"]["host"]["bytes"] == 0
    assert engine.save(prompt(1, 40))


def test_a_commit_that_was_given_up_never_gets_rows_of_the_next_prompt(
    server: Server, engine: ClientDriver, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gives up before the daemon has begun to copy, and then saves another prompt."""
    engine.client.greet()
    copy, waiting, go = server.store.saving.copy, threading.Event(), threading.Event()

    def late(*arguments: Any) -> None:
        waiting.set()
        assert go.wait(PATIENCE_S)
        copy(*arguments)

    monkeypatch.setattr(server.store.saving, "copy", late)
    with Client(home, timeout=0.3) as hasty:
        staged = hasty.stage(tokens_of(1), NAMESPACE, Reuse())
        with pytest.raises(DeadlineError):
            hasty.commit(staged, [bytes([1]) * 8 * ROW] * 5)
        assert waiting.wait(PATIENCE_S)
        hasty.open()
        assert hasty.outbox is not None
        hasty.outbox.write(0, bytes([2]) * 40 * ROW)  # the first bytes of the next save
        go.set()
        until(lambda: engine.client.stats()["nodes"] == 1)  # its thread copies and commits now
        plan = engine.client.plan(tokens_of(1), NAMESPACE)
        assert plan.exact == 39, "what it had written was complete"
        assert set(engine.load(plan)[:, :, :39].tobytes()) == {1}


# --- a hostile one ------------------------------------------------------------------------------


def committed(home: Path, outbox: int) -> protocol.Reply:
    """A save whose rows are to be read from this descriptor."""
    with Peer(home, PATIENCE_S) as peer:
        descriptors = [outbox] if outbox >= 0 else []
        peer.send_with(protocol.encode(protocol.Hello()), descriptors)
        hello = peer.receive()
        assert hello is not None
        if hello.error:
            return hello
        staged = peer.ask(protocol.Stage(NAMESPACE, tokens_of(1).tobytes(), Reuse())).result
        return peer.ask(protocol.Commit(staged["id"]))


def test_an_outbox_that_is_none(server: Server, engine: ClientDriver, home: Path) -> None:
    """No descriptor; a pipe, on which a read would never return; a file on a file system that may
    hang; a memory file that is closed to reading. The daemon goes on serving."""
    pipe = os.pipe()
    folder = os.open(home, os.O_RDONLY)
    plain = os.open(home / "format", os.O_RDONLY)
    empty = os.memfd_create("test")
    blind = os.open(f"/proc/self/fd/{empty}", os.O_WRONLY)
    assert committed(home, -1).error == "plan"
    for descriptor in (*pipe, folder, plain):
        assert committed(home, descriptor).error in ("protocol", "plan")
    for descriptor in (empty, blind):
        assert committed(home, descriptor).error == "plan"
    for descriptor in (*pipe, folder, plain, empty, blind):
        os.close(descriptor)
    assert engine.save(prompt(1, 40))
    assert engine.serve(prompt(1, 40)).exact == 39


def test_rows_that_are_written_while_they_are_read(
    server: Server, engine: ClientDriver, home: Path
) -> None:
    """The block's name is the hash of the bytes that were copied, and they do not change any
    more."""
    outbox, stop = Outbox(), threading.Event()
    outbox.write(0, bytes(40 * ROW))

    def scribble() -> None:
        while not stop.is_set():
            outbox.write(0, os.urandom(40 * ROW))

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        assert not committed(home, outbox.descriptor).error
        plan = engine.client.plan(tokens_of(1), NAMESPACE)
        first = engine.load(plan).tobytes()
        outbox.write(0, bytes(40 * ROW))
        assert engine.load(plan).tobytes() == first
    finally:
        stop.set()
        thread.join()
        outbox.close()
    server.store.flush()
    names = [name for node in server.store.tree for name in node.blocks]
    assert check_blocks(server.store.repository, names, repair=False).problems == ()
