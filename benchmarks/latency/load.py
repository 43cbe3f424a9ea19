"""Throughput and time to first token under load; half of the requests can reuse KV.

Requests arrive at random (Poisson); every arm serves the same prompts at the same moments, one arm
after the other, and begins with empty caches.
"""

from __future__ import annotations

import math
import uuid
from random import Random
from statistics import mean, median
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.data.edited_prompts import SCATTERED, Texts, follower, long_texts
from benchmarks.harness.engines import Arm, Engine, Home, Replayed, in_turn, rest, running
from benchmarks.harness.models import model_name
from benchmarks.harness.plots import cumulative
from benchmarks.harness.result import Cell, Options, Result
from kvshare_store.cli.progress import track
from kvshare_store.config import load_config
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.simulate.prompt_replay import PREFIX_CACHING, Room, arms_of, replay
from kvshare_store.simulate.prompts import Prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET = 1.6
_ARMS = {
    "plain": Arm(caching=False),
    "prefix": Arm(caching=True),
    "kvshare": Arm(caching=True, kvshare=True),
}
_AT_ONCE = math.inf
"""All requests arrive at once, which measures the arm's throughput."""
_LOADS = (_AT_ONCE, 0.5, 0.8, 1.1)
"""Arrivals a second, as a share of what plain vLLM serves at once."""
_LENGTHS = (512, 768, 1024, 1536)
_DONORS = 6
_POLICY = "balanced"
_SHARES = (0.75, 0.9, 0.95)
_ANSWER = 8


class Traffic(NamedTuple):
    """The requests: half of them resemble a donor, half are new."""

    donors: list[list[int]]
    prompts: list[list[int]]
    arrivals: list[float]
    """Arrival times in seconds at a rate of one request a second."""


class Phase(NamedTuple):
    """One rate, served by every arm."""

    load: float
    rate: float
    """Requests a second."""
    replayed: dict[str, Replayed]
    daemon_s: float
    """Processor seconds of KVShare's daemon while its requests waited or were served."""
    left: dict[str, int]
    """Tokens of the requests that prefix caching and `balanced` leave to compute, by replay."""

    @property
    def name(self) -> str:
        """Its name in the table and the plot."""
        return "at once" if self.load == _AT_ONCE else f"{self.load:.0%}"

    @property
    def bound(self) -> float:
        """How many times as fast as prefix caching KVShare would be if nothing but the prefill of
        tokens took time."""
        return self.left[PREFIX_CACHING] / self.left[_POLICY]

    def served(self, arm: str) -> float:
        """Requests a second from the first arrival to the last answer."""
        return self.replayed[arm].rate


def traffic(texts: Texts, count: int, generator: Random) -> Traffic:
    """`count` requests and the prompts that were stored before them."""
    donors = [texts.take(_LENGTHS[number % len(_LENGTHS)]) for number in range(_DONORS)]
    prompts = []
    for number in range(count):
        if number % 2:
            prompts.append(texts.take(generator.choice(_LENGTHS)))
        else:
            donor, share = generator.choice(donors), generator.choice(_SHARES)
            prompts.append(follower(donor, share, SCATTERED, texts))
    generator.shuffle(prompts)
    arrivals, now = [], 0.0
    for _ in prompts:
        now += generator.expovariate(1.0)
        arrivals.append(now)
    return Traffic(donors, prompts, arrivals)


def measure(options: Options) -> Result:
    """Serve the same traffic at several rates."""
    count = options.size(80, 16)
    loads = (_AT_ONCE, 0.8) if options.short else _LOADS
    texts = long_texts(options)
    generator = Random(options.seed)
    phases: list[Phase] = []
    with running(options, _ARMS) as (engines, home):
        for turn, load in enumerate(track(loads, "Rates")):
            sent = traffic(texts, count, generator)
            rate = load * phases[0].served("plain") if phases else load
            replayed, daemon_s = {}, 0.0
            for arm in in_turn(list(_ARMS), turn):
                replayed[arm], used = _serve(engines[arm], arm, home, sent, rate)
                daemon_s += used if arm == "kvshare" else 0.0
            phases.append(Phase(load, rate, replayed, daemon_s, to_compute(sent)))
    return _result(phases, options, model_name(options))


def _serve(
    engine: Engine, arm: str, home: Home, sent: Traffic, rate: float
) -> tuple[Replayed, float]:
    """Donors first, one by one; then the traffic, and what the daemon took meanwhile (seconds)."""
    engine.forget()
    salt = uuid.uuid4().hex
    for donor in sent.donors:
        engine.ask(donor, salt)
    # every path once: a plan with placeholders, a miss
    engine.ask(sent.donors[0][:-8] + sent.donors[1][:8], salt)
    if arm == "kvshare":
        rest(engine, home)
    arrivals = [arrival / rate for arrival in sent.arrivals]
    before = home.processor_seconds()
    replayed = engine.replay(arrivals, sent.prompts, salt, _ANSWER)
    used = home.processor_seconds() - before
    if arm == "kvshare":  # what it still has to store must not slow the next arm down
        rest(engine, home)
    return replayed, used


def to_compute(sent: Traffic) -> dict[str, int]:
    """What each arm must compute of the requests, if all is stored the moment it is served."""
    arms = arms_of(load_config(), [_POLICY], Room(row_bytes=4))
    prompts = [
        Prompt(as_tokens(tokens), as_tokens([]), None, "", "")
        for tokens in (*sent.donors, *sent.prompts)
    ]
    left = replay(prompts, arms, 0)
    served = len(sent.prompts)
    return {name: sum(left.to_compute(name)[-served:]) for name in arms}


def _result(phases: list[Phase], options: Options, model: str) -> Result:
    return Result(
        name="load",
        title="Requests that keep arriving, half of them similar to stored prompts",
        n={"requests per rate and arm": len(phases[0].replayed["plain"].ttfts)},
        seed=options.seed,
        model=model,
        noise_floor="none: every arm serves each rate once; the machine's noise is in `misses`",
        columns=["load", "requests/s", "arm", "served/s", "p50 ms", "p99 ms", "p50 times plain",
                 "mean times plain", "p99 times plain"],
        rows=[row_of(phase, arm) for phase in phases for arm in _ARMS],
        paper="not measured",
        notes=[
            "load is the share of what plain vLLM serves when all requests are there at once, "
            f"{phases[0].served('plain'):.2f} requests/s; {_ANSWER} tokens are generated for each",
            f"prompts of {_LENGTHS[0]} to {_LENGTHS[-1]} tokens; half are new, half have "
            f"{_SHARES[0]:.0%}, {_SHARES[1]:.0%} or {_SHARES[2]:.0%} in common with one of "
            f"{_DONORS} stored prompts, changed at {SCATTERED} places",
            "KVShare stores every prompt while it serves, on the same cores",
            "processor seconds of the daemon from the first request to the last answer, pauses "
            "between requests included: "
            + ", ".join(f"{phase.name} {phase.daemon_s:.1f}" for phase in phases),
            "with so few requests p99 is the slowest or the second slowest of them",
            "tokens to compute of the requests at once, by replay: "
            + ", ".join(f"{name} {tokens:,}" for name, tokens in phases[0].left.items())
            + f"; their quotient, {phases[0].bound:.2f}, is the most that reuse under `{_POLICY}` "
            "can make of the rate beside prefix caching, if prefill is all the work",
        ],
        targets=[_target(phases[0])],
        series={"ttfts": [
            {"load": phase.name, **{arm: phase.replayed[arm].ttfts for arm in _ARMS}}
            for phase in phases
        ]},
    )  # fmt: skip


def _target(at_once: Phase) -> tuple[str, str, bool]:
    ratio = at_once.served("kvshare") / at_once.served("prefix")
    what = f"all requests at once: {TARGET} times as many a second as prefix caching"
    return what, f"{ratio:.2f}, of {at_once.bound:.2f} by tokens", ratio >= TARGET


def row_of(phase: Phase, arm: str) -> list[Cell]:
    ours, plain = summary(phase.replayed[arm].ttfts), summary(phase.replayed["plain"].ttfts)
    middle, _, slow = ours
    return [
        phase.name, "-" if phase.load == _AT_ONCE else phase.rate, arm, phase.served(arm),
        round(middle * 1e3), round(slow * 1e3),
        *(value / beside for value, beside in zip(ours, plain, strict=True)),
    ]  # fmt: skip


def summary(ttfts: list[float]) -> tuple[float, float, float]:
    """p50, mean and p99."""
    ranked = sorted(ttfts)
    return median(ranked), mean(ranked), ranked[round(0.99 * (len(ranked) - 1))]


def draw(made: Result) -> Figure:
    """Share of requests that have their first token by a given time, for each rate."""
    from matplotlib.figure import Figure

    phases = made.series["ttfts"]
    figure = Figure(figsize=(4 * len(phases), 3.5))
    styles = {"plain": ":", "prefix": "--", "kvshare": "-"}
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        for arm, style in styles.items():
            cumulative(axes, phase[arm], style, label=arm)
        axes.set(xlabel="seconds to first token", title=f"load: {phase['load']}")
        axes.set(ylabel="share of requests", xlim=(0, None))
        axes.legend()
    return figure
