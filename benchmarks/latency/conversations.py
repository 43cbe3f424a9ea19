"""Time to first token of conversations in a real engine, beside vLLM's own prefix caching.

Each arm serves a whole conversation, turn after turn without a pause; then the next arm does.
KVShare saves and embeds meanwhile, and that slows its next turns down as it does in production.
"""

from __future__ import annotations

import uuid
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from rich.progress import track

from benchmarks.data.chat_histories import REWRITES, as_tokens, conversations, turns
from benchmarks.harness.engines import LONGEST, Arm, Engine, Home, in_turn, rest, running
from benchmarks.harness.models import model_name, tokenizer_of
from benchmarks.harness.plots import cumulative
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_middle_half

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ARMS = {
    "prefix": Arm(caching=True),
    "prefix again": Arm(caching=True),
    "kvshare": Arm(caching=True, kvshare=True),
}
_TURNS = 6
_ANSWER = 8
_MOST = {"as it is": 0.7}
"""Target: KVShare's time as a multiple of prefix caching's, by kind of history."""


class Turn(NamedTuple):
    """One turn, served by every arm."""

    rewrite: str
    number: int
    """From 1."""
    tokens: int
    seconds: dict[str, float]

    def ratio(self, arm: str) -> float:
        """This arm's time to first token beside the first prefix-caching engine's."""
        return self.seconds[arm] / self.seconds["prefix"]


def measure(options: Options) -> Result:
    """Serve all conversations with every arm, once for each way to rewrite the history."""
    tokenizer = tokenizer_of(options)
    chosen = islice(conversations(options.data), options.size(6, 2))
    histories = [turns(messages)[:_TURNS] for messages in chosen]
    served = []
    with running(options, _ARMS) as (engines, home):
        for rewrite in track(REWRITES, "Histories"):
            salt = uuid.uuid4().hex
            for engine in engines.values():
                engine.forget()
            for number, history in enumerate(histories):
                prompts = [
                    as_tokens(rewrite.apply(messages, turn), tokenizer)[-LONGEST + _ANSWER :]
                    for turn, messages in enumerate(history)
                ]
                served += _serve(engines, home, rewrite.name, prompts, salt, number)
    return _result(served, options, model_name(options))


def _serve(
    engines: dict[str, Engine], home: Home, rewrite: str, prompts: list[list[int]], salt: str,
    number: int,
) -> list[Turn]:  # fmt: skip
    seconds: dict[str, list[float]] = {}
    for arm in in_turn(list(_ARMS), number):
        engine = engines[arm]
        asked = [engine.ask(prompt, salt, max_tokens=_ANSWER) for prompt in prompts]
        seconds[arm] = [timed.ttft_s for timed in asked]
        if arm == "kvshare":  # what it still has to store must not slow the next arm down
            rest(engine, home)
    return [
        Turn(rewrite, at + 1, len(prompt), {arm: seconds[arm][at] for arm in _ARMS})
        for at, prompt in enumerate(prompts)
    ]


def _result(served: list[Turn], options: Options, model: str) -> Result:
    later = [turn for turn in served if turn.number > 1]
    noise = [turn.ratio("prefix again") for turn in later]
    middle, half = median_and_middle_half(noise, 2)
    kinds = [rewrite.name for rewrite in REWRITES]
    tokens = sorted(turn.tokens for turn in served)
    return Result(
        name="conversations",
        title="Time to first token of turns 2 to 6 of a conversation, times prefix caching's",
        n={"turns of each kind": len(later) // len(kinds)},
        seed=options.seed,
        model=model,
        noise_floor=f"a second engine with prefix caching: median {middle}, middle half {half}",
        columns=["history", "arm", "n", "ms", "times prefix caching", "middle half", "sum"],
        rows=[_row(kind, arm, later) for kind in kinds for arm in _ARMS],
        paper="not measured",
        notes=[
            f"prompts of {tokens[0]:,} to {tokens[-1]:,} tokens, sent turn after turn without a "
            f"pause; {_ANSWER} tokens are generated for each",
            "the recorded answers are sent as history, whatever the model answers",
            "sum: total seconds of all turns, times prefix caching's",
            "all conversations of a kind have one tenant, so both arms may share what the "
            "conversations have in common",
        ],
        targets=[_target(kind, most, later) for kind, most in _MOST.items()],
        series={"ratios": {kind: sorted(t.ratio("kvshare") for t in later if t.rewrite == kind)
                           for kind in kinds}},
    )  # fmt: skip


def _target(kind: str, most: float, later: list[Turn]) -> tuple[str, str, bool]:
    ratios = [turn.ratio("kvshare") for turn in later if turn.rewrite == kind]
    reached = median(ratios)
    what = f"history {kind}: at most {most} times prefix caching's time to first token, median"
    return what, f"{reached:.2f}, n = {len(ratios)}", reached <= most


def _row(kind: str, arm: str, later: list[Turn]) -> list[Cell]:
    of_kind = [turn for turn in later if turn.rewrite == kind]
    ratios = [turn.ratio(arm) for turn in of_kind]
    ms = round(median(turn.seconds[arm] for turn in of_kind) * 1e3)
    total = sum(t.seconds[arm] for t in of_kind) / sum(t.seconds["prefix"] for t in of_kind)
    return [kind, arm, len(ratios), ms, *median_and_middle_half(ratios, 2), f"{total:.2f}"]


def draw(made: Result) -> Figure:
    """Share of turns below each ratio, by kind of history."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for (kind, ratios), style in zip(made.series["ratios"].items(), ("-", "--", ":"), strict=True):
        cumulative(axes, ratios, style, label=kind)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="time to first token, times prefix caching's", ylabel="share of turns")
    axes.legend()
    return figure
