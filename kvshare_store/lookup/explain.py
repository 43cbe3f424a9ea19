"""Why a plan is what it is: who was nominated, who was taken, and what the plan saves.

The planner is watched while it plans, so that what is told is what happens. What it does not need
to know, such as what a candidate that it passed over would have given, is found out afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.align import align
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.cover import Cover, placeholder_runs
from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.lookup.explanation import Candidate, Divergence, Expected, Explanation
from kvshare_store.lookup.fates import Watch, counted, fates_of, parts_of
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import Mask, ReusePolicy, continues, usable_length
from kvshare_store.lookup.trust import WORDS, Trust
from kvshare_store.lookup.watched import Named
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import lexical_vector
from kvshare_store.plan import ReusePlan

_SHOWN = 16
"""Tokens on both sides of the first difference."""


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


class Explainer:
    """Explains one request."""

    def __init__(
        self,
        config: StoreConfig,
        request: Tokens,
        policy: ReusePolicy,
        cost: CostModel,
        trust: Trust | None = None,
    ) -> None:
        """`trust`: what the request trusts, if that matters."""
        self._config, self._request = config, request
        self._policy, self._cost = policy, cost
        self._trust = trust
        self.cover: Cover | None = None
        """What covered the request, once it was planned."""
        self.donors: tuple[Node, ...] = ()
        """Those of the plan."""
        self._keep: Mask = np.zeros(len(request), np.bool_)
        self._capped: Mask = self._keep
        """Positions that come from behind too much of another source's text."""
        self._doubtful: Mask = self._keep

    def explain(
        self,
        planner: Planner,
        nominator: Nominator,
        named: Named,
        tier_of: Callable[[str], str | None],
        row_bytes: int,
        delimiters: Collection[int],
    ) -> Explanation:
        """Plan, and say why the plan is so. `named`: where the nominator writes whom it named."""
        planned = planner.plan(
            self._request,
            nominator,
            self._policy,
            self._cost,
            tier_of=tier_of,
            row_bytes=row_bytes,
            delimiters=delimiters,
            watch=self._watch,
            limit=None if self._trust is None else self._limit,
        )
        plan, self.donors = planned.plan, planned.donors
        nodes = {node_id: node for node_id, (node, _) in named.items()}
        for donor in self.cover.donors if self.cover else ():
            nodes.setdefault(donor.id, donor)
        shared = {node.id: align(self._request, node.tokens) for node in nodes.values()}
        fates = fates_of(
            self._request,
            self._policy,
            Watch(self.cover, self._keep, self._capped),
            [(node, shared[node_id]) for node_id, node in nodes.items()],
            plan.declined,
            delimiters,
        )
        ways = {node_id: tuple(ways) for node_id, (_, ways) in named.items()}
        candidates = [
            self._candidate(node, ways.get(node.id, ("passages",)), shared[node.id], plan)
            for node in nodes.values()
        ]
        candidates.sort(key=lambda one: (-one.kept, -one.covers, -one.shared))
        return Explanation(
            policy=self._policy.name,
            tokens=len(self._request),
            declined=plan.declined,
            generation=plan.generation,
            by_kind=counted(fates.kinds),
            by_reason=counted(fates.reasons),
            expected=self._expected(tier_of, row_bytes),
            divergence=self._divergence(list(nodes.values())),
            candidates=tuple(candidates),
            parts=tuple(parts_of(fates, self.cover)),
        )

    def _watch(self, cover: Cover, keep: Mask) -> None:
        self.cover, self._keep = cover, keep
        if self._trust is not None:
            self._doubtful = self._trust.doubtful(cover, keep)

    def _limit(self, cover: Cover, keep: Mask) -> None:
        before = keep.copy()
        if self._trust is not None:
            self._trust.limit(cover, keep)
        self._capped = before & ~keep

    # --- candidates --------------------------------------------------------------------------

    def _candidate(
        self, node: Node, ways: tuple[str, ...], shared: list[Match], plan: ReusePlan
    ) -> Candidate:
        cover, usable = self.cover, usable_length(self._policy, node)
        mine = np.zeros(len(self._request), np.bool_)
        if cover is not None:
            for index, donor in enumerate(cover.donors):
                if donor.id == node.id:
                    mine = cover.donor_of == index
        kept = 0 if plan.declined else int(np.count_nonzero(mine & self._keep))
        covers = int(np.count_nonzero(mine))
        common = common_prefix(self._request, node.tokens)
        why = self._taken(kept, plan) if covers else self._passed_over(node, usable, shared)
        return Candidate(
            node=node.id,
            found_by=ways,
            score=round(float(lexical_vector(self._request) @ lexical_vector(node.tokens)), 4),
            tokens=node.length,
            prefix=common,
            usable=usable,
            shared=sum(match.length for match in shared),
            covers=covers,
            kept=kept,
            taken=kept > 0,
            why=why,
            source=WORDS[self._trust.of(node)] if self._trust is not None else "",
            unconfirmed=int(np.count_nonzero(mine & self._doubtful)) if kept else 0,
        )

    def _taken(self, kept: int, plan: ReusePlan) -> str:
        if kept:
            return "taken"
        if plan.declined:
            return f"the plan was declined: {plan.declined}"
        return f"policy {self._policy.name} recomputes all that it covers"

    def _passed_over(self, node: Node, usable: int, shared: list[Match]) -> str:
        policy = self._policy
        if not shared:
            return "no token in common"
        if not policy.edited:
            return f"policy {policy.name} reuses prefixes only, and another has a longer one"
        if not usable:
            lax = "" if continues(policy, node) or node.exact else f", made under {node.policy}"
            return (
                f"its rows are of generation {node.generation}{lax}: policy {policy.name} does not "
                "build on them"
            )
        cover = self.cover
        if cover is None:
            return "its passages are too short to be worth loading"
        free = cover.donor_of < 0
        new = sum(
            int(np.count_nonzero(free[start : start + min(count, max(0, usable - source))]))
            for start, source, count in shared
        )
        if not new:
            return "has nothing that the donors taken lack"
        if len(cover.donors) >= self._config.max_donors:
            return f"{self._config.max_donors} donors were taken already (max_donors)"
        return f"what it could add ({new:,} tokens) lies in runs too short to be worth loading"

    # --- the rest ----------------------------------------------------------------------------

    def _divergence(self, nodes: list[Node]) -> Divergence | None:
        if not nodes:
            return None
        request = self._request
        node = max(nodes, key=lambda one: common_prefix(request, one.tokens))
        at = common_prefix(request, node.tokens)
        ours, theirs = request[at : at + _SHOWN], node.tokens[at : at + _SHOWN]
        return Divergence(node.id, at, tuple(ours.tolist()), tuple(theirs.tolist()))

    def _expected(self, tier_of: Callable[[str], str | None], row_bytes: int) -> Expected | None:
        """None where nothing could be reused."""
        keep, cost = self._keep, self._cost
        reused = int(np.count_nonzero(keep))
        if self.cover is None or not reused:
            return None
        pieces = self.cover.pieces(keep)
        spans, blocks = self.cover.spans(pieces)
        tiers: dict[str, int] = {}
        for span in spans:
            tier = tier_of(blocks[span.block]) or "host"
            tiers[tier] = tiers.get(tier, 0) + span.length * row_bytes
        runs = placeholder_runs(pieces)
        load = sum(cost.load[tier].seconds(nbytes) for tier, nbytes in tiers.items())
        whole = cost.prefill.seconds(len(self._request))
        left = cost.prefill.seconds(len(self._request) - reused)
        seams = runs * cost.run_seconds
        saved = whole - left - load - seams
        return Expected(
            without=_ms(whole),
            compute=_ms(left),
            load=_ms(load),
            seams=_ms(seams),
            saving=_ms(saved),
            assumed_speed=cost.prefill.assumed,
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
