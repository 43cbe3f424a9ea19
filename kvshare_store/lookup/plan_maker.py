"""The plan for a lookup: whose nodes may be donors, and by which policy; and why a plan is what it
is. Nothing is leased, counted or logged here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from kvshare_store.commit.node_store import NodeStore
from kvshare_store.config import StoreConfig
from kvshare_store.lookup.cost import Costs
from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.explain import Explained, Explainer
from kvshare_store.lookup.explanation import Explanation
from kvshare_store.lookup.nominate import Nominator, Rank, with_pools
from kvshare_store.lookup.planner import Planned, Planner
from kvshare_store.lookup.policy import (
    PRESETS,
    Mask,
    ReusePolicy,
    configured_policy,
    stricter_policy,
)
from kvshare_store.lookup.request_log import Asked
from kvshare_store.lookup.steering import reason_under_bound, rung_of, steering_of
from kvshare_store.lookup.text import delimiter_ids
from kvshare_store.lookup.trust import Trust, trust_of
from kvshare_store.lookup.watched import Watched
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.quality.quality import Quality


class PlanMaker:
    """Plans of one store. Thread-safe."""

    def __init__(
        self,
        config: StoreConfig,
        nodes: NodeStore,
        costs: Mapping[bool, Costs],
        quality: Quality,
    ) -> None:
        """`costs`: what is measured of engines here (False) and of those on other machines."""
        self._config = config
        self._nodes = nodes
        self._tier_of = nodes.blocks.tier_of
        self._costs = costs
        self._quality = quality
        self._planner = Planner(config)
        self.policy = configured_policy(config)

    def reload(self, config: StoreConfig) -> None:
        """Go on by other settings; the policy stays."""
        self._config = config
        self._planner.reload(config)

    def saved(self, name: str) -> None:
        """A prompt became a node. The next turn of its conversation will look for its text."""
        node = self._nodes.state.tree.get(name)
        if node is not None and self.policy.edited:
            self._planner.know(node)

    def made(self, request: Tokens, lookup: Asked) -> tuple[Asked, Planned]:
        """The plan, and the lookup with the policy that it was made under: where the operator has
        set a bound, that is the one which is known to be good enough for requests of this kind."""
        if lookup.look or not self._quality.steers:
            return lookup, self._planned(request, lookup)
        covers: list[Cover] = []
        planned = self._planned(request, lookup, lambda cover, _: covers.append(cover))
        if not planned.plan.generation:
            return lookup, planned
        of = covers[0], planned.donors[0], lookup.policy, planned.plan.namespace
        policy, steering = rung_of(self._quality, self._nodes.state, *of)
        if policy is lookup.policy:
            return lookup, planned
        lookup = lookup._replace(policy=policy, steering=steering)
        planned = self._planned(request, lookup)
        return lookup, planned.declined(reason_under_bound(planned.plan.declined))

    def _planned(
        self, request: Tokens, lookup: Asked, watch: Callable[[Cover, Mask], None] | None = None
    ) -> Planned:
        namespace, policy = lookup.namespace, lookup.policy
        trust = self._trust(request, namespace, lookup.source)
        costs = self._costs[lookup.far].of(namespace.model_digest)
        planned = self._planner.plan(
            request,
            self._nominator(lookup, _rank(trust)),
            policy,
            costs,
            tier_of=self._tier_of,
            row_bytes=namespace.layout.row_bytes,
            namespace=namespace.digest,
            delimiters=delimiter_ids(namespace.tokenizer) if policy.delimiters else (),
            watch=watch,
            limit=None if trust is None else trust.limit,
        )
        if planned.plan.declined == "no_saving":
            costs.doubt()
        return _with_pools(planned) if lookup.pools else planned

    # --- donors ----------------------------------------------------------------------------------

    def _trust(self, request: Tokens, namespace: Namespace, source: bytes) -> Trust | None:
        share = self._config.unconfirmed_share
        return trust_of(self._nodes.state, share, request, source, namespace.digest)

    def _nominator(self, lookup: Asked, rank: Rank | None) -> Nominator:
        state = self._nodes.state
        return with_pools(
            lookup.namespace,
            lookup.pools,
            lambda digest: Nominator(state.tree, state.index(digest), state.lock, rank),
            rank,
        )

    # --- why -------------------------------------------------------------------------------------

    def explain(self, asked: Explained) -> Explanation:
        """The plan under the policy that is asked for; else, where there is a bound, under that of
        the class of the request."""
        allowed = stricter_policy(self.policy, asked.policy)
        laxer = asked.policy is not None and allowed.name != asked.policy
        chosen = PRESETS[str(asked.policy)] if laxer else allowed
        found, explainer = self._explained(asked, chosen)
        if explainer.cover is None or not explainer.donors or not found.generation:
            return found
        state, donor, space = self._nodes.state, explainer.donors[0], asked.namespace.digest
        steering = steering_of(self._quality, state, explainer.cover, donor, allowed.name, space)
        if steering is None:
            return found
        if asked.policy is None and steering.rung != chosen.name:
            found, _ = self._explained(asked, stricter_policy(chosen, steering.rung))
            declined = reason_under_bound(found.declined)
            found = msgspec.structs.replace(found, declined=declined)
        return msgspec.structs.replace(found, steering=steering)

    def _explained(self, asked: Explained, policy: ReusePolicy) -> tuple[Explanation, Explainer]:
        namespace, named = asked.namespace, dict[str, tuple[Node, list[str]]]()
        trust, state = self._trust(asked.request, namespace, asked.source), self._nodes.state
        rank, costs = _rank(trust), self._costs[False].of(namespace.model_digest)
        explainer = Explainer(self._config, asked.request, policy, costs, trust)
        nominator = with_pools(
            namespace,
            asked.pools,
            lambda digest: Watched(state, digest, named, asked.only, asked.without, rank),
            rank,
        )
        found = explainer.explain(
            self._planner,
            nominator,
            named,
            self._tier_of,
            namespace.layout.row_bytes,
            delimiter_ids(namespace.tokenizer) if policy.delimiters else (),
        )
        return found, explainer


def _rank(trust: Trust | None) -> Rank | None:
    return None if trust is None else trust.of


def _with_pools(planned: Planned) -> Planned:
    """The same plan, which says which of its blocks are those of pools."""
    plan = planned.plan
    others = (donor for donor in planned.donors if donor.namespace != plan.namespace)
    theirs = {name for donor in others for name in donor.blocks}
    pooled = tuple(at for at, block in enumerate(plan.blocks) if block.name in theirs)
    return planned._replace(plan=msgspec.structs.replace(plan, pooled=pooled))
