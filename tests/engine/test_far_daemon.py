"""An engine whose daemon is on another machine: what it reuses comes over the network."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvshare_store.config import StoreConfig
from tests.engine.harness import BLOCK, Engine
from tests.support.certificates import Keys
from tests.support.daemons import Daemon

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 150


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Keys]]:
    keys = Keys(tmp_path_factory.mktemp("keys"))
    settings = keys.listening(listen=f"tcp://127.0.0.1:{keys.port}")
    config = StoreConfig(
        home=str(tmp_path_factory.mktemp("far") / "home"), semantic="never", policy="aggressive",
        min_saving_ms=-1e9, host_bytes=512 << 20, plan_deadline_ms=10_000.0, **settings,
    )  # fmt: skip
    with Daemon(config) as started:
        yield started, keys


@pytest.fixture(scope="module")
def engine(daemon: tuple[Daemon, Keys]) -> Iterator[Engine]:
    far, keys = daemon
    shown = keys.client(keys.clients.issue("node-1", "engine"), keys.port)
    names = ("connect", "tls_cert", "tls_key", "tls_server")
    kvshare = {"policy": "aggressive"} | {name: getattr(shown, name) for name in names}
    home = far.config.home_path  # for counting only
    engine = Engine(home, kvshare=kvshare, enable_prefix_caching=True)
    yield engine
    engine.close()


def fresh(seed: int) -> list[int]:
    return random.Random(seed).choices(range(100, 40_000), k=LENGTH)


def test_rows_are_saved_and_loaded_over_the_network(engine: Engine) -> None:
    prompt = fresh(1)
    assert engine.planning.link.client.remote
    computed = engine.store(prompt)
    engine.forget()
    again = engine.ask(prompt)
    assert (again.said["exact"], again.said["recomputed"]) == (LENGTH - 1, 1)
    assert again.agrees(computed)
    fetching = engine.worker.fetching
    assert fetching is not None
    assert fetching.greet().role == "engine"
    assert engine.stats()["bytes_loaded"] > 0
    engine.forget()
    edited = [*prompt[:60], *fresh(2)[:3], *prompt[63:]]
    said = engine.ask(edited).said
    assert said["edited"] > 0
    assert said["exact"] == 60


@pytest.mark.parametrize("edit", [0, 3], ids=["the same", "edited"])
def test_what_the_engine_itself_still_has_is_not_fetched(engine: Engine, edit: int) -> None:
    """Whole blocks of its own prefix cache go before rows of the store."""
    prompt = fresh(4 + edit)
    computed = engine.store(prompt)
    asked = [*prompt[:100], *fresh(9)[:edit], *prompt[100 + edit :]]
    with engine.counted() as gained:
        again = engine.ask(asked)
    whole = (100 if edit else LENGTH - 1) // BLOCK * BLOCK
    assert (again.said["prefix_cached"], again.said["reason"]) == (whole, "")
    assert again.said["edited" if edit else "exact"] > 0
    assert gained["misses"] == 0
    if not edit:
        assert again.agrees(computed)


def test_a_daemon_that_went_away_costs_reuse_and_nothing_else(
    engine: Engine, daemon: tuple[Daemon, Keys], tmp_path: Path
) -> None:
    prompt = fresh(3)
    computed = engine.store(prompt)
    engine.forget()
    daemon[0].kill()
    missed = engine.ask(prompt)
    assert missed.said["recomputed"] == LENGTH
    assert missed.agrees(computed)
