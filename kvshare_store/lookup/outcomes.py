"""How lookups and plans end: what their leases held may go, and what became of each is counted and
logged."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

import msgspec

from kvshare_store.blocks.leases import Lease
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.errors import LeaseError, PlanError
from kvshare_store.lookup.cost import Costs
from kvshare_store.lookup.open_plans import OpenPlan, OpenPlans
from kvshare_store.lookup.request_log import Asked, RequestLog
from kvshare_store.namespace import Namespace
from kvshare_store.observability.metrics import Metrics
from kvshare_store.plan import Outcome
from kvshare_store.quality.quality import Quality


class Outcomes:
    """Those of one store. Thread-safe."""

    def __init__(
        self,
        nodes: NodeStore,
        plans: OpenPlans,
        costs: Mapping[bool, Costs],
        metrics: Metrics,
        quality: Quality,
        *,
        log_prompts: bool,
    ) -> None:
        """`costs`: what is measured of engines here (False) and of those on other machines."""
        self._nodes = nodes
        self._blocks = nodes.blocks
        self._open = plans
        self._costs = costs
        self._metrics = metrics
        self._quality = quality
        self.log = RequestLog(prompts=log_prompts)

    # --- of lookups ------------------------------------------------------------------------------

    def asked(self, lookup: Asked) -> None:
        """A request asks for a plan."""
        if not lookup.look:
            self._metrics.add_all({"lookups": 1, "tokens_requested": lookup.tokens})

    def answered(self, lookup: Asked, declined: str) -> None:
        """A lookup has ended, in a plan or `declined`."""
        if not lookup.look:
            seconds = perf_counter() - lookup.start
            self._metrics.observe("lookup", seconds)
            if declined:
                self._count_miss(declined, lookup.tokens, lookup.namespace)
                self.log.missed(lookup, declined, seconds)

    def decline(
        self,
        reason: str,
        tokens: int,
        request: str = "",
        namespace: Namespace | None = None,
        *,
        logged: bool = True,
    ) -> None:
        """Count a request of `tokens` tokens for which nobody could ask for a plan. `request`: the
        engine's name of it; `namespace`: None where nobody has said whose it was."""
        self._metrics.add_all({"lookups": 1, "tokens_requested": tokens})
        self._count_miss(reason, tokens, namespace)
        if logged:
            self.log.declined(reason, tokens, request, namespace)

    def engine_cached(self, tokens: int, request: str = "") -> None:
        """Correct a lookup that was counted as a miss: the engine's own prefix cache had `tokens`
        of its tokens. `request`: its name, which the log has it under."""
        self._metrics.add_all({"tokens_engine_cached": tokens, "tokens_recomputed": -tokens})
        self.log.engine_cached(request, tokens)

    # --- of plans --------------------------------------------------------------------------------

    def finish(self, lease_id: str, outcome: Outcome) -> None:
        """See `Store.finish`."""
        try:
            lease = self._blocks.end_lease(lease_id)
        except LeaseError:
            return
        opened = self.closed(lease)
        if opened is None:
            return
        try:
            opened.check(outcome)
        except PlanError as error:
            self._metrics.error(error.kind)
            self._missed(opened, "bad_outcome")
            raise
        if not outcome.failed and not outcome.reused.tokens:
            outcome = msgspec.structs.replace(outcome, failed="not_taken")
        if not opened.asked.look:
            self._count_end(opened, outcome)
        if outcome.failed:
            return
        self._metrics.add("bytes_loaded", outcome.nbytes)
        self._metrics.observe("load", outcome.seconds)
        load = self._costs[opened.asked.far].load
        load[opened.tier].observe(outcome.nbytes, outcome.seconds)

    def reap(self, dead_owners: set[str]) -> None:
        """End leases that expired, or whose owner is gone; each counts as a miss."""
        self._nodes.remove_lost()
        for lease in self._blocks.reap(dead_owners):
            opened = self.closed(lease)
            if opened is not None:
                self._missed(opened, "lease_expired")

    def closed(self, lease: Lease) -> OpenPlan | None:
        """A lease has ended: what it held may go; returns the plan it was for."""
        with self._nodes.lock:
            opened = self._open.pop(lease.id)
            tree = self._nodes.tree
            # as long as the donors are here, all of the plan's blocks are in use
            if opened is None or any(tree.get(node.id) is not node for node in opened.donors):
                self._nodes.remove_unused(lease.names)
            return opened

    def forget(self, digest: str) -> None:
        """Drop what is remembered of the requests of a namespace."""
        self.log.forget(digest)
        self._quality.forget(digest)
        self._metrics.forget(digest)

    # --- counting --------------------------------------------------------------------------------

    def _count_end(self, opened: OpenPlan, outcome: Outcome) -> None:
        space = opened.asked.namespace
        self._metrics.add("tokens_engine_cached", outcome.cached)
        self._log_end(opened, outcome)
        if outcome.failed:
            left = outcome.recomputed or opened.tokens
            self._count_miss(outcome.failed, left, space, outcome.cached)
        else:
            self._count_hit(outcome, space)

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
