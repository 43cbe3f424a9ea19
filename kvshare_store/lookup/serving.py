"""Serving: a prompt becomes a plan with a lease, and what became of the plan is counted.

Donors are nominated under the store's lock. Alignment, policy and cost need no lock, because nodes
do not change. The lock is taken again to lease: a donor or a block that left meanwhile makes the
plan a miss. No caller waits for a tier: where blocks come from below, the I/O loop ends the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import nullcontext
from time import perf_counter

import msgspec

from kvshare_store.blocks.leases import Lease
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.config import StoreConfig
from kvshare_store.errors import LeaseError, PlanError
from kvshare_store.lookup.cost import Costs
from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.explain import Explainer, Explanation, Named, Watched
from kvshare_store.lookup.nominate import Nominator, WithPools
from kvshare_store.lookup.open_plans import OpenPlan, OpenPlans
from kvshare_store.lookup.planner import Planned, Planner, slowest_of
from kvshare_store.lookup.policy import PRESETS, Mask, configured_policy, stricter_policy
from kvshare_store.lookup.request_log import Asked, RequestLog, prompt_of
from kvshare_store.lookup.sources import Sources
from kvshare_store.lookup.steering import rung_of
from kvshare_store.lookup.text import delimiter_ids
from kvshare_store.lookup.text_vectors import TextVectors
from kvshare_store.lookup.trust import Trust, Trusting
from kvshare_store.metrics import Metrics
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.plan import BlockRef, Outcome, ReusePlan
from kvshare_store.quality.quality import Quality
from kvshare_store.rates import Rates
from kvshare_store.threads import FairLock

Leased = tuple[Lease, dict[str, BlockRef]]

_LEASES = 1024
"""One client may hold. An engine holds one for each request that is about to load."""
_SHORT = 1 << 11
"""Prompts of so many tokens and fewer are planned one at a time: their plans are many short steps,
and threads that take turns within them lose more time to Python's lock than they compute. Plans of
longer prompts spend it in libraries that let other threads run."""


class Serving:
    """Plans of one store, from the question to the outcome. Thread-safe."""

    def __init__(
        self,
        config: StoreConfig,
        nodes: NodeStore,
        plans: OpenPlans,
        costs: Costs,
        far_costs: Costs,
        text: TextVectors,
        sources: Sources,
        metrics: Metrics,
        quality: Quality,
    ) -> None:
        self._quality = quality
        self._config = config
        self._nodes = nodes
        self._blocks = nodes.blocks
        self._open = plans
        self._costs = costs
        self._far_costs = far_costs
        self._text = text
        self._sources = sources
        self._metrics = metrics
        self._policy = configured_policy(config)
        self._planner = Planner(config)
        self._turns = FairLock()
        self._rates = Rates()
        self.log = RequestLog(prompts=config.log_prompts)
        self.ending = False
        """No more plans are made."""

    def reload(self, config: StoreConfig) -> None:
        """Go on by other settings; the policy stays."""
        self._config = config
        self._planner.reload(config)
        self.log.prompts = config.log_prompts

    def plan_soon(
        self,
        request: Tokens,
        namespace: Namespace,
        policy: str | None,
        owner: str,
        deadline_ms: float | None,
        name: str = "",
        *,
        far: bool = False,
        look: bool = False,
        source: bytes = b"",
        pools: tuple[str, ...] = (),
    ) -> Future[ReusePlan]:
        """See `Store.plan_soon`."""
        chosen = stricter_policy(self._policy, policy)
        if look:
            chosen = stricter_policy(chosen, "exact")  # it is not steered
        lookup = Asked(
            namespace,
            len(request),
            chosen,
            perf_counter(),
            name,
            prompt_of(request, self.log.prompts),
            far,
            look,
            source,
            pools,
        )
        if not look:
            self._metrics.add_all({"lookups": 1, "tokens_requested": lookup.tokens})
        answer: Future[ReusePlan] = Future()
        if refused := self._refused(owner, namespace):
            self._answer(answer, lookup, lookup.plan(refused))
            return answer
        with self._turns if lookup.tokens <= _SHORT else nullcontext():
            if self._quality.steers and not look:
                lookup, planned = self._steered(request, lookup)
            else:
                planned = self._planned(request, lookup)
        if not look:
            self._text.looked_up(namespace.digest, request, _served_badly(planned.plan))
        if source and not namespace.pool:
            self._sources.asked(namespace.digest, request, source)
        return self._leasing(answer, lookup, planned, owner, deadline_ms)

    def plan_node(
        self, node_id: str, owner: str, deadline_ms: float | None, *, far: bool = False
    ) -> Future[ReusePlan]:
        """See `Store.plan_node`."""
        start, answer = perf_counter(), Future[ReusePlan]()
        with self._nodes.lock:
            node = self._nodes.tree.get(node_id)
            namespace = self._nodes.namespaces.get(node.namespace) if node is not None else None
        self._metrics.add("lookups")
        if node is None or namespace is None or not node.exact:
            self._count_miss("unknown_node", 0, None)
            answer.set_result(ReusePlan(namespace="", tokens=0, declined="unknown_node"))
            return answer
        self._metrics.add("tokens_requested", node.length)
        policy = stricter_policy(self._policy, "exact")
        lookup = Asked(namespace, node.length, policy, start, far=far)
        if refused := self._refused(owner, namespace):
            self._answer(answer, lookup, lookup.plan(refused))
            return answer
        tier = slowest_of({self._blocks.tier_of(name) for name in node.blocks})
        planned = Planned(_whole(lookup.plan(), node), (node,), tier)
        return self._leasing(answer, lookup, planned, owner, deadline_ms)

    def _refused(self, owner: str, namespace: Namespace) -> str:
        """Why a client gets no plan whatever is stored; empty if it may have one."""
        if self.ending:
            return "draining"
        if owner and self._blocks.leases.count(owner) >= _LEASES:
            return "too_many_leases"
        rate = self._nodes.limits.of(namespace).plans_per_second
        return "" if self._rates.allow(namespace.digest, rate) else "too_many_plans"

    def _costs_of(self, lookup: Asked) -> Costs:
        return self._far_costs if lookup.far else self._costs

    def _leasing(
        self,
        answer: Future[ReusePlan],
        lookup: Asked,
        planned: Planned,
        owner: str,
        deadline_ms: float | None,
    ) -> Future[ReusePlan]:
        declined = planned.plan.declined
        leasing = None if declined else self._lease(planned, owner, deadline_ms)
        if leasing is None:
            self._answer(answer, lookup, lookup.plan(declined or "blocks_gone"))
        else:
            leasing.add_done_callback(lambda done: self._complete(answer, lookup, planned, done))
        return answer

    def _planned(
        self, request: Tokens, lookup: Asked, watch: Callable[[Cover, Mask], None] | None = None
    ) -> Planned:
        namespace, policy = lookup.namespace, lookup.policy
        trust = self._trust(request, lookup)
        planned = self._planner.plan(
            request,
            self._nominator(lookup, trust),
            policy,
            self._costs_of(lookup).of(namespace.model_digest),
            tier_of=self._blocks.tier_of,
            row_bytes=namespace.layout.row_bytes,
            namespace=namespace.digest,
            delimiters=delimiter_ids(namespace.tokenizer) if policy.delimiters else (),
            watch=watch,
            limit=None if trust is None else trust.limit,
        )
        return _with_pools(planned) if lookup.pools else planned

    def _trust(self, request: Tokens, lookup: Asked) -> Trust | None:
        share = self._config.unconfirmed_share
        if not lookup.source and share >= 1:
            return None
        return Trust(self._nodes.state, request, lookup.source, share, lookup.namespace.digest)

    def _nominator(self, lookup: Asked, trust: Trust | None) -> Nominator:
        own = self._donors_of(lookup.namespace, trust)
        if not lookup.pools:
            return own
        spaces = map(lookup.namespace.in_pool, lookup.pools)
        pools = [self._donors_of(space, trust) for space in spaces]
        return WithPools(own, pools) if trust is None else WithPools(own, pools, trust.of)

    def _donors_of(self, namespace: Namespace, trust: Trust | None) -> Nominator:
        state = self._nodes.state
        if trust is not None:
            return Trusting(state, namespace.digest, trust)
        return Nominator(state.tree, state.index(namespace.digest), state.lock)

    def _steered(self, request: Tokens, lookup: Asked) -> tuple[Asked, Planned]:
        """The plan under the policy that is known to be good enough for requests of this kind."""
        covers: list[Cover] = []
        planned = self._planned(request, lookup, lambda cover, _: covers.append(cover))
        if not planned.plan.generation:
            return lookup, planned
        of = covers[0], planned.donors[0], lookup.policy, planned.plan.namespace
        policy = rung_of(self._quality, self._nodes.state, *of)
        if policy is lookup.policy:
            return lookup, planned
        lookup = lookup._replace(policy=policy)
        return lookup, self._planned(request, lookup)

    def _lease(
        self, planned: Planned, owner: str, deadline_ms: float | None
    ) -> Future[Leased] | None:
        """None if a donor or a block has left the store since the plan was made."""
        timeout = (self._config.plan_deadline_ms if deadline_ms is None else deadline_ms) / 1e3
        seconds = self._config.lease_seconds + timeout
        with self._nodes.lock:
            self._nodes.remove_lost()
            tree = self._nodes.tree
            here = all(node.id in tree for node in planned.donors)
            names = planned.plan.block_names
            absent = self._blocks.absent(names)
            if not here or any(self._blocks.tier_of(name) is None for name in absent):
                return None
            users = {name: tree.user_count(name) for name in absent}
            return self._blocks.lease_soon(names, users, owner, seconds, timeout)

    def _complete(
        self,
        answer: Future[ReusePlan],
        lookup: Asked,
        planned: Planned,
        leased: Future[Leased],
    ) -> None:
        try:
            self._answer(answer, lookup, self._leased(lookup, planned, *leased.result()))
        except BaseException as error:  # noqa: BLE001 - whoever waits for the plan must hear of it
            answer.set_exception(error)

    def _answer(self, answer: Future[ReusePlan], lookup: Asked, plan: ReusePlan) -> None:
        if not lookup.look:
            self._count_answer(lookup, plan.declined)
        if plan.declined == "no_saving":
            self._costs_of(lookup).of(lookup.namespace.model_digest).doubt()
        answer.set_result(msgspec.structs.replace(plan, wiped=self._blocks.pool.wiped))

    def _count_answer(self, lookup: Asked, declined: str) -> None:
        seconds = perf_counter() - lookup.start
        self._metrics.observe("lookup", seconds)
        if declined:
            self._count_miss(declined, lookup.tokens, lookup.namespace)
            self.log.missed(lookup, declined, seconds)

    def _leased(
        self,
        lookup: Asked,
        planned: Planned,
        lease: Lease,
        refs: dict[str, BlockRef],
    ) -> ReusePlan:
        plan = planned.plan
        with self._nodes.lock:
            self._nodes.remove_lost()
            alive = lease.id in self._blocks.leases  # its owner may have died meanwhile
            if not alive or len(refs) < len(plan.blocks):
                if alive:
                    self._closed(self._blocks.end_lease(lease.id))
                return lookup.plan("not_resident")
            if any(ref.lossy for ref in refs.values()):
                steered = plan.generation > 0 or not self._quality.steers
                plan = _as_edited(plan)
                allowed = lookup.policy.edited and steered
                if plan.generation > lookup.policy.max_generation or not allowed:
                    self._closed(self._blocks.end_lease(lease.id))
                    return lookup.plan("lossy")
            found = tuple(refs[name] for name in plan.block_names)
            plan = msgspec.structs.replace(plan, blocks=found)
            opened = OpenPlan(lookup, plan, planned.tier, planned.donors, perf_counter())
            self._open.add(lease.id, opened)
            for donor in planned.donors:
                self._nodes.used(donor)
        return msgspec.structs.replace(plan, lease=lease.id, arena=self._blocks.host.arena.id)

    def explain(
        self,
        request: Tokens,
        namespace: Namespace,
        policy: str | None,
        only: Node | None = None,
        without: Collection[str] = (),
        pools: Collection[str] = (),
    ) -> Explanation:
        """See `Store.explain`."""
        chosen = stricter_policy(self._policy, policy)
        if policy is not None and chosen.name != policy:
            chosen = PRESETS[policy]  # what a laxer one would do: nothing is served
        cost = self._costs.of(namespace.model_digest)
        named: Named = {}
        own, *others = (
            Watched(self._nodes.state, space.digest, named, only, without)
            for space in (namespace, *map(namespace.in_pool, pools))
        )
        return Explainer(self._config, request, chosen, cost).explain(
            self._planner,
            WithPools(own, others) if others else own,
            named,
            self._blocks.tier_of,
            namespace.layout.row_bytes,
            delimiter_ids(namespace.tokenizer) if chosen.delimiters else (),
        )

    def leased_block(self, lease: str, name: str) -> BlockRef:
        """See `Store.leased_block`."""
        with self._nodes.lock:
            opened = self._open.get(lease)
        found = opened.plan.blocks if opened is not None else ()
        for ref in found:
            if ref.name == name:
                return ref
        raise LeaseError(f"lease {lease[:12]} has ended, or is not of block {name[:12]}")

    # --- the end of a plan -----------------------------------------------------------------------

    def finish(self, lease_id: str, outcome: Outcome) -> None:
        """See `Store.finish`."""
        try:
            lease = self._blocks.end_lease(lease_id)
        except LeaseError:
            return
        opened = self._closed(lease)
        if opened is None:
            return
        try:
            opened.check(outcome)
        except PlanError as error:
            self._metrics.error(error.kind)
            self._missed(opened, "bad_outcome")
            raise
        if not opened.asked.look:
            self._count_end(opened, outcome)
        if outcome.failed:
            return
        self._metrics.add("bytes_loaded", outcome.nbytes)
        self._metrics.observe("load", outcome.seconds)
        self._costs_of(opened.asked).load[opened.tier].observe(outcome.nbytes, outcome.seconds)

    def _count_end(self, opened: OpenPlan, outcome: Outcome) -> None:
        space = opened.asked.namespace
        self._metrics.add("tokens_engine_cached", outcome.cached)
        self._log_end(opened, outcome)
        if outcome.failed:
            left = outcome.recomputed or opened.tokens
            self._count_miss(outcome.failed, left, space, outcome.cached)
        else:
            self._count_hit(outcome, space)

    def engine_cached(self, tokens: int) -> None:
        """See `Store.engine_cached`."""
        self._metrics.add_all({"tokens_engine_cached": tokens, "tokens_recomputed": -tokens})

    def decline(self, reason: str, tokens: int) -> None:
        """See `Store.decline`."""
        self._metrics.add_all({"lookups": 1, "tokens_requested": tokens})
        self._count_miss(reason, tokens, None)
        self.log.declined(reason, tokens)

    def reap(self, dead_owners: set[str]) -> None:
        """End leases that expired, or whose owner is gone; each counts as a miss."""
        self._nodes.remove_lost()
        for lease in self._blocks.reap(dead_owners):
            opened = self._closed(lease)
            if opened is not None:
                self._missed(opened, "lease_expired")

    def _closed(self, lease: Lease) -> OpenPlan | None:
        """A lease has ended: what it held may go; returns the plan it was for."""
        with self._nodes.lock:
            opened = self._open.pop(lease.id)
            tree = self._nodes.tree
            # as long as the donors are here, all of the plan's blocks are in use
            if opened is None or any(tree.get(node.id) is not node for node in opened.donors):
                self._nodes.remove_unused(lease.names)
            return opened

    def _missed(self, opened: OpenPlan, reason: str) -> None:
        """A plan has ended without having been used."""
        if opened.asked.look:
            return
        self._count_miss(reason, opened.tokens, opened.asked.namespace)
        self._log_end(opened, Outcome(recomputed=opened.tokens, failed=reason))

    def _log_end(self, opened: OpenPlan, outcome: Outcome) -> None:
        lookup = opened.made - opened.began
        self.log.ended(opened.asked, opened.plan, lookup, perf_counter() - opened.began, outcome)

    def _count_hit(self, outcome: Outcome, namespace: Namespace) -> None:
        kind, reused = outcome.reused.kind, outcome.reused._asdict()
        counts = {f"tokens_reused_{name}": tokens for name, tokens in reused.items()}
        counts |= {f"hits_{kind}": 1, "tokens_recomputed": outcome.recomputed}
        self._metrics.add_all(counts)
        left = outcome.recomputed + outcome.cached
        self._count_use(namespace, kind, {**reused, "not_reused": left})

    def _count_miss(
        self, reason: str, tokens: int, namespace: Namespace | None, cached: int = 0
    ) -> None:
        """`namespace`: None where nobody has said whose request it was."""
        self._metrics.add_all({"misses": 1, "tokens_recomputed": tokens})
        self._metrics.decline(reason)
        if namespace is not None:
            self._count_use(namespace, "miss", {"not_reused": tokens + cached})

    def _count_use(self, namespace: Namespace, outcome: str, tokens: dict[str, int]) -> None:
        digest = namespace.digest
        known = self._nodes.namespaces.get(digest) is not None
        self._metrics.used(digest, outcome, tokens, known=known)

    def forget(self, digest: str) -> None:
        """Drop what is remembered of the requests of a namespace."""
        self.log.forget(digest)
        self._quality.forget(digest)
        self._metrics.forget(digest)


def _whole(bare: ReusePlan, node: Node) -> ReusePlan:
    """All rows of an exact node."""
    names = list(dict.fromkeys(node.blocks))  # equal rows are one block, used twice
    at = [names.index(name) for name in node.blocks]
    spans = (msgspec.structs.replace(s, block=at[s.block], exact=True) for s in node.segments)
    return msgspec.structs.replace(
        bare,
        exact=node.length,
        spans=tuple(spans),
        blocks=tuple(map(BlockRef, names)),
        donors=(node.id,),
        stamps=(node.stamp,),
    )


def _with_pools(planned: Planned) -> Planned:
    """The same plan, which says which of its blocks are those of pools."""
    plan = planned.plan
    others = (donor for donor in planned.donors if donor.namespace != plan.namespace)
    theirs = {name for donor in others for name in donor.blocks}
    pooled = tuple(at for at, block in enumerate(plan.blocks) if block.name in theirs)
    return planned._replace(plan=msgspec.structs.replace(plan, pooled=pooled))


def _as_edited(plan: ReusePlan) -> ReusePlan:
    """The same plan from rows that a lossy codec has changed: edited, whatever they were before."""
    changed = {"exact": False, "continued": False}
    spans = tuple(msgspec.structs.replace(span, **changed) for span in plan.spans)
    generation = max(1, plan.generation + (plan.continued > 0))
    return msgspec.structs.replace(
        plan, exact=0, continued=0, contexts=(), spans=spans, generation=generation
    )


def _served_badly(plan: ReusePlan) -> bool:
    if plan.declined:
        return plan.declined in ("no_donor", "nothing_kept")
    return 2 * plan.reused < plan.tokens
