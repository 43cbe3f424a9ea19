"""The second look: how soon an edited prompt is exact, and what it costs requests under load.

Three engines with KVShare serve the same requests in turn, one of them with `second_look: idle`.
The two without differ in nothing: how far they are apart is the noise floor.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from random import Random
from statistics import median
from typing import NamedTuple

from benchmarks.data.edited_prompts import Texts
from benchmarks.harness.engines import (
    Arm,
    Engine,
    Home,
    Replayed,
    in_turn,
    rest,
    running,
)
from benchmarks.harness.models import model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_middle_half
from benchmarks.latency.load import Traffic, summary, traffic
from kvshare_store.cli.progress import track

ARMS = {
    name: Arm(caching=True, kvshare=True, own={"second_look": mode})
    for name, mode in (("off", "off"), ("off again", "off"), ("idle", "idle"))
}
_PROMPT = 2_000
ANSWER = 8
_LOADS = (0.5, 0.8, 1.1)
_SLOWER, _EXTRA_S = 1.2, 1.0
"""An edited prompt is to be exact within so many times its prefill, plus so many seconds."""
_COST = 1.02
"""What requests under load may take, times what they take without."""


class _Settled(NamedTuple):
    """One edited prompt on an idle engine; seconds."""

    prefill_s: float
    """Of as many new tokens, computed in full at once."""
    exact_s: float
    """From its answer until its exact rows are stored."""


def measure(options: Options) -> Result:
    """Edited prompts one by one, then the same traffic with all engines at several rates."""
    random = Random(options.seed)
    texts = Texts(_random_text(random))
    with running(options, ARMS, semantic="never", second_look_control=0.0) as (engines, home):
        trials = options.size(12, 4)
        settled = [_settle(engines["idle"], home, texts) for _ in track(range(trials), "Prompts")]
        loads = (0.8,) if options.short else _LOADS
        count = options.size(200, 40)
        served = _under_load(engines, home, traffic(texts, count, random), loads)
    return _result(settled, served, count, options)


def _random_text(random: Random) -> Iterator[list[int]]:
    while True:
        yield [random.randrange(1_000, 40_000) for _ in range(1_000)]


def _settle(engine: Engine, home: Home, texts: Texts) -> _Settled:
    """A prompt with one edit near its beginning, whose donor was stored before."""
    salt, donor = uuid.uuid4().hex, texts.take(_PROMPT)
    engine.forget()
    engine.ask(donor, salt, max_tokens=ANSWER)
    rest(engine, home)
    prefill_s = engine.ask(texts.take(_PROMPT), salt, policy="off").ttft_s
    edited = [*donor[:64], *texts.take(32), *donor[96:]]
    answer = engine.ask(edited, salt, max_tokens=ANSWER)
    before = home.stats()["settled"]
    exact_s = engine.look()
    if not answer.report.get("kvshare.edited") or home.stats()["settled"] == before:
        raise RuntimeError(f"no edited prompt was settled: {answer.report}")
    return _Settled(prefill_s, exact_s)


def _under_load(
    engines: dict[str, Engine], home: Home, sent: Traffic, loads: tuple[float, ...]
) -> dict[float, dict[str, Replayed]]:
    """The traffic by load and arm. 1.0 is what the engine without second looks serves at once."""
    full = serve(engines["off"], home, sent, math.inf).rate
    found: dict[float, dict[str, Replayed]] = {}
    for turn, load in enumerate(track(loads, "Rates")):
        found[load] = {
            arm: serve(engines[arm], home, sent, load * full) for arm in in_turn(list(ARMS), turn)
        }
    return found


def serve(engine: Engine, home: Home, sent: Traffic, rate: float) -> Replayed:
    """Donors first, then the traffic, so many requests a second."""
    engine.forget()
    salt = uuid.uuid4().hex
    for donor in sent.donors:
        engine.ask(donor, salt)
    rest(engine, home)
    replayed = engine.replay([at / rate for at in sent.arrivals], sent.prompts, salt, ANSWER)
    rest(engine, home)  # what is still to be stored must not slow the next arm down
    return replayed


def _result(
    settled: list[_Settled],
    served: dict[float, dict[str, Replayed]],
    count: int,
    options: Options,
) -> Result:
    goal = [one.exact_s <= _SLOWER * one.prefill_s + _EXTRA_S for one in settled]
    return Result(
        name="second-look",
        title="How soon edited prompts are exact, and what that costs requests",
        n={"edited prompts": len(settled), "requests per rate and arm": count},
        seed=options.seed,
        model=model_name(options),
        noise_floor=f"a second engine without second looks: {_floor(served)}",
        columns=["what", "second_look", "prefill s", "exact after s", "served/s", "p50 ms",
                 "p99 ms", "each request, times off", "middle half"],
        rows=[
            ["idle", "idle", median(one.prefill_s for one in settled),
             median(one.exact_s for one in settled), *[None] * 5],
            *(_row(load, arm, served[load]) for load in served for arm in ARMS),
        ],
        paper="not measured",
        notes=[
            f"edited prompts: {_PROMPT:,} random tokens, of which 32 near the beginning are new; "
            f"{ANSWER} are generated; time runs from the last token of the answer until the exact "
            "rows are stored, 0.2 s of waiting for further requests included",
            "load is the share of what the engine without second looks serves when all requests "
            "are there at once; half of them have most tokens in common with a stored prompt",
            "each request, times off: its time to first token beside that of the same request, "
            "arrived at the same second, in the first engine without second looks; median",
            "engine and daemon share the machine's cores",
        ],
        targets=[
            (f"exact within {_SLOWER:g} x prefill + {_EXTRA_S:g} s", f"{sum(goal)} of {len(goal)}",
             all(goal)),
            *(target for load, arms in served.items() for target in targets(load, arms)),
        ],
        series={
            "settled": [list(one) for one in settled],
            "ttfts": [
                {"load": load, **{arm: one.ttfts for arm, one in arms.items()}}
                for load, arms in served.items()
            ],
        },
    )  # fmt: skip


def targets(load: float, arms: dict[str, Replayed]) -> Iterator[tuple[str, str, bool]]:
    """Median, slowest of a hundred and rate beside those without second looks."""
    middle, slow, rate = _costs(arms, "idle")
    for name, cost in (("p50", middle), ("p99", slow)):
        yield f"{name} at load {load:.0%} / without second looks", f"{cost:.3f}", cost <= _COST
    what = f"requests a second at load {load:.0%} / without second looks"
    yield what, f"{rate:.3f}", rate >= 2 - _COST


def _floor(served: dict[float, dict[str, Replayed]]) -> str:
    """How far the two engines without second looks are apart at each load."""
    return "; ".join(
        "load {:.0%}: p50 {:.3f}, p99 {:.3f}, served/s {:.3f}".format(
            load, *_costs(arms, "off again")
        )
        for load, arms in served.items()
    )


def _costs(arms: dict[str, Replayed], arm: str) -> tuple[float, float, float]:
    """p50, p99 and requests a second of this arm, times those of `off`."""
    (middle, _, slow), (plain, _, plain_slow) = (summary(arms[name].ttfts) for name in (arm, "off"))
    return middle / plain, slow / plain_slow, arms[arm].rate / arms["off"].rate


def _row(load: float, arm: str, arms: dict[str, Replayed]) -> list[Cell]:
    ttfts = arms[arm].ttfts
    middle, _, slow = summary(ttfts)
    pairs = [one / plain for one, plain in zip(ttfts, arms["off"].ttfts, strict=True)]
    return [
        f"load {load:.0%}", arm, None, None, arms[arm].rate, round(middle * 1e3),
        round(slow * 1e3), *median_and_middle_half(pairs),
    ]  # fmt: skip
