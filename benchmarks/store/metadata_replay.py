"""Replay prompts through the store's own planner and index, over nodes without rows.

What a plan would reuse depends on tokens and vectors alone, so thousands of prompts can be replayed
in order without a model. Plans are never declined for their cost: what is counted is the same on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import blake3
import numpy as np
import numpy.typing as npt

from kvshare_store.cli.progress import track
from kvshare_store.config import StoreConfig
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import ReusePolicy
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.index import NamespaceIndex
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.nodes.vector_matrix import VectorMatrix
from kvshare_store.nodes.vectors import Vector, Vectors, lexical_vector
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Span

MEASURED_TOKENS = 64
"""Shorter prompts are stored (from `min_prompt_tokens` on) but not counted."""
REUSABLE = ReusePolicy("aggressive", min_run=4, tail=1, max_generation=1_000_000)
"""All that alignment finds: runs of 4 tokens and more, with nothing recomputed for quality."""
ENGINE_BLOCK = 16
_NOT_ASKED = ReusePlan(namespace="", tokens=0, declined="not_asked")


class Served(NamedTuple):
    """Token counts of one served prompt."""

    tokens: int
    reused: int
    donors: int = 0


class Sources(NamedTuple):
    """What may nominate donors besides the exact prefix."""

    lexical: bool = True
    semantic: bool = True
    own: bool = False
    """Whether a request has a text vector of its own. The store has no time to make one."""
    within: float = 2.0
    """Largest cosine distance at which a text vector may nominate."""


class _Limited(VectorMatrix):
    """Nominates only within a cosine distance; a negative one: nobody, but counts its rows."""

    def __init__(self, within: float) -> None:
        super().__init__()
        self._within = within

    def nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[tuple[str, float]]:
        if self._within < 0:
            return []
        found = super().nearest(vector, count)
        return [(name, cosine) for name, cosine in found if 1 - cosine <= self._within]


class _WithOwnVector(Nominator):
    """Nominates by the request's own text vector: what text would find if it cost nothing."""

    vector: Vector | None = None

    def by_text(self, like: Sequence[Node], count: int) -> list[Node]:
        if self.vector is None or self._index is None:
            return []
        found = self._index.semantic.nearest(self.vector, count)
        return self._nodes([node_id for node_id, _ in found])


class MetadataStore:
    """Prompts in order: each is looked up, then stored as what it would have become."""

    def __init__(
        self,
        policy: ReusePolicy,
        sources: Sources,
        *,
        max_donors: int | None = None,
        all_exact: bool = False,
        delimiters: Collection[int] = (),
    ) -> None:
        """`all_exact`: every prompt is stored as if it had been computed in full."""
        donors = StoreConfig().max_donors if max_donors is None else max_donors
        self.config = StoreConfig(min_saving_ms=-1e12, max_donors=donors, semantic="always")
        self.policy = policy
        self.tree = DeltaTree()
        self.index = NamespaceIndex()
        if not sources.lexical:
            self.index.lexical = _Limited(-1.0)
        self.index.semantic = _Limited(sources.within if sources.semantic else -1.0)
        # no clock: a replay finds the same on every machine
        self.planner = Planner(self.config, lambda: Effort(seconds=math.inf))
        self._cost = CostModel()
        self._own = sources.own
        self._all_exact = all_exact
        self._delimiters = delimiters

    def plan(self, tokens: Tokens, vector: Vector | None = None) -> ReusePlan:
        """The plan that the store would make."""
        nominator: Nominator = Nominator(self.tree, self.index)
        if self._own:
            nominator = _WithOwnVector(self.tree, self.index)
            nominator.vector = vector if vector is not None and vector.any() else None
        return self.planner.plan(
            tokens,
            nominator,
            self.policy,
            self._cost,
            tier_of=lambda name: "host",
            row_bytes=1,
            delimiters=self._delimiters if self.policy.delimiters else (),
        ).plan

    def save(self, tokens: Tokens, vector: Vector | None, plan: ReusePlan = _NOT_ASKED) -> None:
        """The prompt becomes a node with the provenance that its plan gives it."""
        generation = 0 if self._all_exact or plan.declined else plan.generation
        exact_name = node_id("replay", tokens, True)
        name = exact_name if generation == 0 else node_id("replay", tokens, False)
        known = exact_name if exact_name in self.tree else name
        if known in self.tree:
            self.tree.touch(known)
            return
        if len(tokens) < self.config.min_prompt_tokens:
            return
        edited_from = next((span.start for span in plan.spans if not span.exact), len(tokens))
        node = Node(
            id=name,
            namespace="replay",
            token_bytes=tokens.tobytes(),
            segments=(Span(0, len(tokens), 0, 0, 0),),
            blocks=(2 * name,),  # as long as a name of a block
            exact_rows=len(tokens) if generation == 0 else edited_from,
            generation=generation,
        )
        self.tree.add(node)
        if node.exact:  # takes the place of its twin, as in the store
            self._remove(node_id("replay", tokens, False))
        has_text = vector is not None and bool(vector.any())
        self.index.add(node, Vectors(lexical_vector(tokens), vector if has_text else None))

    def _remove(self, name: str) -> None:
        gone = self.tree.remove(name)
        if gone is not None:
            self.index.remove(gone[0])


def replay(
    store: MetadataStore,
    prompts: Sequence[Tokens],
    vectors: Sequence[Vector] | npt.NDArray[np.float32],
    what: str = "Replaying",
) -> list[Served]:
    """Serve and store the prompts in order; what became of those of `MEASURED_TOKENS` or more."""
    served = []
    for tokens, vector in track(zip(prompts, vectors, strict=True), what, total=len(prompts)):
        # a short prompt is stored without a plan: what it would reuse is not counted either
        plan = _NOT_ASKED
        if len(tokens) >= MEASURED_TOKENS:
            plan = store.plan(tokens, vector)
            served.append(Served(len(tokens), plan.reused, len(plan.donors)))
        store.save(tokens, vector, plan)
    return served


def prefix_caching(prompts: Sequence[Tokens], block: int = ENGINE_BLOCK) -> list[Served]:
    """An engine's own prefix cache that never evicts: whole blocks after the same beginning."""
    return _by_blocks(prompts, block, chained=True)


def block_matching(prompts: Sequence[Tokens], block: int = ENGINE_BLOCK) -> list[Served]:
    """Whole blocks with the same content, wherever they stood: blocks begin at multiples of 16."""
    return _by_blocks(prompts, block, chained=False)


def _by_blocks(prompts: Sequence[Tokens], block: int, *, chained: bool) -> list[Served]:
    seen: set[bytes] = set()
    served = []
    for tokens in prompts:
        names = block_names(tokens, block, chained=chained)
        if len(tokens) >= MEASURED_TOKENS:
            # the last token is always computed, and with it its block
            usable = names[: (len(tokens) - 1) // block]
            served.append(Served(len(tokens), block * sum(name in seen for name in usable)))
        seen.update(names)
    return served


def block_names(tokens: Tokens, block: int, *, chained: bool) -> list[bytes]:
    """A name for each whole block: of its content, or of everything up to its end (`chained`)."""
    hasher = blake3.blake3()
    names = []
    for start in range(0, len(tokens) - block + 1, block):
        piece = tokens[start : start + block].tobytes()
        if chained:
            hasher.update(piece)
            names.append(hasher.digest(length=16))
        else:
            names.append(blake3.blake3(piece).digest(length=16))
    return names
