"""LMCache beside KVShare: misses, the same prompt again, and similar prompts.

LMCache 0.5.6 runs in server mode, the one that works on a CPU, with its own connector.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from rich.progress import track

from benchmarks.edited import SCATTERED, Texts, follower, long_texts
from benchmarks.engines import (
    Engine,
    Home,
    Timed,
    engine_settings,
    in_turn,
    model_folder,
    started,
    temporary_home,
)
from benchmarks.peers import python_with
from benchmarks.result import Cell, Options, Result
from examples.demo.engine import DemoError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = "0.5.6"
_ARMS = ("plain", "prefix", "lmcache", "kvshare")
_KINDS = ("miss", "again", "similar")
_LENGTHS = (768, 1024, 1536, 2048)
_CHUNK = 128
_SHARE = 0.9
_ANSWER = 16
_STORED_S = 1.0
"""LMCache stores in the background and says nowhere when it is done."""
_START_S = 300.0


class Sample(NamedTuple):
    """One prompt of one kind, served by every arm within seconds."""

    kind: str
    timed: dict[str, Timed]

    def ratio(self, arm: str) -> float:
        """This arm's time to first token beside plain vLLM's."""
        return self.timed[arm].ttft_s / self.timed["plain"].ttft_s

    def same(self, arm: str) -> bool:
        """Whether this arm gave the tokens that plain vLLM gives."""
        return self.timed[arm].token_ids == self.timed["plain"].token_ids


# --- the server -----------------------------------------------------------------------------------


@contextmanager
def server(python: str, log: IO[str]) -> Iterator[int]:
    """LMCache's server; yields its port."""
    port, http = _free_port(), _free_port()
    command = [str(Path(python).parent / "lmcache"), "server", "--port", str(port)]
    command += ["--http-port", str(http), "--l1-size-gb", "2", "--eviction-policy", "LRU"]
    command += ["--chunk-size", str(_CHUNK), "--supported-transfer-mode", "auto"]
    command += ["--shm-name", f"lmcache-{uuid.uuid4().hex[:8]}", "--disable-observability"]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(process, port, Path(log.name))
        yield port
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    words = "\n".join(log.read_text().splitlines()[-15:])
    raise DemoError(f"LMCache's server has not started in {_START_S:.0f} s\n{words}")


def lmcache_settings(port: int) -> dict[str, Any]:
    """What turns LMCache's server mode on in a vLLM engine."""
    extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    return {"kv_transfer_config": transfer, "block_size": _CHUNK}


# --- the measurement ------------------------------------------------------------------------------


def measure(options: Options) -> Result:
    """Serve every prompt once, again, and changed."""
    folder, name = model_folder(options.model)
    python = python_with("lmcache")
    with (
        tempfile.NamedTemporaryFile("w", suffix=".log") as log,
        server(python, log.file) as port,
        temporary_home() as home,
    ):
        settings = {
            "plain": engine_settings(folder, caching=False),
            "prefix": engine_settings(folder, caching=True),
            "lmcache": engine_settings(folder, caching=False, **lmcache_settings(port)),
            "kvshare": engine_settings(folder, caching=False, **home.settings()),
        }
        with started(settings, {"lmcache": python}) as engines:
            from transformers import AutoTokenizer

            texts = long_texts(options.data, AutoTokenizer.from_pretrained(folder))
            count = options.size(24, 4)
            samples = [
                sample
                for turn in track(range(-1, count), "Serving prompts")
                for sample in _serve(engines, home, texts, turn)
                if turn >= 0  # the first one warms up
            ]
    return _result(samples, options, name)


def _serve(engines: dict[str, Engine], home: Home, texts: Texts, turn: int) -> Iterator[Sample]:
    base = texts.take(_LENGTHS[turn % len(_LENGTHS)])
    changed = follower(base, _SHARE, SCATTERED, texts)
    salt = uuid.uuid4().hex
    for kind, prompt in zip(_KINDS, (base, base, changed), strict=True):
        served = {
            arm: engines[arm].ask(prompt, salt, max_tokens=_ANSWER) for arm in in_turn(_ARMS, turn)
        }
        engines["kvshare"].settle()
        home.flush()
        home.wait_idle()
        time.sleep(_STORED_S)
        yield Sample(kind, served)


def _result(samples: list[Sample], options: Options, model: str) -> Result:
    return Result(
        name="lmcache",
        title="LMCache and KVShare on the same prompts",
        n={"prompts": len(samples) // len(_KINDS)},
        seed=options.seed,
        model=model,
        noise_floor=_noise(samples),
        columns=["prompt", "arm", "n", "ms", "times plain", "middle half", "same tokens"],
        rows=[_row(kind, arm, samples) for kind in _KINDS for arm in _ARMS],
        paper="not measured",
        notes=[
            f"LMCache {VERSION}, server mode, CPU; installed without dependencies; vLLM's kernel "
            "dispatcher was guarded against an object of LMCache's whose __dict__ is no dict",
            f"similar: {_SHARE:.0%} of the tokens in common, changed at {SCATTERED} places; "
            "LMCache is asked for prefixes only, as its server does by default",
            f"same tokens: the {_ANSWER} greedy tokens equal plain vLLM's, bf16",
            f"prompts of {', '.join(map(str, _LENGTHS))} tokens; vLLM's block size is {_CHUNK} "
            "with LMCache, which asks for it, and 32 elsewhere",
        ],
        series={"ratios": {
            kind: {arm: _ratios(samples, kind, arm) for arm in _ARMS} for kind in _KINDS
        }},
    )  # fmt: skip


def _ratios(samples: list[Sample], kind: str, arm: str) -> list[float]:
    return [sample.ratio(arm) for sample in samples if sample.kind == kind]


def _noise(samples: list[Sample]) -> str:
    """Plain vLLM serves the same prompt twice: as a miss and again."""
    times = {
        kind: [sample.timed["plain"].ttft_s for sample in samples if sample.kind == kind]
        for kind in ("miss", "again")
    }
    ratios = [again / miss for miss, again in zip(times["miss"], times["again"], strict=True)]
    return f"plain vLLM, the same prompt again: median {median(ratios):.3f} times"


def _row(kind: str, arm: str, samples: list[Sample]) -> list[Cell]:
    of_kind = [sample for sample in samples if sample.kind == kind]
    ratios = _ratios(samples, kind, arm)
    low, _, high = quantiles(ratios, n=4)
    same = sum(sample.same(arm) for sample in of_kind)
    ms = median(sample.timed[arm].ttft_s for sample in of_kind) * 1e3
    return [kind, arm, len(ratios), ms, f"{median(ratios):.3f}", f"{low:.3f} to {high:.3f}",
            f"{same} of {len(of_kind)}"]  # fmt: skip


def draw(made: Result) -> Figure:
    """Time to first token beside plain vLLM's, by kind of prompt and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    greys = dict(zip(_ARMS, ("white", "lightgrey", "grey", "black"), strict=True))
    for place, arm in enumerate(_ARMS):
        at = [kind + (place - 1.5) * 0.2 for kind in range(len(_KINDS))]
        middle = [median(made.series["ratios"][kind][arm]) for kind in _KINDS]
        axes.bar(at, middle, 0.2, color=greys[arm], edgecolor="black", label=arm)
    axes.set_xticks(range(len(_KINDS)), _KINDS)
    axes.set_ylabel("time to first token, times plain")
    axes.legend()
    return figure
