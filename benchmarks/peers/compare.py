"""Compare another system's engine with plain vLLM, prefix caching and KVShare, on the same prompts.

Each prompt is served three times: as a miss, again, and changed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.data.edited_prompts import SCATTERED, Texts, follower, long_texts
from benchmarks.harness.engines import Arm, Engine, Home, Timed, in_turn, rest, running
from benchmarks.harness.models import model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_middle_half
from kvshare_store.cli.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANSWER = 16
LENGTHS = (768, 1024, 1536, 2048)
SHARE = 0.9
_KINDS = ("miss", "again", "similar")
_STORED_S = 1.0
"""Pause after a request: other systems store in the background and do not report completion."""


class Peer(NamedTuple):
    """The other system."""

    name: str
    settings: dict[str, Any]
    """Arguments of `vllm.LLM` for its engine, beside the common ones."""
    python: str
    """A Python interpreter that can import it."""
    salted: bool = True
    """Whether it can find prompts that have a `cache_salt`."""


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


def compare(peer: Peer, options: Options) -> list[Sample]:
    """Serve every prompt by every arm in turn."""
    arms = {
        "plain": Arm(caching=False),
        "prefix": Arm(caching=True),
        peer.name: Arm(caching=False, more=peer.settings, python=peer.python),
        "kvshare": Arm(caching=False, kvshare=True),
    }
    texts = long_texts(options)
    with running(options, arms) as (engines, home):
        return [
            sample
            for turn in track(range(-1, max(2, options.size(24, 4))), "Serving prompts")
            for sample in serve(engines, peer, home, texts, turn)
            if turn >= 0  # the first one warms up
        ]


def serve(
    engines: dict[str, Engine], peer: Peer, home: Home, texts: Texts, turn: int
) -> Iterator[Sample]:
    base = texts.take(LENGTHS[turn % len(LENGTHS)])
    changed = follower(base, SHARE, SCATTERED, texts)
    salt = uuid.uuid4().hex
    for kind, prompt in zip(_KINDS, (base, base, changed), strict=True):
        served = {}
        for arm in in_turn(list(engines), turn):
            own = salt if arm != peer.name or peer.salted else ""
            served[arm] = engines[arm].ask(prompt, own, max_tokens=ANSWER)
            if arm == "kvshare":
                rest(engines[arm], home)
            elif arm == peer.name:
                time.sleep(_STORED_S)
        yield Sample(kind, served)


def table(
    name: str, title: str, notes: list[str], samples: list[Sample], options: Options
) -> Result:
    """A row for each kind of prompt and arm."""
    arms = list(samples[0].timed)
    return Result(
        name=name,
        title=title,
        n={"prompts": len(samples) // len(_KINDS)},
        seed=options.seed,
        model=model_name(options),
        noise_floor=_noise(samples),
        columns=["prompt", "arm", "n", "ms", "/ plain", "middle half", "same tokens"],
        rows=[_row(kind, arm, samples) for kind in _KINDS for arm in arms],
        paper="not measured",
        notes=[
            *notes,
            f"similar: {SHARE:.0%} of the tokens in common, changed at {SCATTERED} places",
            f"same tokens: the {ANSWER} greedy tokens equal plain vLLM's, bf16. What else is in a "
            "step changes rounding: prefix caching, whose rows are exact, is the floor of this "
            "column",
            f"prompts of {', '.join(map(str, LENGTHS))} tokens; prefix caching only where it says",
        ],
        series={"ratios": {kind: {arm: _ratios(samples, kind, arm) for arm in arms}
                           for kind in _KINDS}},
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
    same = sum(sample.same(arm) for sample in of_kind)
    ms = round(median(sample.timed[arm].ttft_s for sample in of_kind) * 1e3)
    same_of = f"{same} of {len(of_kind)}"
    return [kind, arm, len(ratios), ms, *median_and_middle_half(ratios), same_of]


def draw(made: Result) -> Figure:
    """Time to first token beside plain vLLM's, by kind of prompt and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    greys = ("white", "lightgrey", "grey", "black")
    arms = list(made.series["ratios"][_KINDS[0]])
    for place, (arm, grey) in enumerate(zip(arms, greys, strict=True)):
        at = [kind + (place - 1.5) * 0.2 for kind in range(len(_KINDS))]
        middle = [median(made.series["ratios"][kind][arm]) for kind in _KINDS]
        axes.bar(at, middle, 0.2, color=grey, edgecolor="black", label=arm)
    axes.set_xticks(range(len(_KINDS)), _KINDS)
    axes.set_ylabel("time to first token, times plain")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
