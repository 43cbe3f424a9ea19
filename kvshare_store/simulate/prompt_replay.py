"""Replays recorded prompts through a prefix cache and through KVShare under several policies: how
many tokens would each have computed?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.policy import PRESETS
from kvshare_store.plan.spans import Reused
from kvshare_store.simulate.planned_reuse import PlannedReuse
from kvshare_store.simulate.prefix_cache import PrefixCache
from kvshare_store.simulate.prompts import Prompt

PREFIX_CACHING = "prefix_caching"
"""The arm of an engine without KVShare."""


class Arm(Protocol):
    """Serves prompts in their order."""

    def serve(self, prompt: Prompt) -> Reused:
        """Serve and keep a prompt; returns what is reused of it."""


class Room(NamedTuple):
    """What each arm may keep, and how long an edited prompt stays approximate."""

    row_bytes: int
    budget: float = math.inf
    settle: float | None = None


def arms_of(
    config: StoreConfig, policies: Sequence[str], room: Room, tokenizer: str = ""
) -> dict[str, Arm]:
    """Prefix caching, and KVShare under each of the policies. `ConfigError` for an unknown one."""
    arms: dict[str, Arm] = {PREFIX_CACHING: PrefixCache(room.row_bytes, room.budget)}
    for name in policies:
        if name not in PRESETS:
            raise ConfigError(f"--policy: {name!r} is not one of {', '.join(PRESETS)}")
        ours = msgspec.structs.replace(config, policy=name)
        arms[name] = PlannedReuse(
            ours, room.row_bytes, budget=room.budget, settle=room.settle, tokenizer=tokenizer
        )
    return arms


class Counted(NamedTuple):
    """What became of the prompts that count."""

    lengths: list[int]
    reused: dict[str, list[Reused]]
    """By arm; as many as `lengths`."""

    def to_compute(self, arm: str) -> list[int]:
        """Tokens of each prompt that an arm computes."""
        pairs = zip(self.lengths, self.reused[arm], strict=True)
        return [length - reused.tokens for length, reused in pairs]


def replay(
    prompts: Sequence[Prompt],
    arms: Mapping[str, Arm],
    min_tokens: int,
    served: Callable[[], None] = lambda: None,
) -> Counted:
    """Serve every prompt in every arm. Those of fewer than `min_tokens` tokens are served and do
    not count. `served` is called after each prompt."""
    counted = Counted([], {name: [] for name in arms})
    for prompt in prompts:
        counts = len(prompt.tokens) >= min_tokens
        for name, arm in arms.items():
            reused = arm.serve(prompt)
            if counts:
                counted.reused[name].append(reused)
        if counts:
            counted.lengths.append(len(prompt.tokens))
        served()
    return counted


def report(counted: Counted) -> dict[str, Any]:
    """`requests`, `tokens`, and what each arm reused and computed, in tokens, as plain types.
    `assumed_speed`: tokens per second of prefill by which plans were weighed; none is measured."""
    return {
        "requests": len(counted.lengths),
        "tokens": sum(counted.lengths),
        "assumed_speed": CostModel().prefill.assumed,
        **dict(_arms(counted)),
    }


def _arms(counted: Counted) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, reused in counted.reused.items():
        by_kind = dict.fromkeys(Reused._fields, 0)
        for each in reused:
            for kind, tokens in each._asdict().items():
                by_kind[kind] += tokens
        left = counted.to_compute(name)
        yield (
            name,
            {
                "reused": sum(by_kind.values()),
                "to_compute": sum(left),
                "by_kind": by_kind,
                "median_to_compute": round(float(np.median(left)), 1),
                "p90_to_compute": round(float(np.quantile(left, 0.9)), 1),
            },
        )
