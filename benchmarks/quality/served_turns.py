"""Turns of recorded conversations, each served from what a store keeps of the turns before it, and
compared with full compute."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, NamedTuple

from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.model import KVShareModel
from kvshare_connectors.transformers.model import Served as Planned

from benchmarks.data.chat_histories import as_tokens, conversations
from benchmarks.harness.models import tokenizer_of
from benchmarks.harness.result import Options
from benchmarks.methods.base import full_compute, generate, in_two_chunks
from benchmarks.quality.agreement_scores import CONTINUATION, Score, forced, score
from examples.prompts.histories import REWRITES, Message, requests
from kvshare_store.config import StoreConfig
from kvshare_store.plan.spans import reused_of
from kvshare_store.store import Store

SIDE_BY_SIDE = 2
"""Conversations that are served turn about, and may share what they have in common."""
_FIRST = {"tune": 0, "report": 1}
"""Every second conversation, so that no task is in both: settings are chosen on one half."""


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
        return f"{self.kind} {self.conversation // SIDE_BY_SIDE}"


class Served(NamedTuple):
    """What one store's plan made of a request."""

    request: Request
    score: Score
    edited: int
    """Rows that were moved, or stand behind other text."""
    generation: int


def rewritten(
    options: Options, half: str, kinds: Sequence[str], count: int, turns: int
) -> list[Request]:
    """The first `turns` of `count` conversations of a half, for each kind of history, in the order
    of serving."""
    tokenizer = tokenizer_of(options)
    chosen = list(islice(conversations(options.data), _FIRST[half], 2 * count, 2))
    rewrites = {rewrite.name: rewrite for rewrite in REWRITES}
    found = []
    for kind in kinds:
        for first in range(0, count, SIDE_BY_SIDE):
            group: Sequence[list[Message]] = chosen[first : first + SIDE_BY_SIDE]
            for one in requests(group, rewrites[kind], turns):
                tokens = tuple(as_tokens(one.messages, tokenizer))
                found.append(Request(kind, first + one.conversation, one.turn, tokens))
    return found


class Serving:
    """One engine with several stores, each under settings of its own.

    Full compute is what all are compared with. It has a store too, whose exact prefixes save time
    and change nothing.
    """

    def __init__(
        self, engine: RowEngine, stack: ExitStack, arms: Mapping[str, dict[str, Any]]
    ) -> None:
        """`stack`: closes the stores. `arms`: the settings of each."""
        self._engine = engine
        self._plain = _model(engine, stack, {"policy": "exact"})
        self._models = {name: _model(engine, stack, settings) for name, settings in arms.items()}

    def serve(self, request: Request, compared: bool = True) -> list[Served]:
        """What each store makes of a request, which all then store. Nothing where it is not
        `compared` with full compute, or where every row is exact."""
        filled = {name: _stored(model, request) for name, model in self._models.items()}
        if not compared or not any(made.plan.generation for made in filled.values()):
            return []
        truth = _stored(self._plain, request)
        (answer,) = generate(self._engine, [truth], CONTINUATION)
        first, *found = forced(self._engine, [truth, *filled.values()], answer)
        return [
            Served(
                request,
                score(name, request, made, first, theirs),
                reused_of(made.plan.spans).edited,
                made.plan.generation,
            )
            for (name, made), theirs in zip(filled.items(), found, strict=True)
        ]


def _model(engine: RowEngine, stack: ExitStack, settings: dict[str, Any]) -> KVShareModel:
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvshare-turns-"))
    config = StoreConfig(
        home=home, semantic="never", min_saving_ms=-1e9, host_bytes=2 << 30, **settings
    )
    return stack.enter_context(KVShareModel(engine.model, Store(config)))


def _stored(model: KVShareModel, request: Request) -> Planned:
    """The request's rows, which are stored too."""
    made = model.prefill(request.prompt, tenant=request.tenant)
    model.save(made)
    return made


def floor_of(rough: RowEngine, request: Request) -> Score:
    """Noise: full compute in bf16 against itself in two chunks. `rough`: the model in bf16."""
    once, twice = full_compute(rough, request.prompt), in_two_chunks(rough, request.prompt)
    (answer,) = generate(rough, [once], CONTINUATION)
    first, second = (forced(rough, [one], answer)[0] for one in (once, twice))
    return score("bf16 twice", request, once, first, second)
