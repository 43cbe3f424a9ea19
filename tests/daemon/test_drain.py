"""A daemon that is to end lets requests have what they were promised, for a bounded time."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import UnavailableError
from kvshare_store.namespace import Namespace
from kvshare_store.save.staging import Reuse
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.commands import run
from tests.support.daemons import START_S, ClientDriver, Daemon, serving
from tests.support.oracle import Driver, pick, positions_of, prompt
from tests.support.waiting import eventually

Config = Callable[..., StoreConfig]
NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
PATIENCE_S = 60.0


@pytest.fixture
def engine(home: Path) -> Iterator[ClientDriver]:
    with Client(home, timeout=PATIENCE_S) as client:
        yield ClientDriver(client, NAMESPACE)


def test_what_was_promised_is_kept(config: Config, home: Path, engine: ClientDriver) -> None:
    with serving(config(drain_seconds=60.0)):
        engine.save(prompt(1, 40))
        plan = engine.plan(prompt(1, 40))
        staged = engine.client.stage(np.asarray(prompt(2, 40), np.int32), NAMESPACE, Reuse())
        engine.client.call(protocol.Stop(drain=True))
        assert engine.plan(prompt(1, 40)).declined == "draining"
        with Client(home, timeout=PATIENCE_S) as other:
            stats = other.stats()
            assert stats["declined"]["draining"] == 1, "it can be watched meanwhile"
            assert stats["daemon"]["draining"]
            with pytest.raises(UnavailableError, match="ending"):
                other.stage(np.asarray(prompt(3, 40), np.int32), NAMESPACE, Reuse())
        engine.book.check(prompt(1, 40), plan, engine.load(plan))
        engine.finish(plan)
        rows = engine.book.computed(prompt(2, 40), 40, staged.id)
        engine.book.write(prompt(2, 40), rows, positions_of(staged.fresh), 40)
        ends = itertools.pairwise(itertools.accumulate(staged.sizes, initial=0))
        assert engine.client.commit(staged, (pick(rows, range(a, b)) for a, b in ends))
        assert eventually(lambda: not (home / "kvshare.sock").exists(), PATIENCE_S), (
            "it ends by itself"
        )
    with Store(config()) as store:
        kept = Driver(store, NAMESPACE, engine.book)
        assert kept.serve(prompt(2, 40)).exact == 39, "the save was made durable"


def test_whoever_holds_on_delays_the_end_no_longer(
    config: Config, home: Path, engine: ClientDriver, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(config(drain_seconds=0.2)) as server, caplog.at_level(logging.WARNING, "kvshare"):
        engine.save(prompt(1, 40))
        assert engine.plan(prompt(1, 40)).lease
        server.drain()
        assert eventually(lambda: not (home / "kvshare.sock").exists(), PATIENCE_S)
    assert "ending although 1 leases and saves have not" in caplog.text


def test_a_second_signal_ends_it_at_once(config: Config, engine: ClientDriver) -> None:
    with Daemon(config(drain_seconds=3600.0)) as daemon:
        engine.save(prompt(1, 40))
        assert engine.plan(prompt(1, 40)).lease
        daemon.send(signal.SIGTERM)
        assert eventually(lambda: engine.plan(prompt(2, 40)).declined == "draining", PATIENCE_S)
        daemon.send(signal.SIGTERM)
        assert daemon.process is not None
        assert daemon.process.wait(START_S) == 0


def test_the_command(config: Config, home: Path, plain_environment: None) -> None:
    with serving(config()):
        code, said, _ = run("stop", "--drain", "--home", home)
    assert (code, "has stopped" in said) == (0, True)
