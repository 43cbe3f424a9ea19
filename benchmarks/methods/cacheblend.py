"""CacheBlend's HKVD with gradual filtering, and KVShare v2's DHD in our reading of it.

CacheBlend joins chunks that were each computed alone. Here the chunks are what our alignment keeps
of a donor, so it is CacheBlend's selection on top of our alignment, for a prompt that was edited. A
share r is one of the reused rows; edited tokens and the last one are computed in any case.

HKVD: the first layer is computed for all rows. On the second, the rows whose fresh K and V differ
most from the stored ones go on; on the next two layers fewer and fewer of them. The paper asks for
r1 slightly above r and r2 below r1 and gives no numbers: 1.3 r, 1.15 r, r is our choice. The
deviation is the L2 norm over K and V of all heads. (Their first code compares V alone, LMCache's
K alone, on one layer: `part` says which; one check layer is `schedule=(1.0,)`.)

DHD is not public beyond its abstract: "attention scores and deviations in the value entries" choose
what is computed again. Our reading: a row's score is the attention that the last `suffix` queries
pay it, averaged over heads and queries, times the L2 norm of its V's deviation. The half that works
during decode is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from kvshare_connectors.transformers.engine import RowEngine
from torch import Tensor

from benchmarks.methods.base import Donor, Prefilled, full_compute
from benchmarks.methods.narrowing import Narrowing, Rule, Seen
from benchmarks.methods.reuse import PLACEHOLDERS_ONLY, place, plan
from kvshare_store.lookup.policy import ReusePolicy

GRADUAL = (1.3, 1.15, 1.0)
"""Multiples of r that go on from the second layer, the third, and so on."""


@dataclass(frozen=True)
class Selective:
    """Computes the share of the reused rows that a rule scores highest."""

    name: str
    share: float
    """0 … 1, of the reused rows."""
    rule: Rule
    schedule: tuple[float, ...] = GRADUAL
    policy: ReusePolicy = PLACEHOLDERS_ONLY
    """What is reused at first; with a window it computes windows and what deviates."""
    delimiters: Collection[int] = field(default=(), repr=False)

    def prefill(
        self, engine: RowEngine, prompt: Sequence[int], donors: Sequence[Donor]
    ) -> Prefilled:
        """The prompt's rows. `computed` is the mean over the layers, the first one in full."""
        planned = plan(prompt, donors, self.policy, self.delimiters)
        if planned.declined:
            return full_compute(engine, prompt, planned.declined)
        placed = place(engine, prompt, donors, planned)
        reused, length = int(placed.kept.sum()), len(prompt)
        counts = {
            layer: min(reused, round(self.share * multiple * reused))
            for layer, multiple in enumerate(self.schedule, 1)
        }
        narrowing = Narrowing(engine, placed.cache, ~placed.kept, counts, self.rule)
        tokens, positions = torch.tensor([list(prompt)]), torch.arange(length)[None]
        logits = engine.compute(placed.cache, tokens, positions, during=narrowing)
        computed = round(narrowing.mean_computed)
        return Prefilled(placed.cache, logits[0, 0], length - computed, computed)


def deviation(part: Literal["kv", "k", "v"] = "kv") -> Rule:
    """The L2 norm of what changed in a row's K, V or both."""
    which = {"kv": slice(0, 2), "k": slice(0, 1), "v": slice(1, 2)}[part]

    def rule(seen: Seen) -> Tensor:
        change = (seen.fresh[which] - seen.stored[which]).float()
        return change.square().sum((0, 2, 3)).sqrt()

    return rule


def attended_deviation(suffix: int = 16) -> Rule:
    """Attention from the last `suffix` queries times the deviation of V."""

    def rule(seen: Seen) -> Tensor:
        last = seen.positions[-suffix:]
        query = seen.query[:, -suffix:].float()
        keys = seen.keys.float().repeat_interleave(len(query) // len(seen.keys), 0)
        scores = query @ keys.transpose(1, 2) * seen.scaling
        later = torch.arange(keys.shape[1], device=last.device) > last[:, None]
        attention = scores.masked_fill(later, -torch.inf).softmax(-1).mean((0, 1))
        return attention[seen.positions] * deviation("v")(seen)

    return rule


def cacheblend(share: float, part: Literal["kv", "k", "v"] = "kv") -> Selective:
    """HKVD with gradual filtering over what alignment keeps."""
    of = "" if part == "kv" else f" {part.upper()}"
    return Selective(f"cacheblend{of} {share:.0%}", share, deviation(part))


def dhd(share: float, suffix: int = 16) -> Selective:
    """The prefill half of DHD, in our reading."""
    return Selective(f"dhd {share:.0%}", share, attended_deviation(suffix), schedule=(1.0,))


def blended(
    policy: ReusePolicy, name: str, share: float, delimiters: Collection[int] = ()
) -> Selective:
    """A policy's windows, and HKVD among the rows that it keeps."""
    label = f"{name} + hkvd {share:.0%}"
    return Selective(label, share, deviation(), policy=policy, delimiters=delimiters)
