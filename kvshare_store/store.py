"""Store: plan, load, save, commit, evict. The facade; everything below is reached through it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvshare_store.blocks.eviction import make_policy
from kvshare_store.blocks.leases import Lease
from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError, LeaseError, PlanError
from kvshare_store.janitor import Collected, Janitor
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.planner import Draft, Planner
from kvshare_store.lookup.policy import ReusePolicy, configured_policy, stricter_policy
from kvshare_store.lookup.semantic import Semantic
from kvshare_store.lookup.text import delimiter_ids
from kvshare_store.metrics import Metrics
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.purge import OthersPurges, Purge, Purged, matching
from kvshare_store.rewrite import pin
from kvshare_store.saving import Saving
from kvshare_store.sharing import Sharing
from kvshare_store.shelf import Shelf
from kvshare_store.staging import Reuse, Slot, Staged, reuse_of
from kvshare_store.tree.delta_tree import DeltaTree
from kvshare_store.tree.edits import Tokens, as_tokens

if TYPE_CHECKING:
    from kvshare_store.editor import EditedRows
    from kvshare_store.tensors.rope import Rope


log = logging.getLogger("kvshare")


class _Open(NamedTuple):
    """A plan that has not ended yet."""

    tokens: int
    tier: str


def _inexact(draft: Draft) -> Draft:
    """The same plan from rows that a lossy codec has changed: edited, whatever they were before."""
    spans = tuple(msgspec.structs.replace(span, exact=False) for span in draft.spans)
    return draft._replace(exact=0, spans=spans, generation=max(1, draft.generation))


class Store:
    """One store of KV rows. Thread-safe. Use as a context manager, or call `close`.

    `HomeError` or `BusyError` when the home cannot be used or belongs to another process.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.tree = DeltaTree(lambda: make_policy(config.eviction))
        self.cost = CostModel()
        self.semantic = Semantic(config, self.cost)
        self._policy = configured_policy(config)
        self._planner = Planner(config, self.tree, self.cost)
        self.shelf = Shelf(config, self.tree, self.semantic, self.metrics)
        self.blocks = self.shelf.blocks
        self._saving = Saving(config, self.shelf, self.metrics)
        self._open: dict[str, _Open] = {}
        self._janitor = Janitor(config, self.shelf)
        self._sharing: Sharing | None = None
        if config.catalog and self.shelf.catalog is not None:
            purges = OthersPurges(self.shelf, self._saving, config.home_path)
            self._sharing = Sharing(
                self.shelf.catalog, self.shelf, config.sync_seconds, self.metrics, purges.look
            )

    # --- serve -------------------------------------------------------------------------------

    def plan(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        *,
        policy: str | None = None,
        owner: str = "",
        deadline_ms: float | None = None,
    ) -> ReusePlan:
        """Which stored rows can serve this prompt, and what is left to compute.

        The plan's blocks are leased until `finish`. A plan without use says why in `declined`.
        `policy` may only be stricter than the configured one. `ConfigError`/`PlanError` for input
        that makes no sense; nothing else is raised.
        """
        request = as_tokens(tokens)
        chosen = stricter_policy(self._policy, policy)
        with self.metrics.timed("lookup"):
            with self.shelf.lock:
                self.metrics.add("lookups")
                self.metrics.add("tokens_requested", len(request))
                draft = self._planner.draft(
                    request,
                    self.shelf.index(namespace.digest),
                    chosen,
                    tier_of=self.blocks.tier_of,
                    row_bytes=namespace.layout.row_bytes,
                    delimiters=delimiter_ids(namespace) if chosen.delimiters else (),
                    semantic=lambda: self.semantic.query(namespace, request),
                )
            plan = self._leased(draft, chosen, namespace, len(request), owner, deadline_ms)
        if plan.declined:
            self._count_miss(plan.declined, len(request))
        if plan.declined == "no_saving":
            self.cost.doubt()
        return msgspec.structs.replace(plan, policy=chosen.name)

    def _leased(
        self,
        draft: Draft,
        policy: ReusePolicy,
        namespace: Namespace,
        length: int,
        owner: str,
        deadline_ms: float | None,
    ) -> ReusePlan:
        plan = ReusePlan(namespace=namespace.digest, tokens=length, declined=draft.declined)
        if draft.declined:
            return plan
        tiers = {self.blocks.tier_of(name) for name in draft.blocks}
        tier = next((slow for slow in ("remote", "disk") if slow in tiers), "host")
        timeout = (self.config.plan_deadline_ms if deadline_ms is None else deadline_ms) / 1e3
        seconds = self.config.lease_seconds + timeout
        lease, refs = self.blocks.lease(list(draft.blocks), owner, seconds, timeout)
        with self.shelf.lock:
            alive = lease.id in self.blocks.leases  # its owner may have died meanwhile
            if not alive or len(refs) < len(draft.blocks):
                if alive:
                    self._closed(self.blocks.end_lease(lease.id))
                return msgspec.structs.replace(plan, declined="not_resident")
            if any(self.blocks.host.lossy(name) for name in draft.blocks):
                draft = _inexact(draft)
                if draft.generation > policy.max_generation or not policy.edited:
                    self._closed(self.blocks.end_lease(lease.id))
                    return msgspec.structs.replace(plan, declined="lossy")
            self._open[lease.id] = _Open(length, tier)
            for donor in draft.donors:
                self.tree.touch(donor)
        return msgspec.structs.replace(
            plan,
            exact=draft.exact,
            spans=draft.spans,
            blocks=tuple(refs[name] for name in draft.blocks),
            donors=draft.donors,
            generation=draft.generation,
            lease=lease.id,
            arena=str(self.blocks.host.arena.path),
            saving_ms=draft.saving_ms,
        )

    def decline(self, reason: str, tokens: int) -> None:
        """Count a request of `tokens` tokens that the engine could not ask a plan for."""
        self.metrics.add("lookups")
        self.metrics.add("tokens_requested", tokens)
        self._count_miss(reason, tokens)

    def finish(self, plan: ReusePlan | str, outcome: Outcome) -> None:
        """The request has loaded the plan, or has given it up: ends the lease, counts the outcome.

        A lease that has ended already is ignored: it was counted when it expired.
        """
        lease_id = plan if isinstance(plan, str) else plan.lease
        try:
            lease = self.blocks.end_lease(lease_id)
        except LeaseError:
            return
        opened = self._closed(lease)
        if opened is None:
            return
        if outcome.failed:
            self._count_miss(outcome.failed, outcome.recomputed or opened.tokens)
            return
        self.metrics.add("hits_edited" if outcome.edited else "hits_exact")
        self.metrics.add("tokens_reused_exact", outcome.exact)
        self.metrics.add("tokens_reused_edited", outcome.edited)
        self.metrics.add("tokens_recomputed", outcome.recomputed)
        self.metrics.add("bytes_loaded", outcome.nbytes)
        self.metrics.observe("load", outcome.seconds)
        self.cost.load[opened.tier].observe(outcome.nbytes, outcome.seconds)

    def _count_miss(self, reason: str, tokens: int) -> None:
        self.metrics.add("misses")
        self.metrics.decline(reason)
        self.metrics.add("tokens_recomputed", tokens)

    def load(self, plan: ReusePlan, rope: Rope | None = None) -> EditedRows:
        """The rows of a plan's spans, K moved to its new positions; ends the lease.

        `rope` is the model's rotary table; without it only rows that did not move can be loaded
        (`UnsupportedError`). `LeaseError` if the lease ran out before the rows were copied. After
        an error the plan has ended as well, as a miss.
        """
        from kvshare_store.editor import Editor  # noqa: PLC0415 - the daemon never loads torch

        start = perf_counter()
        namespace = self.shelf.namespace(plan.namespace)
        if namespace is None:
            raise PlanError(f"namespace {plan.namespace[:12]} is not one of this store's")
        try:
            edited = Editor(namespace.layout, rope).edit(
                plan.spans, plan.blocks, lambda ref: self.rows_of(plan, plan.blocks.index(ref))
            )
            for ref in plan.blocks:
                self.blocks.host.arena.check(ref)
        except KVShareError as error:
            self.finish(plan, Outcome(recomputed=plan.tokens, failed=str(error.kind)))
            raise
        exact = sum(span.length for span in plan.spans if span.exact)
        nbytes = plan.reused * namespace.layout.row_bytes
        outcome = Outcome(
            exact, plan.reused - exact, plan.tokens - plan.reused, nbytes, perf_counter() - start
        )
        self.finish(plan, outcome)
        return edited

    def rows_of(self, plan: ReusePlan, block: int) -> memoryview:
        """The bytes of one of a plan's blocks; `LeaseError` if the lease did not keep it."""
        ref = plan.blocks[block]
        self.blocks.host.arena.check(ref)
        return self.blocks.host.arena.rows(ref.offset, ref.nbytes)

    def _closed(self, lease: Lease) -> _Open | None:
        """A lease has ended: what it held may go; returns the plan it was for."""
        with self.shelf.lock:
            self.shelf.sweep(lease.names)
            return self._open.pop(lease.id, None)

    # --- save --------------------------------------------------------------------------------

    def stage(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        reuse: Reuse | None = None,
        *,
        owner: str = "",
    ) -> Staged:
        """Reserve slots for the rows of this prompt that are not stored yet.

        Fill the slots with the rows at `Staged.fresh`, then `commit`, or `abandon`. The slots stay
        reserved until then, or until `owner` stages another prompt or is reaped. `NoSpaceError`
        when the host budget is full of rows in use.
        """
        return self._saving.stage(as_tokens(tokens), namespace, reuse or Reuse(), owner)

    def slot(self, slot: Slot) -> memoryview:
        """The writable bytes of a staged slot."""
        return self.blocks.reserved(slot.offset)

    def abandon(self, staged_id: str) -> None:
        """Give a staged save's slots back."""
        self._saving.abandon(staged_id)

    def commit(self, staged_id: str) -> str | None:
        """The slots are filled: the prompt becomes a node. Returns its id.

        It can be reused at once and is durable soon after (`flush` waits for that). None if rows it
        builds on left the store meanwhile. `LeaseError` if the staged save has ended already.
        """
        return self._saving.commit(staged_id)

    def save(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        rows: Any,
        plan: ReusePlan | None = None,
    ) -> Staged:
        """Stage the fresh rows of a prompt from a buffer; `commit` its id to make it a node.

        `rows`: bytes-like, the rows of every position that `plan`'s spans do not fill, ascending,
        canonical order. `NamespaceError` if their number does not fit.
        """
        staged = self.stage(tokens, namespace, reuse_of(plan) if plan is not None else None)
        if not staged.known:
            try:
                self._saving.fill(staged, namespace, rows)
            except KVShareError:
                self.abandon(staged.id)
                raise
        return staged

    # --- the rest ----------------------------------------------------------------------------

    def evict(self, *, nodes: int = 0, namespace: str | None = None) -> int:
        """Forget the nodes worth least, no pinned ones, or all of one namespace; returns how many.

        They are gone from lookup at once; their blocks follow once their rows are gone from the
        catalogue. Leased blocks stay until their lease ends.
        """
        return self.shelf.evict(nodes, namespace)

    def clear(self) -> int:
        """Forget every node and remove its blocks; returns how many nodes there were."""
        count = self.shelf.clear()
        self.flush()
        return count

    def pin(self, node_id: str, pinned: bool = True) -> bool:
        """Keep a node until it is purged, or no longer; False if it is not here.

        A pin survives restarts once it is durable (`flush` waits for that).
        """
        return pin(self.shelf, node_id, pinned)

    def collect(self, *, dry_run: bool = False) -> Collected:
        """Collect garbage now, as the janitor does by itself every `gc_seconds`."""
        return self._janitor.collect(dry_run=dry_run)

    def purge(
        self, namespace: str = "", *, tenant: str | None = None, patience: float = 0.0,
        dry_run: bool = False,
    ) -> list[Purged]:  # fmt: skip
        """Remove every byte of a namespace (the beginning of its digest), or of all of a tenant's.

        Waits up to `patience` seconds for leases and saves to end, for each of them; `Purged` says
        what remains. `NamespaceError` if there is no such namespace.
        """
        found = matching(self.shelf, namespace, tenant)
        purges = [Purge(self.shelf, self._saving, one, self.reap) for one in found]
        return [one.preview() if dry_run else one.run(patience) for one in purges]

    def reap(self, dead_owners: set[str] | None = None) -> None:
        """End leases that expired, and whatever clients hold that are gone."""
        dead = dead_owners or set()
        with self.shelf.lock:
            for lease in self.blocks.reap(dead):
                opened = self._closed(lease)
                if opened is not None:
                    self._count_miss("lease_expired", opened.tokens)
            self._saving.reap(dead)

    def flush(self) -> None:
        """Return once everything committed so far is durable."""
        self.shelf.committer.flush()

    def namespace(self, digest: str) -> Namespace | None:
        """What a digest stands for."""
        return self.shelf.namespace(digest)

    def stats(self) -> dict[str, Any]:
        """Counters, budgets and times, in plain types."""
        metrics = self.metrics
        names = (
            "lookups", "hits_exact", "hits_edited", "misses", "tokens_requested",
            "tokens_reused_exact", "tokens_reused_edited", "tokens_recomputed",
            "bytes_loaded", "bytes_stored",
        )  # fmt: skip
        tiers = {name: msgspec.structs.asdict(use) for name, use in self.blocks.use().items()}
        return {
            **{name: metrics.count(name) for name in names},
            "declined": metrics.declined,
            "errors": metrics.errors,
            "nodes": len(self.tree),
            "blocks": len(self.tree.blocks()),
            "leases": len(self.blocks.leases),
            "reserved": len(self.blocks.filling()),
            "tiers": tiers,
            "catalog_bytes": self.shelf.catalog.bytes if self.shelf.catalog is not None else 0,
            "seconds": {name: metrics.quantiles(name) for name in ("lookup", "load", "save")},
        }

    def close(self) -> None:
        """Finish what is queued and let go of the home. Everything committed stays."""
        self._janitor.close()
        if self._sharing is not None:
            self._sharing.close()
        try:
            if self.shelf.uses is not None:
                self.shelf.uses.exchange()
        except KVShareError as error:
            log.warning("kvshare: last uses could not be written down: %s", error)
        self.shelf.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
