"""What the report of quality costs an engine that is never idle: requests a second with second
looks at their default rate of scores, and without.

Engines with KVShare serve the same requests in turn, all there at once. The two without second
looks differ in nothing: how far they are apart is the noise floor.
"""

from __future__ import annotations

import math
from random import Random
from statistics import median
from typing import NamedTuple

from benchmarks.data.edited_prompts import long_texts
from benchmarks.harness.engines import Engine, Home, in_turn, running
from benchmarks.harness.models import model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_middle_half
from benchmarks.latency.load import Traffic, traffic
from benchmarks.latency.second_look import ANSWER, ARMS, serve
from kvshare_store.cli.progress import track

TARGET = 0.99
_REQUESTS = 16


class _Turn(NamedTuple):
    """One round of all arms."""

    rates: dict[str, float]
    """Requests a second."""
    looks: int
    """Second looks that ended meanwhile."""


def measure(options: Options) -> Result:
    """Serve the same requests with every engine, in turn."""
    texts, random = long_texts(options), Random(options.seed)
    with running(options, ARMS, semantic="never") as (engines, home):
        served = [
            _turn(engines, home, traffic(texts, _REQUESTS, random), turn)
            for turn in track(range(options.size(12, 3)), "Turns")
        ]
    return _result(served, options)


def _turn(engines: dict[str, Engine], home: Home, sent: Traffic, turn: int) -> _Turn:
    before = _looks(home)
    rates = {
        arm: serve(engines[arm], home, sent, math.inf).rate for arm in in_turn(list(ARMS), turn)
    }
    return _Turn(rates, _looks(home) - before)


def _looks(home: Home) -> int:
    counts = home.stats()
    return int(counts["settled"] + counts["looks_control"])


def _result(served: list[_Turn], options: Options) -> Result:
    ratios = {
        arm: [turn.rates[arm] / turn.rates["off"] for turn in served]
        for arm in ARMS
        if arm != "off"
    }
    middle, half = median_and_middle_half(ratios["off again"])
    ratio = median(ratios["idle"])
    return Result(
        name="score-cost",
        title="What the report of quality costs an engine that is never idle",
        n={"turns": len(served), "requests a turn and arm": _REQUESTS},
        seed=options.seed,
        model=model_name(options),
        noise_floor=f"a second engine without second looks: {middle} times, middle half {half}",
        columns=["second_look", "requests/s", "middle half", "times off", "middle half of that"],
        rows=[_row(arm, [turn.rates[arm] for turn in served], ratios.get(arm)) for arm in ARMS],
        paper="not measured",
        notes=[
            f"{_REQUESTS} requests are there at once, half of them edits of stored prompts; "
            f"{ANSWER} tokens are generated for each",
            f"second looks that ended meanwhile: {sum(turn.looks for turn in served)}. An engine "
            "that is never idle makes none, so this is what remembering its answers costs; the "
            "answers are scored once it is idle. Scores are at their default rate: every edited "
            "answer that a second look computes anyway, and one in a hundred of the others",
        ],
        targets=[("requests a second ÷ without second looks", f"{ratio:.3f}", ratio >= TARGET)],
        series={"rates": [turn.rates for turn in served]},
    )


def _row(arm: str, rates: list[float], ratios: list[float] | None) -> list[Cell]:
    compared = median_and_middle_half(ratios) if ratios else [None, None]
    return [arm, *median_and_middle_half(rates, 2), *compared]
