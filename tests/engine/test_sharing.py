"""Two engines on one machine share a daemon, and no request gets more than its own engine
allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.config import load_config
from kvshare_store.daemon.spawn import ensure_daemon
from tests.engine.harness import Engine

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 150
ROOT = Path(__file__).parents[2]

Fresh = Callable[[int], list[int]]

OTHER_ENGINE = """
import json, sys
from pathlib import Path
from tests.engine.harness import Engine

engine = Engine(Path(sys.argv[1]), kvshare={"policy": "aggressive"})
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    with engine.counted() as gained:
        answer = engine.store(order["prompt"], policy=order["policy"])
    print(json.dumps({"tokens": answer.tokens, "gained": gained}), flush=True)
engine.core.engine_core.shutdown()
"""


class Other:
    """An engine in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER_ENGINE, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *sys.path)))},
        )

    def _line(self, begins: str) -> str:
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        return next(line for line in lines if line.startswith(begins))

    def wait(self) -> None:
        """Wait until it serves."""
        self._line("ready")

    def store(self, prompt: list[int], policy: str | None = None) -> dict[str, Any]:
        """Its answer, and what the daemon counted meanwhile."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "policy": policy}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line("{"))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Other]]:
    home = tmp_path_factory.mktemp("home")
    laxer = {"home": str(home), "policy": "aggressive", "semantic": "never"}
    memory = {"host_bytes": "256MiB", "min_saving_ms": -1e9, "idle_exit_s": 5}
    ensure_daemon(load_config(laxer | memory)).close()
    other = Other(home)
    try:
        engine = Engine(home, kvshare={"policy": "exact"})
        other.wait()
        yield engine, other
        engine.close()
    finally:
        other.close()


@pytest.fixture
def prompt(fresh: Fresh) -> list[int]:
    return fresh(LENGTH)


def test_what_one_engine_stored_serves_the_other(
    engines: tuple[Engine, Other], prompt: list[int]
) -> None:
    engine, other = engines
    plain = engine.ask(prompt, policy="off")
    stored = other.store(prompt, policy="exact")
    assert stored["gained"]["nodes"] == 1
    with engine.counted() as gained:
        answer = engine.ask(prompt)
    assert gained["hits_exact"] == 1
    assert gained["tokens_reused_exact"] == LENGTH - 1
    assert answer.agrees(plain)
    assert answer.tokens == stored["tokens"]
    engine.check_idle()


def test_and_the_other_way_round(engines: tuple[Engine, Other], prompt: list[int]) -> None:
    engine, other = engines
    with engine.counted() as gained:
        answer = engine.store(prompt)
    assert gained["nodes"] == 1
    served = other.store(prompt, policy="exact")
    assert served["gained"]["hits_exact"] == 1
    assert served["gained"]["nodes"] == 0
    assert served["tokens"] == answer.tokens


def test_a_request_never_gets_more_than_its_engine_allows(
    engines: tuple[Engine, Other], prompt: list[int]
) -> None:
    """The daemon was started with a laxer policy; the engine's own still holds."""
    engine, _ = engines
    engine.store(prompt)
    follower = [*prompt[:100], 11111, 22222, *prompt[103:]]
    full = engine.ask(follower, policy="off")
    for policy in ("aggressive", "balanced", None):
        with engine.counted() as gained:
            answer = engine.ask(follower, policy=policy)
        assert gained["hits_exact"] == 1
        assert gained["hits_edited"] == gained["tokens_reused_edited"] == 0
        assert answer.agrees(full)


def test_the_other_engine_goes_and_its_leases_with_it(
    engines: tuple[Engine, Other], prompt: list[int]
) -> None:
    engine, other = engines
    assert other.store(prompt, policy="exact")["gained"]["nodes"] == 1
    other.close()
    with engine.counted() as gained:
        engine.ask(prompt)
    assert gained["hits_exact"] == 1
    engine.check_idle()
