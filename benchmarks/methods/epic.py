"""EPIC's LegoLink-k: the first k tokens of every reused chunk, and the end of the prompt.

LegoLink links chunks that were each computed alone; its repair is aimed at the attention sink that
every chunk's first tokens became. Here a chunk is a run of rows that lay side by side in the donor,
cut every `chunk_tokens` tokens, and the first chunk of an unmoved prefix is exact as it is. The
selection rule is theirs; the setting, an edited prompt whose donor had its whole context, is ours.
With `chunk_tokens` beyond the prompt it is the same as a window of k after every edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kvshare_connectors.transformers.engine import RowEngine
from torch import Tensor

from benchmarks.methods.base import Donor, Prefilled, full_compute
from benchmarks.methods.reuse import PLACEHOLDERS_ONLY, Placed, place, plan, positions_where
from kvshare_store.plan.spans import Span


@dataclass(frozen=True)
class Epic:
    """LegoLink-k on aligned chunks."""

    k: int
    chunk_tokens: int = 512
    tail: int = 16
    """Tokens at the end computed as the question, which EPIC always computes."""

    @property
    def name(self) -> str:
        """With k, as the paper writes it."""
        return f"epic k={self.k}"

    def prefill(
        self, engine: RowEngine, prompt: Sequence[int], donors: Sequence[Donor]
    ) -> Prefilled:
        """The prompt's rows: chunks reused but for their first k tokens."""
        planned = plan(prompt, donors, PLACEHOLDERS_ONLY)
        if planned.declined:
            return full_compute(engine, prompt, planned.declined)
        placed = place(engine, prompt, donors, planned)
        fresh = positions_where(~placed.kept | self.selected(placed))
        logits = engine.partial(placed.cache, prompt, fresh)
        return Prefilled(placed.cache, logits, len(prompt) - len(fresh), len(fresh))

    def selected(self, placed: Placed) -> Tensor:
        """Reused positions to compute all the same, bool `[tokens]`."""
        chosen = torch.zeros_like(placed.kept)
        for start, stop in chunks(placed.spans, self.chunk_tokens):
            if start > 0:
                chosen[start : min(start + self.k, stop)] = True
        chosen[max(0, len(chosen) - self.tail) :] = True
        return chosen & placed.kept


def chunks(spans: Sequence[Span], longest: int) -> list[tuple[int, int]]:
    """`start, stop` of runs that continue in request and donor, cut every `longest` tokens."""
    joined: list[list[Span]] = []
    for span in spans:
        last = joined[-1][-1] if joined else None
        if last and (last.stop, last.source + last.length, last.block) == (
            span.start,
            span.source,
            span.block,
        ):
            joined[-1].append(span)
        else:
            joined.append([span])
    return [
        (start, min(start + longest, run[-1].stop))
        for run in joined
        for start in range(run[0].start, run[-1].stop, longest)
    ]
