"""What each rung of the ladder makes of a request: would its answer begin as that of full compute?

The answers are computed once and kept in a file, from which a run that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import msgspec
import torch
from kvshare_connectors.transformers.decode import Ready, stacked
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.harness.result import presets
from benchmarks.methods.base import Donor, full_compute, generate
from benchmarks.methods.reuse import place, plan, positions_where
from benchmarks.quality.bound_prompts import Asked
from benchmarks.quality.bound_replay import RUNGS
from kvshare_store.lookup.align import align
from kvshare_store.lookup.policy import PRESETS
from kvshare_store.nodes.edits import as_tokens, edit_script
from kvshare_store.nodes.grams import GRAM
from kvshare_store.plan.spans import reused_of
from kvshare_store.quality.score import SCORED_TOKENS
from kvshare_store.quality.traffic import kind_of

_KEPT = 12
"""Prompts whose rows are kept: a request may be the donor of its stream's next one."""


class _Served(NamedTuple):
    """A prompt under one rung."""

    edited: int
    """Its approximate rows. Of 0 there is nothing else."""
    cache: Any = None
    logits: Any = None


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

    def __contains__(self, name: str) -> bool:
        """Whether it was recorded."""
        return name in self._kept

    def __getitem__(self, name: str) -> Recorded:
        """What was recorded."""
        return self._kept[name]

    def add(self, new: Sequence[Recorded]) -> None:
        """Written at once."""
        self._kept |= {one.name: one for one in new}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.writelines(msgspec.json.encode(one) + b"\n" for one in new)


class Recorder:
    """An engine that serves requests under every rung, each from its donor alone."""

    def __init__(self, engine: RowEngine, name: str, stop: Sequence[int]) -> None:
        """`name`: that of the model. `stop`: tokens that end an answer."""
        self._engine, self._named, self._stop = engine, name, stop
        self._full = lru_cache(_KEPT)(partial(full_compute, engine))

    def record(self, group: Sequence[Asked]) -> list[Recorded]:
        """Requests whose answers are decoded in one batch."""
        served = [[self._served(asked, rung) for rung in RUNGS] for asked in group]
        truths = [self._full(asked.request) for asked in group]
        made = [
            [*(one for one in of if one.edited), truth]
            for of, truth in zip(served, truths, strict=True)
        ]
        answers = iter(generate(self._engine, list(chain(*made)), SCORED_TOKENS, self._stop))
        found = []
        for asked, of, truth, ready in zip(group, served, truths, made, strict=True):
            scored = iter(self._scored(truth, list(islice(answers, len(ready)))))
            rungs = tuple(Answer(x.edited, *next(scored)) if x.edited else Answer(0) for x in of)
            control = Answer(0, *next(scored))
            name, tokens = name_of(self._named, asked), len(asked.request)
            found.append(Recorded(name, edit_kind(asked), tokens, rungs, control))
        return found

    def _served(self, asked: Asked, rung: str) -> _Served:
        """The prompt under a rung. Where no row is approximate nothing is computed."""
        donor = Donor(asked.donor, self._full(asked.donor).cache.rows[:, :, 0])
        planned = plan(asked.request, [donor], PRESETS[rung])
        edited = reused_of(planned.spans).edited if planned.generation else 0
        if not edited:
            return _Served(0)
        placed = place(self._engine, asked.request, [donor], planned)
        fresh = positions_where(~placed.kept)
        logits = self._engine.partial(placed.cache, asked.request, fresh)
        return _Served(edited, placed.cache, logits)

    def _scored(
        self, truth: Ready, answers: Sequence[Sequence[int]]
    ) -> list[tuple[tuple[float, ...], float]]:
        """The regrets of each answer, and that of its end."""
        ended = [[*answer, *self._stop[:1]][:SCORED_TOKENS] for answer in answers]
        found = regrets(self._engine, truth, ended)
        return [
            (tuple(every[: len(answer)]), float(sum(every[len(answer) :])))
            for answer, every in zip(answers, found, strict=True)
        ]


def name_of(model: str, asked: Asked) -> str:
    """What the answers to a request depend on, as a digest."""
    whole = (model, str(torch.float32), presets(), RUNGS, asked)
    return blake3.blake3(msgspec.json.encode(whole)).hexdigest(length=8)


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
