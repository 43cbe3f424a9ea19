"""Rows of donors in a prompt's cache, placed by the project's own planner and rotary arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.rows import RowCache
from torch import Tensor

from benchmarks.methods.base import Donor
from kvshare_store.config import StoreConfig
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import PRESETS, ReusePolicy
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.nodes.index import NamespaceIndex
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Span

PLACEHOLDERS_ONLY = PRESETS["aggressive"]
"""The paper as written: what the other selection rules start from."""
_CONFIG = StoreConfig(home="none", min_saving_ms=-1e9, min_prompt_tokens=2)


def plan(
    prompt: Sequence[int],
    donors: Sequence[Donor],
    policy: ReusePolicy,
    delimiters: Collection[int] = (),
) -> ReusePlan:
    """What the planner would answer if the store held these donors. Block i is donor i's rows."""
    tree, index = DeltaTree(), NamespaceIndex()
    for number, donor in enumerate(donors):
        node = _node(number, donor)
        tree.add(node)
        index.add(node, Vectors(lexical_vector(node.tokens), None))
    planner = Planner(_CONFIG)
    return planner.plan(
        as_tokens(prompt),
        Nominator(tree, index),
        policy,
        CostModel(),
        tier_of=lambda _: "host",
        row_bytes=1,
        delimiters=delimiters,
    ).plan


def _node(number: int, donor: Donor) -> Node:
    tokens = as_tokens(donor.tokens)
    return Node(
        id=str(number),
        namespace="benchmark",
        token_bytes=tokens.tobytes(),
        segments=(Span(0, len(tokens), 0, 0, 0),),
        blocks=(f"{number:064}",),
        exact_rows=len(tokens),
    )


class Placed(NamedTuple):
    """A cache that holds the reused rows, and where they are."""

    cache: RowCache
    kept: Tensor
    """bool `[tokens]`: filled from donors."""
    spans: tuple[Span, ...]


def place(
    engine: RowEngine, prompt: Sequence[int], donors: Sequence[Donor], planned: ReusePlan
) -> Placed:
    """A cache for the prompt with the plan's rows in it, moved to their places."""
    cache = engine.cache(len(prompt))
    kept = torch.zeros(len(prompt), dtype=torch.bool)
    for span in planned.spans:
        rows = donors[int(planned.blocks[span.block].name)].keys_values
        rows = rows[:, :, span.row : span.row + span.length].clone()
        target = torch.arange(span.start, span.stop)
        if span.source != span.start:
            engine.rope.move(rows[:, 0], target - span.start + span.source, target)
        cache.rows[:, :, 0, span.start : span.stop] = rows
        kept[span.start : span.stop] = True
    return Placed(cache, kept, planned.spans)


def positions_where(mask: Tensor | np.ndarray) -> Tensor:
    """Positions at which a bool mask `[tokens]` is set, int64."""
    return torch.as_tensor(mask).nonzero().flatten()
