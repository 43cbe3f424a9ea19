"""A daemon that is to end lets requests have what they were promised, for a bounded time."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvshare_store.cli.main import app
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import UnavailableError
from kvshare_store.namespace import Namespace
from kvshare_store.save.staging import Reuse
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import START_S, ClientDriver, Daemon
from tests.support.oracle import pick, positions_of, prompt

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
PATIENCE_S = 20.0


@pytest.fixture
def start(config: Callable[..., StoreConfig]) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def begin(**changes: Any) -> Daemon:
        started.append(Daemon(config(semantic="never", **changes)))
        started[-1].start()
        return started[-1]

    yield begin
    for one in started:
        one.kill()


@pytest.fixture
def engine(home: Path) -> Iterator[ClientDriver]:
    with Client(home, timeout=PATIENCE_S) as client:
        yield ClientDriver(client, NAMESPACE)


def ended(daemon: Daemon) -> int:
    assert daemon.process is not None
    return daemon.process.wait(START_S)


def drains(engine: ClientDriver) -> None:
    """Wait until no plan is made any more."""
    deadline = time.monotonic() + PATIENCE_S
    while (plan := engine.plan(prompt(1, 40))).declined != "draining":
        assert time.monotonic() < deadline
        if not plan.declined:
            engine.finish(plan)


@pytest.mark.parametrize("way", ["signal", "message"])
def test_what_was_promised_is_kept(
    start: Callable[..., Daemon], engine: ClientDriver, way: str
) -> None:
    daemon = start(drain_seconds=60.0)
    engine.save(prompt(1, 40))
    plan = engine.plan(prompt(1, 40))
    staged = engine.client.stage(np.asarray(prompt(2, 40), np.int32), NAMESPACE, Reuse())
    if way == "signal":
        daemon.send(signal.SIGTERM)
    else:
        engine.client.call(protocol.Stop(drain=True))
    drains(engine)
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as other:
        stats = other.stats()
        assert stats["declined"]["draining"] >= 1, "it can be watched meanwhile"
        assert stats["daemon"]["draining"]
        with pytest.raises(UnavailableError, match="ending"):
            other.stage(np.asarray(prompt(3, 40), np.int32), NAMESPACE, Reuse())
    engine.book.check(prompt(1, 40), plan, engine.load(plan))
    engine.finish(plan)
    rows = engine.book.computed(prompt(2, 40), 40, staged.id)
    engine.book.write(prompt(2, 40), rows, positions_of(staged.fresh), 40)
    step = np.cumsum([0, *staged.sizes])
    blocks = (pick(rows, range(a, b)) for a, b in itertools.pairwise(step))
    assert engine.client.commit(staged, blocks)
    assert ended(daemon) == 0
    again = start()
    assert again.process is not None
    assert engine.serve(prompt(2, 40)).exact == 39, "the save was made durable"


def test_whoever_holds_on_delays_the_end_no_longer(
    start: Callable[..., Daemon], engine: ClientDriver
) -> None:
    daemon = start(drain_seconds=0.5)
    engine.save(prompt(1, 40))
    assert engine.plan(prompt(1, 40)).lease
    daemon.send(signal.SIGTERM)
    assert ended(daemon) == 0
    assert "ending although 1 leases and saves have not" in daemon.log()


def test_a_second_signal_ends_it_at_once(
    start: Callable[..., Daemon], engine: ClientDriver
) -> None:
    daemon = start(drain_seconds=3600.0)
    engine.save(prompt(1, 40))
    assert engine.plan(prompt(1, 40)).lease
    daemon.send(signal.SIGTERM)
    drains(engine)
    daemon.send(signal.SIGTERM)
    assert ended(daemon) == 0


def test_the_command(start: Callable[..., Daemon], home: Path, plain_environment: None) -> None:
    daemon = start()
    result = CliRunner().invoke(app, ["stop", "--drain", "--home", str(home)])
    assert result.exit_code == 0, result.output
    assert "has stopped" in result.output
    assert ended(daemon) == 0
