"""Greedy answers from many caches of the same prompts, fast on a CPU: drafts are verified first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from kvshare_connectors.transformers.decode import Ready, generate, stacked
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.rows import RowCache
from torch import Tensor

Draft = Sequence[int]


@dataclass(frozen=True)
class Begun:
    """A prompt and the part of a draft that greedy decoding agrees with."""

    cache: RowCache
    logits: Tensor
    answer: list[int]


def drafted(
    engine: RowEngine,
    prompts: Sequence[Ready],
    drafts: Sequence[Draft],
    max_new_tokens: int,
    stop: Collection[int] = (),
    *,
    batch: int = 16,
) -> list[list[int]]:
    """What `generate` gives, checked against drafts first.

    A draft (the answer of full compute, say) goes through the model in one forward; decoding token
    by token starts only where the model would have said something else. The answers are those of
    greedy decoding, up to what another batching changes in the last bits of the logits.
    """
    drafts = [list(takewhile(lambda t: t not in stop, d))[:max_new_tokens] for d in drafts]
    begun: list[Begun] = []
    for at in range(0, len(prompts), batch):
        upto = at + batch
        begun += _checked(engine, prompts[at:upto], drafts[at:upto])
    answers = [state.answer for state in begun]
    open_ones = [
        index
        for index, state in enumerate(begun)
        if len(state.answer) < max_new_tokens and int(state.logits.argmax()) not in stop
    ]
    # those with about as much left to say share a batch
    open_ones.sort(key=lambda index: len(answers[index]))
    for at in range(0, len(open_ones), 2 * batch):
        rows = open_ones[at : at + 2 * batch]
        most = max_new_tokens - len(answers[rows[0]])
        for row, more in zip(
            rows, generate(engine, [begun[row] for row in rows], most, stop), strict=True
        ):
            answers[row] = (answers[row] + more)[:max_new_tokens]
    return answers


def _checked(engine: RowEngine, prompts: Sequence[Ready], drafts: Sequence[Draft]) -> list[Begun]:
    """How far each draft is what greedy decoding says; its last token is not fed in vain."""
    longest = max(len(draft) for draft in drafts)
    first = [int(prompt.logits.argmax()) for prompt in prompts]
    if not longest or all(f != d[0] for f, d in zip(first, drafts, strict=True) if d):
        return [Begun(prompt.cache, prompt.logits, []) for prompt in prompts]
    cache = stacked(engine, prompts, longest)
    fed = torch.tensor([[*draft, *[0] * (longest - len(draft))] for draft in drafts])
    lengths = [prompt.cache.slots for prompt in prompts]
    positions = torch.tensor(lengths)[:, None] + torch.arange(longest)
    logits = engine.compute(cache, fed, positions, logits_at=range(longest))
    begun = []
    for row, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
        said = [first[row], *logits[row].argmax(-1).tolist()]
        agreed = next((i for i, token in enumerate(draft) if said[i] != token), len(draft))
        upto = logits[row, agreed - 1].clone() if agreed else prompt.logits
        rows = cache.rows[:, :, row : row + 1, : lengths[row] + agreed].clone()
        begun.append(Begun(RowCache(rows), upto, list(draft[:agreed])))
    return begun
