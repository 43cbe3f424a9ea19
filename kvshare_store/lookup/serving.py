"""Serving: a prompt becomes a plan with a lease.

Donors are nominated under the store's lock. Alignment, policy and cost need no lock, because nodes
do not change. The lock is taken again to lease: a donor or a block that left meanwhile makes the
plan a miss. No caller waits for a tier: where blocks come from below, the I/O loop ends the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from time import perf_counter

import msgspec

from kvshare_store.blocks.leases import Lease
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.config import StoreConfig
from kvshare_store.errors import LeaseError
from kvshare_store.errors.wording import short
from kvshare_store.lookup.fair_lock import FairLock
from kvshare_store.lookup.open_plans import OpenPlan, OpenPlans
from kvshare_store.lookup.outcomes import Outcomes
from kvshare_store.lookup.plan_maker import PlanMaker
from kvshare_store.lookup.planner import Planned, slowest_of
from kvshare_store.lookup.policy import stricter_policy
from kvshare_store.lookup.rates import Rates
from kvshare_store.lookup.request_log import Asked, prompt_of
from kvshare_store.lookup.sources import Sources
from kvshare_store.lookup.text_vectors import TextVectors
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.plan import BlockRef, ReusePlan
from kvshare_store.quality.quality import Quality

Leased = tuple[Lease, dict[str, BlockRef]]

_LEASES = 1024
"""One client may hold. An engine holds one for each request that is about to load."""
_TRIES = 2
"""So often a plan is made whose donors have gone by the time their blocks are leased."""
_SHORT = 1 << 11
"""Prompts of so many tokens and fewer are planned one at a time: their plans are many short steps,
and threads that take turns within them lose more time to Python's lock than they compute. Plans of
longer prompts spend it in libraries that let other threads run."""


class Serving:
    """Plans of one store, from the question to the lease. Thread-safe."""

    def __init__(
        self,
        config: StoreConfig,
        nodes: NodeStore,
        plans: OpenPlans,
        maker: PlanMaker,
        outcomes: Outcomes,
        text: TextVectors,
        sources: Sources,
        quality: Quality,
    ) -> None:
        self._config = config
        self._nodes = nodes
        self._blocks = nodes.blocks
        self._open = plans
        self._maker = maker
        self._outcomes = outcomes
        self._text = text
        self._sources = sources
        self._quality = quality
        self._turns = FairLock()
        self._rates = Rates()
        self.ending = False
        """No more plans are made."""

    def reload(self, config: StoreConfig) -> None:
        """Go on by other settings; the policy stays."""
        self._config = config
        self._maker.reload(config)
        self._outcomes.log.prompts = config.log_prompts

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
        stores: bool = True,
    ) -> Future[ReusePlan]:
        """See `Store.plan_soon`."""
        chosen = stricter_policy(self._maker.policy, policy)
        if look:
            chosen = stricter_policy(chosen, "exact")  # it is not steered
        lookup = Asked(
            namespace,
            len(request),
            chosen,
            perf_counter(),
            name,
            prompt_of(request, self._outcomes.log.prompts),
            far,
            look,
            source,
            pools,
            stores,
        )
        self._outcomes.asked(lookup)
        answer: Future[ReusePlan] = Future()
        if refused := self._refused(owner, namespace):
            self._answer(answer, lookup, self._declined(lookup, refused))
            return answer
        lookup, planned, leasing = self._made(request, lookup, owner, deadline_ms)
        if not look:
            self._text.looked_up(namespace.digest, request, _served_badly(planned.plan))
        if source:
            self._sources.asked(namespace, request, source)
        return self._leasing(answer, lookup, planned, leasing)

    def _made(
        self, request: Tokens, asked: Asked, owner: str, deadline_ms: float | None
    ) -> tuple[Asked, Planned, Future[Leased] | None]:
        """A plan, and the lease of its blocks. A donor may leave the store in between: a prompt's
        node does when its answer is stored, and the longer one has the same rows. So a plan whose
        donors are gone is made once more."""
        for _ in range(_TRIES):
            with self._turns if asked.tokens <= _SHORT else nullcontext():
                lookup, planned = self._maker.made(request, asked)
            leasing = self._lease(planned, owner, deadline_ms)
            if leasing is not None or planned.plan.declined not in ("", "blocks_gone"):
                break
        return lookup, planned, leasing

    def plan_node(
        self, node_id: str, owner: str = "", deadline_ms: float | None = None, *, far: bool = False
    ) -> Future[ReusePlan]:
        """All rows of one exact node, leased until `Store.finish`: no lookup, no policy, no cost.

        Ends as `Store.plan_soon` does; a node that is not here, or not exact, is a plan without
        use.
        """
        start, answer = perf_counter(), Future[ReusePlan]()
        with self._nodes.lock:
            node = self._nodes.tree.get(node_id)
            namespace = self._nodes.namespaces.get(node.namespace) if node is not None else None
        if node is None or namespace is None or not node.exact:
            self._outcomes.decline("unknown_node", 0, logged=False)
            answer.set_result(ReusePlan(namespace="", tokens=0, declined="unknown_node"))
            return answer
        policy = stricter_policy(self._maker.policy, "exact")
        lookup = Asked(namespace, node.length, policy, start, far=far)
        self._outcomes.asked(lookup)
        if refused := self._refused(owner, namespace):
            self._answer(answer, lookup, self._declined(lookup, refused))
            return answer
        tier = slowest_of({self._blocks.tier_of(name) for name in node.blocks})
        planned = Planned(_whole(lookup.plan(), node), (node,), tier)
        leasing = self._lease(planned, owner, deadline_ms)
        return self._leasing(answer, lookup, planned, leasing)

    def leased_block(self, lease: str, name: str) -> BlockRef:
        """Where a block of an open plan lies; `LeaseError` if there is no such plan or block."""
        with self._nodes.lock:
            opened = self._open.get(lease)
        found = opened.plan.blocks if opened is not None else ()
        for ref in found:
            if ref.name == name:
                return ref
        raise LeaseError(f"lease {short(lease)} has ended, or is not of block {short(name)}")

    def _refused(self, owner: str, namespace: Namespace) -> str:
        """Why a client gets no plan whatever is stored; empty if it may have one."""
        if self.ending:
            return "draining"
        if owner and self._blocks.leases.count(owner) >= _LEASES:
            return "too_many_leases"
        rate = self._nodes.limits.of(namespace).plans_per_second
        return "" if self._rates.allow(namespace.digest, rate) else "too_many_plans"

    # --- the lease -------------------------------------------------------------------------------

    def _leasing(
        self,
        answer: Future[ReusePlan],
        lookup: Asked,
        planned: Planned,
        leasing: Future[Leased] | None,
    ) -> Future[ReusePlan]:
        if leasing is None:
            reason = planned.plan.declined or "blocks_gone"
            self._answer(answer, lookup, self._declined(lookup, reason))
        else:
            leasing.add_done_callback(lambda done: self._complete(answer, lookup, planned, done))
        return answer

    def _lease(
        self, planned: Planned, owner: str, deadline_ms: float | None
    ) -> Future[Leased] | None:
        """None if there is no plan, or a donor or a block has left the store since it was made."""
        if planned.plan.declined:
            return None
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
        self._outcomes.answered(lookup, plan.declined)
        if lookup.steering is not None:
            plan = msgspec.structs.replace(plan, quality_bound=lookup.steering.bound)
        answer.set_result(plan)

    def _declined(self, lookup: Asked, reason: str) -> ReusePlan:
        return lookup.plan(reason, self._blocks.pool.wiped)

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
                    self._outcomes.closed(self._blocks.end_lease(lease.id))
                return self._declined(lookup, "not_resident")
            if any(ref.lossy for ref in refs.values()):
                steered = plan.generation > 0 or not self._quality.steers
                plan = _as_edited(plan)
                allowed = lookup.policy.edited and steered
                if plan.generation > lookup.policy.max_generation or not allowed:
                    self._outcomes.closed(self._blocks.end_lease(lease.id))
                    return self._declined(lookup, "lossy")
            plan = msgspec.structs.replace(
                plan,
                blocks=tuple(refs[name] for name in plan.block_names),
                lease=lease.id,
                arena=self._blocks.host.arena.id,
                wiped=self._blocks.pool.wiped,
            )
            opened = OpenPlan(lookup, plan, planned.tier, planned.donors, perf_counter())
            self._open.add(lease.id, opened)
            for donor in self._used(lookup, planned._replace(plan=plan)):
                self._nodes.used(donor)
        return plan

    def _used(self, lookup: Asked, planned: Planned) -> Sequence[Node]:
        if not lookup.stores:
            return planned.donors
        return planned.used(lookup.policy, answers=self._config.store_answers)


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
