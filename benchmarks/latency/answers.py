"""What storing answers costs: tokens generated a second, with `store_answers` and without.

Two engines with KVShare serve the same requests in turn. Requests begin and end one after the
other, so that answers are stored while others are generated.
"""

from __future__ import annotations

import sys
import uuid
from copy import deepcopy
from random import Random
from statistics import median
from typing import Any

from rich.progress import track

from benchmarks.harness.engines import (
    Arm,
    Engine,
    Home,
    engine_settings,
    in_turn,
    rest,
    started,
    temporary_home,
)
from benchmarks.harness.models import model_folder, model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_middle_half

TARGET = 0.99
_ARMS = {"with": True, "without": False}
"""Name, and whether answers are stored."""
_REQUESTS = 6
_PROMPT = 128
_ANSWER = 256
_APART_S = 0.5
"""Seconds between arrivals."""


def measure(options: Options) -> Result:
    """Serve the same requests with both engines, in turn."""
    turns = options.size(12, 3)
    random = Random(options.seed)
    rates: dict[str, list[float]] = {name: [] for name in _ARMS}
    with temporary_home(semantic="never") as home:
        settings = {name: _settings(options, home, stored) for name, stored in _ARMS.items()}
        with started(settings, dict.fromkeys(settings, sys.executable)) as engines:
            for engine in engines.values():
                _serve(engine, home, random, requests=1)
            before = home.stats()["answers_stored"]
            for turn in track(range(turns), "Turns"):
                state = random.getstate()
                for name in in_turn(list(_ARMS), turn):
                    random.setstate(state)
                    rates[name].append(_serve(engines[name], home, random))
            stored = home.stats()["answers_stored"] - before
    return _result(rates, stored, options)


def _settings(options: Options, home: Home, stored: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM`."""
    arm = Arm(caching=True, kvshare=True)
    settings = deepcopy(engine_settings(str(model_folder(options)), arm, home))
    extra = settings["kv_transfer_config"]["kv_connector_extra_config"]
    extra["kvshare.store_answers"] = stored
    return settings


def _serve(engine: Engine, home: Home, random: Random, requests: int = _REQUESTS) -> float:
    """Tokens a second over requests that are new to engine and store."""
    prompts = [[random.randrange(1_000, 40_000) for _ in range(_PROMPT)] for _ in range(requests)]
    arrivals = [_APART_S * number for number in range(requests)]
    replayed = engine.replay(arrivals, prompts, uuid.uuid4().hex, _ANSWER)
    rest(engine, home)  # what is still to be stored must not slow the next arm down
    return requests * _ANSWER / replayed.seconds


def _result(rates: dict[str, list[float]], stored: int, options: Options) -> Result:
    ratios = [ours / plain for ours, plain in zip(rates["with"], rates["without"], strict=True)]
    rows: list[list[Cell]] = [
        [name, *median_and_middle_half(values, 1)] for name, values in rates.items()
    ]
    rows.append(["with ÷ without", *median_and_middle_half(ratios)])
    ratio = median(ratios)
    return Result(
        name="answers",
        title="What storing answers costs",
        n={"turns": len(ratios), "requests a turn": _REQUESTS},
        seed=options.seed,
        model=model_name(options),
        noise_floor="the middle half of the ratios",
        columns=["answers stored", "tokens/s", "middle half"],
        rows=rows,
        paper="not measured",
        notes=[
            f"{_REQUESTS} requests a turn, {_APART_S:g} s apart, {_PROMPT} tokens each and "
            f"{_ANSWER} generated; both arms store their prompts",
            f"{stored} answers were stored; the daemon works on the engine's cores",
        ],
        targets=[
            ("tokens/s with answers stored ÷ without", f"{ratio:.3f}", ratio >= TARGET),
        ],
        series={"rates": rates},
    )
