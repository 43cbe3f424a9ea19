"""KVShare: the project's planner with any policy; `exact` is prefix caching."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.methods.base import Donor, Prefilled, full_compute
from benchmarks.methods.reuse import place, plan, positions_where
from kvshare_store.lookup.policy import PRESETS, ReusePolicy


@dataclass(frozen=True)
class KVShare:
    """Reuses what the policy keeps and computes the rest in one forward."""

    name: str
    policy: ReusePolicy
    delimiters: Collection[int] = field(default=(), repr=False)
    """Token ids that `policy.delimiters` is about."""

    def prefill(
        self, engine: RowEngine, prompt: Sequence[int], donors: Sequence[Donor]
    ) -> Prefilled:
        """The prompt's rows: reused where the policy allows, computed elsewhere."""
        planned = plan(prompt, donors, self.policy, self.delimiters)
        if planned.declined:
            return full_compute(engine, prompt, planned.declined)
        placed = place(engine, prompt, donors, planned)
        fresh = positions_where(~placed.kept)
        logits = engine.partial(placed.cache, prompt, fresh)
        return Prefilled(placed.cache, logits, len(prompt) - len(fresh), len(fresh))


def kvshare(preset: str, delimiters: Collection[int] = (), **changes: Any) -> KVShare:
    """A preset policy, with some of its parameters changed; the name says which."""
    policy = msgspec.structs.replace(PRESETS[preset], **changes)
    spelled = [f"{name} {value}" for name, value in changes.items()]
    return KVShare(", ".join([f"kvshare {preset}", *spelled]), policy, delimiters)


def prefix() -> KVShare:
    """Prefix caching: the longest common prefix of at least 16 tokens and nothing else."""
    return KVShare("prefix", PRESETS["exact"])
