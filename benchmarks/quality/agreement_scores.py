"""How far each method's answer is from full compute's, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from kvshare_connectors.transformers.decode import Ready
from kvshare_connectors.transformers.engine import RowEngine
from torch import Tensor

from benchmarks.methods.base import (
    Method,
    Prefilled,
    donor_of,
    full_compute,
    generate,
    in_two_chunks,
    teacher_forced_batch,
)
from benchmarks.quality.agreement_pairs import SimilarPair

CONTINUATION = 16
"""Tokens of full compute's greedy answer that every method is forced along."""
_AT_ONCE = 12
"""Pairs whose answers are generated in one batch."""
_ROWS_AT_ONCE = 16_384
"""Rows that caches stacked for teacher forcing may have together."""


class Score(NamedTuple):
    """One method on one pair. KL in nats, of full compute's distribution to the method's."""

    method: str
    pair: str
    tokens: int
    reused: int
    first_same: bool
    """Whether the likeliest first token is full compute's."""
    kl_first: float
    kl: float
    """Mean over the continuation."""
    agree: float
    """Share of the continuation that is the method's likeliest token too."""


class Asked(Protocol):
    """A prompt that methods are compared on."""

    @property
    def id(self) -> str:
        """Names it among all."""

    @property
    def prompt(self) -> Sequence[int]:
        """Its tokens."""


class Filled(Protocol):
    """A prompt whose rows are all there."""

    @property
    def reused(self) -> int:
        """Rows that were not computed for it."""


def scores(
    engine: RowEngine, pairs: Sequence[SimilarPair], methods: Sequence[Method]
) -> Iterator[list[Score]]:
    """Scores of all methods, one list for each pair, in order."""
    for start in range(0, len(pairs), _AT_ONCE):
        group = pairs[start : start + _AT_ONCE]
        full = [full_compute(engine, pair.prompt) for pair in group]
        answers = generate(engine, full, CONTINUATION)
        for pair, truth, answer in zip(group, full, answers, strict=True):
            donor = donor_of(engine, pair.donor)
            names, filled = [], []
            for method in methods:
                names.append(method.name)
                filled.append(method.prefill(engine, pair.prompt, [donor]))
            yield compared(engine, pair, truth, answer, names, filled)


def floors(
    exact: RowEngine, rough: RowEngine, pairs: Sequence[SimilarPair]
) -> Iterator[list[Score]]:
    """Noise: full compute in bf16 against itself in two chunks, and against full compute in fp32.

    `exact` is the model in fp32, `rough` in bf16.
    """
    for start in range(0, len(pairs), _AT_ONCE):
        group = pairs[start : start + _AT_ONCE]
        full = [full_compute(exact, pair.prompt) for pair in group]
        answers = generate(exact, full, CONTINUATION)
        for pair, truth, answer in zip(group, full, answers, strict=True):
            once = full_compute(rough, pair.prompt)
            twice = in_two_chunks(rough, pair.prompt)
            first = forced(rough, [once], answer)[0]
            second = forced(rough, [twice], answer)[0]
            true = forced(exact, [truth], answer)[0]
            yield [
                score("bf16 twice", pair, once, first, second),
                score("bf16 against fp32", pair, once, true, first),
            ]


def compared(
    engine: RowEngine,
    pair: SimilarPair,
    truth: Prefilled,
    answer: Sequence[int],
    names: Sequence[str],
    filled: Sequence[Prefilled],
) -> list[Score]:
    """Every method's distributions along full compute's answer, beside full compute's own."""
    found = forced(engine, [truth, *filled], answer)
    rows = zip(names, filled, found[1:], strict=True)
    return [score(name, pair, prefilled, found[0], theirs) for name, prefilled, theirs in rows]


def forced(
    engine: RowEngine, prompts: Sequence[Ready], continuation: Sequence[int]
) -> list[Tensor]:
    """`teacher_forced_batch` as far as memory goes; `[len(continuation), vocab]` for each."""
    slots = prompts[0].cache.slots + len(continuation)
    at_once = max(1, _ROWS_AT_ONCE // slots)
    found: list[Tensor] = []
    for start in range(0, len(prompts), at_once):
        found += teacher_forced_batch(engine, prompts[start : start + at_once], continuation)
    return found


def score(name: str, pair: Asked, prefilled: Filled, truth: Tensor, found: Tensor) -> Score:
    """`truth` and `found`: log-probabilities `[continuation, vocab]`."""
    kl = (truth.exp() * (truth - found)).sum(-1).clamp(min=0)
    same = truth.argmax(-1) == found.argmax(-1)
    return Score(
        name,
        pair.id,
        len(pair.prompt),
        prefilled.reused,
        bool(same[0]),
        float(kl[0]),
        float(kl.mean()),
        float(same.float().mean()),
    )
