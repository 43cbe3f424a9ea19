"""The cost of a miss: prompts that resemble no stored prompt, with and without KVShare.

Two engines without KVShare are measured too; the difference between them is the noise.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from benchmarks.data.datasets import ARENA_HARD, arena_hard
from benchmarks.harness.engines import Arm, Engine, Home, in_turn, rest, running
from benchmarks.harness.models import model_name, tokenizer_of
from benchmarks.harness.plots import cumulative
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_middle_half
from kvshare_store.cli.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET = 0.02
_LONGEST = 2048
_ARMS = {
    "plain": Arm(caching=True),
    "plain again": Arm(caching=True),
    "kvshare": Arm(caching=True, kvshare=True),
}
_ADDED = ("lookup", "plan", "snapshot")
_BUCKETS = (32, 128, 512, _LONGEST + 1)


class Triple(NamedTuple):
    """One prompt, served by every arm within seconds."""

    tokens: int
    seconds: dict[str, float]
    parts: dict[str, float]
    """Of KVShare's."""
    hit: bool
    """KVShare, or the cache of its engine, found something to reuse after all."""
    background: float
    """Processor seconds that KVShare used for this prompt after its token: engine and daemon."""

    @property
    def added(self) -> float:
        """Share of KVShare's time that it spent in parts which plain vLLM does not have."""
        return sum(self.parts[part] for part in _ADDED) / self.seconds["kvshare"]

    def ratio(self, arm: str) -> float:
        """This arm's time beside the first plain engine's."""
        return self.seconds[arm] / self.seconds["plain"]


def prompts(data: Path, tokenizer: Any) -> Iterator[list[int]]:
    """Distinct real prompts of 32 to 2,048 tokens, without a chat template.

    A template's first tokens are the same for all, and would be a hit.
    """
    for prompt in arena_hard(data, ARENA_HARD[::-1]):
        tokens = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        if _BUCKETS[0] <= len(tokens) <= _LONGEST:
            yield tokens


def measure(options: Options) -> Result:
    """Serve every prompt with every arm, beginning with another one each time."""
    warm, count = 8, max(2, options.size(300, 40))
    sent = list(islice(prompts(options.data, tokenizer_of(options)), warm + count))
    with running(options, _ARMS) as (engines, home):
        triples = [
            _serve(engines, home, tokens, turn)
            for turn, tokens in enumerate(track(sent, "Serving prompts"))
        ][warm:]
    return result_of(triples, options, model_name(options))


def _serve(engines: dict[str, Engine], home: Home, tokens: list[int], turn: int) -> Triple:
    salt, served = uuid.uuid4().hex, {}
    before, background = home.stats(), 0.0
    for arm in in_turn(list(_ARMS), turn):
        # one salt for all of KVShare's: the store it looks into grows with every prompt
        served[arm] = engines[arm].ask(tokens, "all" if arm == "kvshare" else salt)
        if arm == "kvshare":
            background = _settle(engines[arm], home)
    after = home.stats()
    hit = any(after[name] > before[name] for name in ("hits_exact", "hits_edited"))
    seconds, ours = {arm: timed.ttft_s for arm, timed in served.items()}, served["kvshare"]
    return Triple(len(tokens), seconds, ours.parts, hit or ours.cached > 0, background)


def _settle(engine: Engine, home: Home) -> float:
    """Wait until the prompt is stored and the daemon idle; processor seconds that this took."""
    process = psutil.Process(engine.pid)
    before = sum(process.cpu_times()[:2]) + home.processor_seconds()
    rest(engine, home)
    return sum(process.cpu_times()[:2]) + home.processor_seconds() - before


def result_of(triples: list[Triple], options: Options, model: str) -> Result:
    misses = [triple for triple in triples if not triple.hit]
    edges = list(pairwise(_BUCKETS))
    groups = {f"{a} to {b - 1} tokens": [t for t in misses if a <= t.tokens < b] for a, b in edges}
    groups["all"] = misses
    overhead = median(triple.ratio("kvshare") for triple in misses) - 1
    noise = [triple.ratio("plain again") - 1 for triple in misses]
    return Result(
        name="misses",
        title="Time to first token of misses, KVShare beside plain vLLM",
        n={"misses": len(misses), "hits left out": len(triples) - len(misses)},
        seed=options.seed,
        model=model,
        noise_floor=f"a second plain engine: median {median(noise):+.1%}, {_spread(noise)}",
        columns=["prompts", "arm", "n", "ms", "times plain", "middle half"],
        rows=[
            row
            for title, group in groups.items()
            if len(group) > 1
            for row in _rows(title, group)
        ],
        paper="not measured",
        notes=[
            "what KVShare adds before the token, median ms: "
            + ", ".join(
                f"{part} {median(t.parts[part] for t in misses) * 1e3:.2f}"
                for part in _ADDED
            ),
            "these parts as a share of the time to first token, which says the same with less "
            "noise, median: "
            + ", ".join(
                f"{title} {median(triple.added for triple in group):.1%}"
                for title, group in groups.items()
                if group
            ),
            "processor time for storing and embedding the prompt after its token, on no request's "
            f"way while the machine has time: median {_background(misses):.0f} ms per prompt",
            "prefix caching is on for every arm; KVShare's store grows with every prompt",
        ],
        targets=[
            ("miss overhead ≤ 2 %, median", f"{overhead:+.1%}, n = {len(misses)}",
             overhead <= TARGET)
        ],
        series={"ratios": {arm: sorted(t.ratio(arm) for t in misses) for arm in list(_ARMS)[1:]}},
    )  # fmt: skip


def _background(triples: list[Triple]) -> float:
    return median(triple.background for triple in triples) * 1e3


def _spread(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4)
    return f"middle half {low:+.1%} to {high:+.1%}"


def _rows(title: str, triples: list[Triple]) -> Iterator[list[Cell]]:
    for arm in _ARMS:
        ms = round(median(triple.seconds[arm] for triple in triples) * 1e3)
        ratios = [triple.ratio(arm) for triple in triples]
        yield [title, arm, len(triples), ms, *median_and_middle_half(ratios)]


def draw(made: Result) -> Figure:
    """Share of prompts below each ratio, for KVShare and for the noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    styles = {"kvshare": "-", "plain again": ":"}
    for arm, ratios in made.series["ratios"].items():
        cumulative(axes, ratios, styles[arm], label=arm)
    axes.axvline(1 + TARGET, color="grey", linewidth=0.8)
    axes.set(xlabel="time to first token, times plain", ylabel="share of prompts", xlim=(0.8, 1.3))
    axes.legend()
    return figure
