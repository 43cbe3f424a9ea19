"""Agreement of conversations: how far each turn is from full compute when it is built on the turns
before it, which were built on those before them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.model import KVShareModel
from kvshare_connectors.transformers.model import Served as Planned
from rich.progress import track

from benchmarks.data.chat_histories import as_tokens, conversations
from benchmarks.harness.models import tokenizer_of
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.methods.base import full_compute, generate, in_two_chunks
from benchmarks.methods.compared import engine_for
from benchmarks.quality.agreement_scores import CONTINUATION, Score, forced, score
from examples.prompts.histories import REWRITES, Message, requests
from kvshare_store.config import StoreConfig
from kvshare_store.plan import reused_of
from kvshare_store.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("as it is", "a date in the system prompt", "old tool results truncated")
TURNS = 6
_SIDE_BY_SIDE = 2
"""Conversations that are served turn about, and may share what they have in common."""
_FLOOR_EVERY = 6
"""The noise floor is computed on every sixth request: bf16 is slow on most CPUs."""
_ARMS: dict[str, dict[str, Any]] = {"balanced": {"policy": "balanced"}}
_HALVES = {"tune": 0, "report": 1}
"""Every second conversation, so that no task is in both: settings are chosen on one half."""

FIRST, LATER = "first edited", "later"


class Request(NamedTuple):
    """One turn of a conversation whose history was rewritten."""

    kind: str
    conversation: int
    turn: int
    """From 1."""
    prompt: tuple[int, ...]

    @property
    def id(self) -> str:
        """Names it among all."""
        return f"{self.kind}: {self.conversation}, turn {self.turn}"

    @property
    def tenant(self) -> str:
        """Shared by the conversations that are served turn about."""
        return f"{self.kind} {self.conversation // _SIDE_BY_SIDE}"


class Served(NamedTuple):
    """What one store's plan made of a request."""

    request: Request
    score: Score
    edited: int
    """Rows that were moved, or stand behind other text."""
    generation: int


def measure(options: Options) -> Result:
    """Serve conversations of the half that is reported."""
    count = options.size(4, 2)
    asked = rewritten(options, "report", count)
    return measured(options, asked, _ARMS, count)


def rewritten(options: Options, half: str, count: int) -> list[Request]:
    """The turns of `count` conversations, for each kind of history, in the order of serving."""
    tokenizer = tokenizer_of(options)
    turns = 3 if options.short else TURNS
    chosen = list(islice(conversations(options.data), _HALVES[half], 2 * count, 2))
    kinds = {rewrite.name: rewrite for rewrite in REWRITES}
    found = []
    for kind in KINDS:
        for first in range(0, count, _SIDE_BY_SIDE):
            group: Sequence[list[Message]] = chosen[first : first + _SIDE_BY_SIDE]
            for one in requests(group, kinds[kind], turns):
                tokens = tuple(as_tokens(one.messages, tokenizer))
                found.append(Request(kind, first + one.conversation, one.turn, tokens))
    return found


def measured(
    options: Options, asked: Sequence[Request], arms: dict[str, dict[str, Any]], count: int
) -> Result:
    """The result of serving the requests once under the settings of each arm."""
    exact, _, model = engine_for(options)
    rough, _, _ = engine_for(options, torch.bfloat16)
    served: list[Served] = []
    floors: list[Score] = []
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(_model(exact, stack, settings))
            for name, settings in arms.items()
        }
        plain = stack.enter_context(_model(exact, stack, {"policy": "exact"}))
        for at, request in enumerate(track(asked, "Serving turns")):
            truth = _truth(plain, request)
            (answer,) = generate(exact, [truth], CONTINUATION)
            served += _serve(exact, models, request, truth, answer)
            if at % _FLOOR_EVERY == _FLOOR_EVERY - 1:
                floors.append(_floor(rough, request, answer))
    return _result(options, model, served, floors, count)


def _model(engine: RowEngine, stack: ExitStack, settings: dict[str, Any]) -> KVShareModel:
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvshare-turns-"))
    config = StoreConfig(
        home=str(Path(home)), semantic="never", min_saving_ms=-1e9, host_bytes=2 << 30, **settings
    )
    return KVShareModel(engine.model, Store(config))


def _truth(plain: KVShareModel, request: Request) -> Planned:
    """Full compute. Rows of an exact prefix are taken from the turn before, which computed them in
    full: it saves half of the time."""
    return _stored(plain, request)


def _serve(
    engine: RowEngine,
    models: dict[str, KVShareModel],
    request: Request,
    truth: Planned,
    answer: Sequence[int],
) -> Iterator[Served]:
    filled = {name: _stored(model, request) for name, model in models.items()}
    first, *found = forced(engine, [truth, *filled.values()], answer)
    for (name, made), theirs in zip(filled.items(), found, strict=True):
        one = score(name, request, made, first, theirs)
        yield Served(request, one, reused_of(made.plan.spans).edited, made.plan.generation)


def _stored(model: KVShareModel, request: Request) -> Planned:
    """The request's rows, which are stored too."""
    made = model.prefill(request.prompt, tenant=request.tenant)
    model.save(made)
    return made


def _floor(rough: RowEngine, request: Request, answer: Sequence[int]) -> Score:
    once, twice = full_compute(rough, request.prompt), in_two_chunks(rough, request.prompt)
    first, second = (forced(rough, [one], answer)[0] for one in (once, twice))
    return score("bf16 twice", request, once, first, second)


# --- the result -----------------------------------------------------------------------------------

_COLUMNS = [
    "history", "turns", "arm", "n", "reused, pooled", "generation", "first token same", "KL first",
    "KL 16", "± (s.e.)", "x bf16 twice",
]  # fmt: skip


def _result(
    options: Options, model: str, served: Sequence[Served], floors: Sequence[Score], count: int
) -> Result:
    floor = float(np.mean([one.kl for one in floors]))
    arms = list(dict.fromkeys(one.score.method for one in served))
    rows, targets = [], []
    for arm in arms:
        for kind in KINDS:
            ours = [one for one in served if (one.score.method, one.request.kind) == (arm, kind)]
            parted = parts(ours)
            rows += [_row(kind, name, kept, floor) for name, kept in parted.items() if kept]
            targets += _targets(kind, parted)
    return Result(
        name="agreement-turns",
        title=f"Conversations: agreement with full compute over {CONTINUATION} forced tokens",
        n={"conversations": count, "turns each": max(one.request.turn for one in served),
           "requests for the noise floor": len(floors)},
        seed=options.seed,
        model=f"{model}, fp32, transformers",
        noise_floor=f"mean KL over 16 tokens, bf16 twice: {floor:.4f}",
        columns=_COLUMNS,
        rows=rows,
        paper="not measured",
        notes=_NOTES,
        targets=targets,
        series={"floor": floor, "turns": [
            [one.score.method, one.request.kind, one.request.turn, one.generation, one.edited,
             one.score.reused, one.score.tokens, one.score.kl] for one in served
        ]},
    )  # fmt: skip


_NOTES = [
    "Recorded airline conversations, two side by side; every turn is planned from what the store "
    "keeps of the turns before it, and stored with its edited rows. Each request is compared with "
    "full compute of the same prompt, in fp32.",
    f"`{FIRST}`: the first turn of each conversation whose plan has edited rows. `{LATER}`: all "
    "turns behind that one, which build on it: they continue its rows, edit them again, or both. "
    "Turns before it are exact and not shown.",
    "generation: the highest of these turns' plans. `x bf16 twice`: KL 16 as a multiple of full "
    "compute in bf16 against itself with the prompt in two chunks.",
]


def parts(served: Sequence[Served]) -> dict[str, list[Served]]:
    """The requests of one kind and arm: the first edited turn of each conversation, all later ones,
    and these by turn."""
    first: dict[int, int] = {}
    for one in served:
        if one.edited:
            first.setdefault(one.request.conversation, one.request.turn)
    begun = [one for one in served if one.request.conversation in first]
    began = [one for one in begun if one.request.turn == first[one.request.conversation]]
    later = [one for one in begun if one.request.turn > first[one.request.conversation]]
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
        error(kl),
        float(np.mean(kl)) / floor,
    ]


def error(values: Sequence[float]) -> float:
    """Standard error of their mean."""
    return float(np.std(values) / len(values) ** 0.5)


def _targets(kind: str, parted: dict[str, list[Served]]) -> list[tuple[str, str, bool]]:
    """Later turns are no further from full compute than first edited ones, within two standard
    errors of the difference."""
    first, later = ([one.score.kl for one in parted[name]] for name in (FIRST, LATER))
    if not first or not later:
        return []
    apart = float(np.mean(later) - np.mean(first))
    noise = 2 * float(np.hypot(error(first), error(later)))
    arm = parted[FIRST][0].score.method
    return [(
        f"{arm}, {kind}: KL 16 of later turns no more than of first edited turns, within 2 s.e.",
        f"{np.mean(later):.4f} (n = {len(later)}) beside {np.mean(first):.4f} "
        f"(n = {len(first)}), apart {apart:+.4f}, 2 s.e. {noise:.4f}",
        apart <= noise,
    )]  # fmt: skip


def draw(made: Result) -> Figure:
    """KL by turn, with the mean of each kind of history as a line and the noise floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    by_kind: dict[str, dict[int, list[float]]] = {}
    for arm, kind, turn, *_, kl in made.series["turns"]:
        by_kind.setdefault(f"{arm}, {kind}", {}).setdefault(turn, []).append(kl)
    for (name, turns), style in zip(by_kind.items(), ("o-", "s--", "^-.", "v:"), strict=False):
        means = [max(1e-7, float(np.mean(kl))) for kl in turns.values()]
        axes.plot(list(turns), means, style, color="black", markerfacecolor="white", label=name)
    axes.axhline(made.series["floor"], color="black", linewidth=0.6, label="noise: bf16 twice")
    axes.set_yscale("log")
    axes.set_xlabel("turn")
    axes.set_ylabel("KL to full compute, mean over 16 tokens (nats)")
    axes.legend(fontsize=7)
    return figure
