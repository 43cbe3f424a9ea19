"""vLLM engines that take turns: one process per arm, all loaded, one works, the others sleep.

Every time that is compared with another one is measured within seconds of it, in changing order,
so that a machine that gets slower or faster meanwhile does so for all arms.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

from benchmarks.harness.models import model_folder
from benchmarks.harness.page_cache import forget
from benchmarks.harness.result import Options
from examples.engines.engine import SETTINGS, computed, kvshare_settings
from examples.engines.process import EngineError, EngineProcess
from examples.engines.store import wait_idle
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.address import answers
from kvshare_store.daemon.protocol import Clear, ListNodes, Pin
from kvshare_store.daemon.spawn import ensure_daemon

LONGEST = 8192
"""Longest sequence in tokens: the small model's context length."""
_GONE_S = 30.0
_PATIENCE_S = 300.0


class Timed(msgspec.Struct):
    """How one engine answered one prompt, and where the time went."""

    ttft_s: float
    tokens: int
    cached: int
    """Prompt tokens that vLLM reports as cached."""
    token_ids: list[int]
    text: str
    parts: dict[str, float]
    """Seconds of each of `timers.PARTS`; their sum is `ttft_s`."""
    report: dict[str, Any] = {}
    """What KVShare says of the prompt; empty for others."""

    @property
    def computed(self) -> int:
        """Tokens of the prompt that the engine computed."""
        return computed(self.tokens, self.cached, self.report)


class Replayed(msgspec.Struct):
    """How one engine served requests that arrived at given times."""

    ttfts: list[float]
    """Seconds from arrival to first token, in order of arrival."""
    seconds: float
    """Seconds from the start to the end of the last request."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.ttfts) / self.seconds


class Engine(EngineProcess):
    """One engine, as the benchmark sees it."""

    def __init__(
        self, name: str, settings: dict[str, Any], log: IO[str], python: str = sys.executable
    ) -> None:
        super().__init__(
            name, [python, "-m", "benchmarks.harness.engine_process", json.dumps(settings)], log
        )

    def ask(
        self,
        tokens: Sequence[int],
        salt: str,
        *,
        max_tokens: int = 1,
        policy: str | None = None,
        source: str = "",
    ) -> Timed:
        """Have one prompt answered, alone on the machine."""
        asked = {"max_tokens": max_tokens, "policy": policy, "source": source}
        result = self._do("ask", tokens=list(tokens), salt=salt, **asked)
        return msgspec.convert(result, Timed)

    def replay(
        self, arrivals: list[float], prompts: list[list[int]], salt: str, max_tokens: int
    ) -> Replayed:
        """Have prompts answered that arrive at these seconds."""
        options = {"salt": salt, "max_tokens": max_tokens}
        result = self._do("replay", arrivals=arrivals, prompts=prompts, **options)
        return msgspec.convert(result, Replayed)

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        self._do("forget")

    def look(self) -> float:
        """KVShare only: be idle until a second look has ended and its rows have reached the daemon;
        seconds until then."""
        return float(self._do("look"))

    def idle(self, seconds: float) -> None:
        """KVShare only: have no requests for so long."""
        self._do("idle", seconds=seconds)

    def settle(self) -> None:
        """KVShare only: wait until everything saved has reached the daemon."""
        self._do("settle")


class Home:
    """The benchmark's own store and its daemon."""

    def __init__(self, folder: str, **fields: Any) -> None:
        self.fields: dict[str, Any] = {"home": folder, "idle_exit_s": 60.0, **fields}
        self._config = StoreConfig(**self.fields)
        self._client = ensure_daemon(self._config)

    def settings(self, **own: Any) -> dict[str, Any]:
        """What an engine needs to use this store; `own`: settings of that engine alone."""
        return kvshare_settings(**self.fields | own)

    def stats(self) -> dict[str, Any]:
        """All counters of the daemon."""
        return self._client.stats()

    def flush(self) -> None:
        """Wait until what was saved is on disk."""
        self._client.flush(_PATIENCE_S)

    def clear(self) -> None:
        """Forget everything."""
        self._client.call(Clear(), _PATIENCE_S)

    def pin(self) -> None:
        """Pin the one stored prompt: with `max_nodes=1`, no later prompt stays."""
        (node,) = self._client.call(ListNodes(2))
        self._client.call(Pin(node["id"]))

    def wait_idle(self) -> None:
        """Wait until the daemon has done what it does in the background, such as embedding."""
        wait_idle(self._client.greet().pid)

    def processor_seconds(self) -> float:
        """Seconds of processor time that the daemon and its children have used so far."""
        daemon = psutil.Process(self._client.greet().pid)
        used = [process.cpu_times() for process in (daemon, *daemon.children(recursive=True))]
        return float(sum(times.user + times.system for times in used))

    def restart(self) -> None:
        """Empty the host tier: start a new daemon, and drop block files from the page cache."""
        self._client.flush(_PATIENCE_S)
        self._stop()
        forget(self._config.home_path / "blocks")
        self._client = ensure_daemon(self._config)

    def _stop(self) -> None:
        self._client.stop()
        self._client.close()
        deadline = time.monotonic() + _GONE_S
        while answers(self._config.home_path):
            if time.monotonic() > deadline:
                raise EngineError(f"the daemon has not ended in {_GONE_S:.0f} s")
            time.sleep(0.02)

    def close(self) -> None:
        """End the daemon."""
        self._stop()


def rest(engine: Engine, home: Home) -> None:
    """Wait until everything a KVShare engine saved is durable and the daemon is idle."""
    engine.settle()
    home.flush()
    home.wait_idle()


@dataclass(frozen=True)
class Arm:
    """How one of the engines that are compared is set up."""

    caching: bool
    """Whether vLLM's own prefix caching is on."""
    kvshare: bool = False
    """Whether KVShare is on."""
    own: dict[str, Any] = field(default_factory=dict)
    """KVShare's settings of this engine alone; the others are those of the store."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""
    python: str = sys.executable
    """The interpreter: another system may have its own environment."""


@contextmanager
def running(
    options: Options, arms: Mapping[str, Arm], **fields: Any
) -> Iterator[tuple[dict[str, Engine], Home]]:
    """An engine for each arm, by name, and the store of those with KVShare; all are ready.

    `fields` are settings of the store. Everything ends with the context.
    """
    model = str(model_folder(options))
    with temporary_home(**fields) as home:
        settings = {name: engine_settings(model, arm, home) for name, arm in arms.items()}
        pythons = {name: arm.python for name, arm in arms.items()}
        with started(settings, pythons) as engines:
            yield engines, home


@contextmanager
def temporary_home(**fields: Any) -> Iterator[Home]:
    """A store with these settings that ends with the benchmark."""
    with tempfile.TemporaryDirectory(prefix="kvshare-bench-") as folder:
        home = Home(folder, **fields)
        try:
            yield home
        finally:
            home.close()


def engine_settings(model: str, arm: Arm, home: Home) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for this arm: the common ones, and its own."""
    common = SETTINGS | {
        "model": model,
        "enforce_eager": True,
        "max_model_len": LONGEST,
        "max_num_batched_tokens": LONGEST,
        "kv_cache_memory_bytes": 1 << 29,
        "enable_prefix_caching": arm.caching,
        "async_scheduling": False,  # off for all: the default differs with the scheduler class
    }
    return common | (home.settings(**arm.own) if arm.kvshare else {}) | arm.more


@contextmanager
def started(
    settings: dict[str, dict[str, Any]], pythons: dict[str, str]
) -> Iterator[dict[str, Engine]]:
    """Engines by name, all ready. If one dies, the error shows the end of its log."""
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.NamedTemporaryFile("w+", suffix=".log"))
        engines = {
            name: stack.enter_context(Engine(name, arguments, log.file, pythons[name]))
            for name, arguments in settings.items()
        }
        try:
            for engine in engines.values():
                engine.ready()
            yield engines
        except EngineError as error:
            words = Path(log.name).read_text().splitlines()[-15:]
            raise EngineError("\n".join([str(error), *words])) from error


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The names in an order of this turn's own: over twice as many turns as there are names each
    comes in every place, and after every other one, equally often (a Williams design)."""
    zigzag = [(step + 1) // 2 * (1 if step % 2 else -1) for step in range(len(names))]
    order = [names[(turn + step) % len(names)] for step in zigzag]
    return order if turn // len(names) % 2 == 0 else order[::-1]
