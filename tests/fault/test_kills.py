"""The daemon is killed at random moments of saving. What it leaves must be right, or absent."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.errors import KVShareError
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.frame import decode_frame
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, Daemon
from tests.support.oracle import Driver, RowBook, prompt

pytestmark = [pytest.mark.fault, pytest.mark.slow]

NAMESPACE = Namespace("model", KVLayout(4, 2, 16, "float32"))
KILLS = 3
MOST_REQUESTS = 16
PATIENCE_S = 60.0


def some_prompt(generator: random.Random) -> list[int]:
    """A prompt with a common beginning and a middle of its own, sometimes edited."""
    tokens = prompt(0, 200)[: generator.choice([0, 40, 120])] + prompt(generator.randrange(60), 90)
    if generator.random() < 0.5:
        at = generator.randrange(len(tokens))
        tokens[at : at + generator.randrange(4)] = [generator.randrange(50)]
    return tokens


class Engine:
    """Serves and saves prompts until its daemon is killed; remembers which ones are durable."""

    def __init__(self, home: Path, book: RowBook, seed: int) -> None:
        self.prompts: list[list[int]] = []
        self.durable: list[list[int]] = []
        self.requests = 0
        self.over = threading.Event()
        self._home, self._book, self._random = home, book, random.Random(seed)

    def run(self) -> None:
        """Work until the daemon has gone."""
        with Client(self._home, timeout=0.5) as client:
            driver = ClientDriver(client, NAMESPACE, self._book)
            while not self.over.is_set():
                with contextlib.suppress(KVShareError):
                    self._serve_one(driver)

    def _serve_one(self, driver: ClientDriver) -> None:
        tokens = some_prompt(self._random)
        self.prompts.append(tokens)
        plan = driver.plan(tokens)
        if not plan.declined:
            driver.finish(plan)
        saved = driver.save(tokens, None if plan.declined else plan)
        self.requests += 1
        if saved is not None and self.requests % 4 == 0:
            driver.client.flush(1.0)
            self.durable.append(tokens)


def killed_run(config: StoreConfig, book: RowBook, seed: int) -> Engine:
    """One daemon, one client, and one SIGKILL after some requests and a random delay."""
    engine, chance = Engine(config.home_path, book, seed), random.Random(seed)
    daemon = Daemon(config)
    daemon.start()
    serving = threading.Thread(target=engine.run)
    serving.start()
    enough, deadline = chance.randrange(2, MOST_REQUESTS), time.monotonic() + PATIENCE_S
    while engine.requests < enough and serving.is_alive() and time.monotonic() < deadline:
        time.sleep(1e-3)
    time.sleep(chance.uniform(0.0, 0.03))
    daemon.kill()
    engine.over.set()
    serving.join(PATIENCE_S)
    assert not serving.is_alive(), "the engine hangs when its daemon is gone"
    return engine


def check_home(
    config: StoreConfig,
    book: RowBook,
    prompts: Sequence[list[int]],
    durable: Sequence[list[int]] = (),
) -> None:
    """Open what is left: every row that is served is right, and the `durable` prompts are there."""
    with Store(config) as store:
        driver = Driver(store, NAMESPACE, book)
        saved = [node.tokens.tolist() for node in store.tree]
        assert all(tokens in saved for tokens in durable)
        for node in store.tree:
            for name in node.blocks:
                file = config.home_path / "blocks" / name[:2] / f"{name}.kvb"
                block = decode_frame(file.read_bytes(), name)
                assert block.namespace == NAMESPACE.digest
        served = [driver.serve(tokens) for tokens in (*prompts, *durable)]
        assert not saved or any(plan.exact for plan in served)
        store.collect()
        store.flush()
        files = {file.stem for file in (config.home_path / "blocks").glob("*/*")}
        assert files == store.tree.blocks(), "garbage is collected, and nothing else"
        assert list((config.home_path / "tmp").iterdir()) == []
        stats = store.stats()
        assert stats["leases"] == 0
        assert stats["errors"] == {}


@pytest.mark.parametrize("room", ["roomy", "tight"])
def test_kills_while_saving(home: Path, room: str) -> None:
    config = StoreConfig(
        home=str(home),
        block_tokens=16,
        host_bytes=1 << 22 if room == "tight" else 1 << 24,
        disk_bytes=2_000_000 if room == "tight" else 1 << 28,
        min_saving_ms=0.0,
        policy="aggressive",
        semantic="never",
        plan_deadline_ms=20_000.0,
    )
    book = RowBook(NAMESPACE.layout)
    prompts: list[list[int]] = []
    durable: list[list[int]] = []
    for seed in range(KILLS):
        engine = killed_run(config, book, seed)
        prompts += engine.prompts
        durable += engine.durable
        check_home(config, book, prompts[-40:], durable if room == "roomy" else ())
    assert len(prompts) > 2 * KILLS, "the daemon was killed before it did anything"
    assert durable


def test_everything_that_was_flushed_survives(home: Path) -> None:
    """The daemon is killed right after the flush has returned."""
    config = StoreConfig(
        home=str(home),
        block_tokens=16,
        host_bytes=1 << 24,
        disk_bytes=1 << 28,
        min_saving_ms=0.0,
        policy="aggressive",
        semantic="never",
        plan_deadline_ms=20_000.0,
    )
    book = RowBook(NAMESPACE.layout)
    daemon = Daemon(config)
    daemon.start()
    with Client(home) as client:
        driver = ClientDriver(client, NAMESPACE, book)
        for seed in range(8):
            driver.save(prompt(seed, 100))
        client.flush()
        daemon.kill()
    check_home(config, book, [], [prompt(seed, 100) for seed in range(8)])
