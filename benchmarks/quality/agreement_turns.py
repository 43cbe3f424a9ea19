"""Agreement of conversations: how far each turn is from full compute when it is built on the turns
before it, which were built on those before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.harness.result import Cell, Options, Result
from benchmarks.methods.compared import engine_for
from benchmarks.quality.agreement_scores import CONTINUATION, Score
from benchmarks.quality.served_turns import Request, Served, Serving, floor_of, rewritten
from examples.prompts.histories import REWRITES
from kvshare_store.cli.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = tuple(rewrite.name for rewrite in REWRITES)
ARMS: dict[str, dict[str, Any]] = {"balanced": {"policy": "balanced"}}
FIRST, LATER = "first edited", "later"
_TURNS = 6
_COMPARED = (1, 2, 4, 6)
"""Turns that are compared with full compute, which takes most of the time; all are served."""
_FLOORS = 6
"""Requests that the noise floor is computed on: bf16 is slow on most CPUs."""


def measure(options: Options) -> Result:
    """Serve conversations of the half that is reported."""
    count, turns = options.size(8, 2), 2 if options.short else _TURNS
    return measured(options, rewritten(options, "report", KINDS, count, turns), ARMS)


def measured(options: Options, asked: Sequence[Request], arms: dict[str, dict[str, Any]]) -> Result:
    """The result of serving the requests once under the settings of each arm."""
    exact, _, model = engine_for(options)
    with ExitStack() as stack:
        serving = Serving(exact, stack, arms)
        served = [
            one
            for each in track(asked, "Serving turns")
            for one in serving.serve(each, each.turn in _COMPARED)
        ]
    rough, _, _ = engine_for(options, torch.bfloat16)
    return _result(options, model, served, list(_floors(rough, [one.request for one in served])))


def _floors(rough: RowEngine, requests: Sequence[Request]) -> Iterator[Score]:
    """The noise floor on some of the requests, evenly drawn."""
    drawn = np.linspace(0, len(requests) - 1, min(_FLOORS, len(requests))).astype(int)
    for at in track(drawn.tolist(), "Noise floor"):
        yield floor_of(rough, requests[at])


# --- the result -----------------------------------------------------------------------------------

_COLUMNS = [
    "history", "turns", "arm", "n", "reused, pooled", "generation", "first token same", "KL first",
    "KL 16", "± (s.e.)", "x bf16 twice",
]  # fmt: skip


def _result(
    options: Options, model: str, served: Sequence[Served], floors: Sequence[Score]
) -> Result:
    floor = float(np.mean([one.kl for one in floors]))
    rows, verdicts = [], []
    for arm in dict.fromkeys(one.score.method for one in served):
        for kind in dict.fromkeys(one.request.kind for one in served):
            ours = [one for one in served if (one.score.method, one.request.kind) == (arm, kind)]
            parted = parts(ours)
            rows += [_row(kind, name, kept, floor) for name, kept in parted.items() if kept]
            verdicts += targets(kind, parted, floor)
    return Result(
        name="agreement-turns",
        title=f"Conversations: agreement with full compute over {CONTINUATION} forced tokens",
        n={"conversations": len({one.request.conversation for one in served}),
           "turns each": max(one.request.turn for one in served),
           "requests for the noise floor": len(floors)},
        seed=options.seed,
        model=f"{model}, fp32, transformers",
        noise_floor=f"mean KL over 16 tokens, bf16 twice: {floor:.4f}",
        columns=_COLUMNS,
        rows=rows,
        paper="not measured",
        notes=_NOTES,
        targets=verdicts,
        series={"floor": floor, "turns": [
            [one.score.method, one.request.kind, one.request.conversation, one.request.turn,
             one.generation, one.edited, one.score.reused, one.score.tokens, one.score.kl]
            for one in served
        ]},
    )  # fmt: skip


_NOTES = [
    "Recorded airline conversations, two side by side; every turn is planned from what the store "
    "keeps of the turns before it, and stored with its edited rows. Turns "
    f"{', '.join(map(str, _COMPARED))} are compared with full compute of the same prompt, in fp32, "
    "where any of their rows is approximate. A history of which no row here is has no line.",
    f"`{FIRST}`: the first of these turns of each conversation. `{LATER}`: those behind it, which "
    "build on it: they continue its rows, edit them again, or both.",
    "generation: the highest of these turns' plans. `x bf16 twice`: KL 16 as a multiple of full "
    "compute in bf16 against itself with the prompt in two chunks.",
]


def parts(served: Sequence[Served]) -> dict[str, list[Served]]:
    """The requests of one kind and arm that are not exact: the first of each conversation, all
    later ones, and these by turn."""
    approximate = [one for one in served if one.generation]
    first: dict[int, int] = {}
    for one in approximate:
        first.setdefault(one.request.conversation, one.request.turn)
    began = [one for one in approximate if one.request.turn == first[one.request.conversation]]
    later = [one for one in approximate if one.request.turn > first[one.request.conversation]]
    by_turn = {
        f"turn {turn}": [one for one in later if one.request.turn == turn]
        for turn in sorted({one.request.turn for one in later})
    }
    return {FIRST: began, LATER: later, **by_turn}


def _row(kind: str, name: str, kept: Sequence[Served], floor: float) -> list[Cell]:
    kl = [one.score.kl for one in kept]
    return [
        kind,
        name,
        kept[0].score.method,
        len(kept),
        sum(one.score.reused for one in kept) / sum(one.score.tokens for one in kept),
        max(one.generation for one in kept),
        float(np.mean([one.score.first_same for one in kept])),
        float(np.mean([one.score.kl_first for one in kept])),
        float(np.mean(kl)),
        _error(kl),
        float(np.mean(kl)) / floor if floor else None,
    ]


def _error(values: Sequence[float]) -> float:
    """Standard error of their mean."""
    return float(np.std(values) / len(values) ** 0.5)


def targets(
    kind: str, parted: dict[str, list[Served]], floor: float
) -> list[tuple[str, str, bool]]:
    """Later turns are no further from full compute than first edited ones: what they differ by is
    noise if it is within two standard errors, or less than rounding to bf16 does."""
    first, later = ([one.score.kl for one in parted[name]] for name in (FIRST, LATER))
    if not first or not later:
        return []
    apart = float(np.mean(later) - np.mean(first))
    noise = max(floor, 2 * float(np.hypot(_error(first), _error(later))))
    arm = parted[FIRST][0].score.method
    return [(
        f"{arm}, {kind}: KL 16 of later turns no more than of first edited ones, within noise",
        f"{np.mean(later):.5f} (n = {len(later)}) beside {np.mean(first):.5f} "
        f"(n = {len(first)}), noise {noise:.5f}",
        apart <= noise,
    )]  # fmt: skip


def draw(made: Result) -> Figure:
    """Mean KL by turn for each kind of history, with the noise floor as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    by_kind: dict[str, dict[int, list[float]]] = {}
    for arm, kind, _, turn, *_, kl in made.series["turns"]:
        by_kind.setdefault(f"{arm}, {kind}", {}).setdefault(turn, []).append(kl)
    for at, (name, turns) in enumerate(by_kind.items()):
        means = [max(1e-7, float(np.mean(kl))) for kl in turns.values()]
        style = ("o-", "s--", "^-.", "v:")[at % 4]
        axes.plot(list(turns), means, style, color="black", markerfacecolor="white", label=name)
    axes.axhline(made.series["floor"], color="black", linewidth=0.6, label="noise: bf16 twice")
    axes.set_yscale("log")
    axes.set_xlabel("turn")
    axes.set_ylabel("KL to full compute, mean over 16 tokens (nats)")
    axes.legend(fontsize=7)
    return figure
