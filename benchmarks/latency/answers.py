"""What storing answers costs: tokens generated a second, with `store_answers` and without.

Two engines with KVShare serve the same requests in turn. Requests begin and end one after the
other, so that answers are stored while others are generated.
"""

from __future__ import annotations

import uuid
from random import Random
from statistics import median

from benchmarks.harness.engines import (
    Arm,
    Engine,
    Home,
    in_turn,
    rest,
    running,
)
from benchmarks.harness.models import model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_middle_half
from kvshare_store.cli.progress import track

TARGET = 0.99
_ARMS = {
    name: Arm(caching=True, kvshare=True, own={"store_answers": stored})
    for name, stored in (("with", True), ("without", False))
}
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
    with running(options, _ARMS, semantic="never") as (engines, home):
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
