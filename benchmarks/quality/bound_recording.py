"""What each rung of the ladder makes of a request: would its answer begin as that of full compute?

The answers are computed once and kept in a file, from which a run that was cut off goes on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path

import blake3
import msgspec
import torch
from kvshare_connectors.transformers.decode import Ready, stacked
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.model import KVShareModel, Served

from benchmarks.harness.result import presets
from benchmarks.methods.base import full_compute, generate
from benchmarks.quality.bound_prompts import Asked, Tokens
from benchmarks.quality.bound_replay import RUNGS
from kvshare_store.config import StoreConfig
from kvshare_store.lookup.align import align
from kvshare_store.nodes.edits import as_tokens, edit_script
from kvshare_store.nodes.grams import GRAM
from kvshare_store.plan import ReusePlan, reused_of
from kvshare_store.quality.score import SCORED_TOKENS
from kvshare_store.quality.traffic import kind_of
from kvshare_store.store import Store

_KEPT = 12
"""Prompts whose rows are kept: a request may be the donor of its stream's next one."""


class Answer(msgspec.Struct, frozen=True):
    """One greedy answer, scored as engines score it: without the token that ends it."""

    edited: int
    """Rows that were approximate: of 0 the answer is that of full compute, and is not scored."""
    regrets: tuple[float, ...] = ()
    end: float = 0.0
    """The regret of ending there; 0 where the answer goes on."""

    @property
    def diverged(self) -> bool:
        """Whether full compute would have said something else within the scored tokens."""
        return any(regret > 0 for regret in self.regrets)


class Recorded(msgspec.Struct, frozen=True):
    """One request."""

    name: str
    """Of prompts, model and policies."""
    kind: str
    """Of its edit: with the family of its donor that is its class."""
    tokens: int
    rungs: tuple[Answer, ...]
    """As in `RUNGS`."""
    control: Answer
    """The prompt in full: answered token by token in a batch, scored in one forward."""


class Recording:
    """What was recorded, in a file of a line for each request."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last one may be torn
        if len(whole) < len(lines):
            path.write_bytes(b"".join(whole))
        kept = (msgspec.json.decode(line, type=Recorded) for line in whole)
        self._kept = {one.name: one for one in kept}

    def get(self, name: str) -> Recorded | None:
        """None if it was not recorded yet."""
        return self._kept.get(name)

    def add(self, one: Recorded) -> None:
        """Written at once."""
        self._kept[one.name] = one
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(one) + b"\n")


class Recorder:
    """An engine with a store that holds one donor at a time."""

    def __init__(self, engine: RowEngine, name: str, stop: Sequence[int], stack: ExitStack) -> None:
        """`name`: that of the model. `stop`: tokens that end an answer. `stack`: closes the
        store."""
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvshare-bound-"))
        config = StoreConfig(
            home=home, semantic="never", min_saving_ms=-1e9, disk=False, policy=RUNGS[-1]
        )
        self._engine, self._named, self._stop = engine, name, stop
        self._full = lru_cache(_KEPT)(partial(full_compute, engine))
        self._model = stack.enter_context(KVShareModel(engine.model, Store(config)))

    def name(self, asked: Asked) -> str:
        """What the answers depend on, as a digest."""
        whole = (self._named, str(self._engine.dtype), presets(), RUNGS, asked)
        return blake3.blake3(msgspec.json.encode(whole)).hexdigest(length=8)

    def record(self, asked: Asked) -> Recorded:
        """Serve a request under every rung, and in full."""
        made = list(self._served(asked))
        edited = [reused_of(one.plan.spans).edited if one.plan.generation else 0 for one in made]
        approximate = [one for one, rows in zip(made, edited, strict=True) if rows]
        scored = iter(self._scored(asked.request, approximate))
        return Recorded(
            self.name(asked),
            edit_kind(asked),
            len(asked.request),
            tuple(Answer(rows, *next(scored)) if rows else Answer(0) for rows in edited),
            Answer(0, *next(scored)),
        )

    def _served(self, asked: Asked) -> Iterator[Served]:
        """The prompt under each rung, from a store with the donor alone."""
        model, donor = self._model, self._full(asked.donor)
        none = ReusePlan(namespace=model.namespace.digest, tokens=len(asked.donor), declined="off")
        model.save(Served(asked.donor, donor.cache, donor.logits, none, model.namespace))
        for rung in RUNGS:
            yield model.prefill(asked.request, policy=rung)
        model.store.clear()

    def _scored(
        self, prompt: Tokens, made: Sequence[Ready]
    ) -> list[tuple[tuple[float, ...], float]]:
        """The regrets of each greedy answer, that of full compute last, and of its end."""
        truth = self._full(prompt)
        answers = generate(self._engine, [*made, truth], SCORED_TOKENS, self._stop)
        ended = [[*answer, *self._stop[:1]][:SCORED_TOKENS] for answer in answers]
        found = regrets(self._engine, truth, ended)
        return [
            (tuple(every[: len(answer)]), sum(every[len(answer) :]))
            for answer, every in zip(answers, found, strict=True)
        ]


def regrets(engine: RowEngine, truth: Ready, answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each token of each answer log p(best) - log p(it), nats, behind the tokens before it.
    `truth`: the prompt, computed in full. No answer is empty."""
    longest = max(map(len, answers))
    padded = torch.tensor([[*one, *[one[-1]] * (longest - len(one))] for one in answers])
    logits = truth.logits.expand(len(answers), 1, -1)
    if longest > 1:
        cache = stacked(engine, [truth] * len(answers), longest - 1)
        positions = torch.arange(longest - 1).expand(len(answers), -1) + truth.cache.slots
        more = engine.compute(cache, padded[:, :-1], positions, logits_at=range(longest - 1))
        logits = torch.cat([logits, more], 1)
    said = logits.log_softmax(-1)
    found = said.amax(-1) - said.gather(-1, padded[..., None])[..., 0]
    return [row[: len(one)] for row, one in zip(found.tolist(), answers, strict=True)]


def edit_kind(asked: Asked) -> str:
    """What was done to the donor, as the store names it in the class of a request."""
    request, donor = as_tokens(asked.request), as_tokens(asked.donor)
    shared = [match for match in align(request, donor) if match.length >= GRAM]
    return kind_of(edit_script(shared, len(donor), request), len(request))
