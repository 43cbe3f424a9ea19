"""Explanations of a store: the plan that a request would get, and why, without serving anything."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import msgspec

from kvshare_store.commit.node_store import NodeStore
from kvshare_store.config import StoreConfig
from kvshare_store.lookup.cost import Costs
from kvshare_store.lookup.explain import Explainer
from kvshare_store.lookup.explanation import Explanation
from kvshare_store.lookup.nominate import Nominator, together
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import PRESETS, ReusePolicy, stricter_policy
from kvshare_store.lookup.steering import reason_under_bound, steering_of
from kvshare_store.lookup.text import delimiter_ids
from kvshare_store.lookup.trust import Trust, trust_of
from kvshare_store.lookup.watched import Named, Watched
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.quality.quality import Quality


class Explained(NamedTuple):
    """What shall be explained."""

    request: Tokens
    namespace: Namespace
    policy: str | None
    """What it would do, laxer than the configured one or not; None: what a request gets."""
    only: Node | None = None
    """The one candidate."""
    without: Collection[str] = ()
    """Nodes that are no candidates."""
    pools: Collection[str] = ()
    source: bytes = b""
    """Who sends the request, hashed."""


class Explaining(NamedTuple):
    """The parts of a store that plans are made with."""

    config: StoreConfig
    configured: ReusePolicy
    nodes: NodeStore
    planner: Planner
    costs: Costs
    quality: Quality

    def explain(self, asked: Explained) -> Explanation:
        """The plan under the policy that is asked for; else, where there is a bound, under that of
        the class of the request."""
        allowed = stricter_policy(self.configured, asked.policy)
        laxer = asked.policy is not None and allowed.name != asked.policy
        chosen = PRESETS[str(asked.policy)] if laxer else allowed
        found, explainer = self._under(asked, chosen)
        if explainer.cover is None or not explainer.donors or not found.generation:
            return found
        state, donor, space = self.nodes.state, explainer.donors[0], asked.namespace.digest
        steering = steering_of(self.quality, state, explainer.cover, donor, allowed.name, space)
        if steering is None:
            return found
        if asked.policy is None and steering.rung != chosen.name:
            found, _ = self._under(asked, stricter_policy(chosen, steering.rung))
            declined = reason_under_bound(found.declined)
            found = msgspec.structs.replace(found, declined=declined)
        return msgspec.structs.replace(found, steering=steering)

    def _under(self, asked: Explained, policy: ReusePolicy) -> tuple[Explanation, Explainer]:
        namespace, named = asked.namespace, dict[str, tuple[Node, list[str]]]()
        trust = trust_of(
            self.nodes.state, self.config.unconfirmed_share, asked.request, asked.source,
            namespace.digest,
        )  # fmt: skip
        explainer = Explainer(
            self.config, asked.request, policy, self.costs.of(namespace.model_digest), trust
        )
        found = explainer.explain(
            self.planner,
            self._nominator(asked, named, trust),
            named,
            self.nodes.blocks.tier_of,
            namespace.layout.row_bytes,
            delimiter_ids(namespace.tokenizer) if policy.delimiters else (),
        )
        return found, explainer

    def _nominator(self, asked: Explained, named: Named, trust: Trust | None) -> Nominator:
        rank = None if trust is None else trust.of
        spaces = asked.namespace, *map(asked.namespace.in_pool, asked.pools)
        own, *pools = (
            Watched(self.nodes.state, space.digest, named, asked.only, asked.without, rank)
            for space in spaces
        )
        return together(own, pools, rank)
