"""Store: plan, load, save, commit, evict. The facade; everything below is reached through it, and
`parts` puts it together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kvshare_store.errors import KVShareError, NodeError, PlanError, UnavailableError
from kvshare_store.errors.wording import short
from kvshare_store.lookup.explain import Explained
from kvshare_store.lookup.explanation import Explanation
from kvshare_store.lookup.request_log import RequestLog
from kvshare_store.maintenance.janitor import Collected
from kvshare_store.maintenance.purge import Purge, Purged, matching
from kvshare_store.maintenance.purge_lineage import LineagePurge
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens, as_tokens
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.save.second_looks import Look
from kvshare_store.save.staging import Buffer, Reuse, RowSource, Staged, packed, reuse_of
from kvshare_store.save.verdicts import Verdicts
from kvshare_store.store.parts import Parts

if TYPE_CHECKING:
    from kvshare_store.plan.editor import EditedRows
    from kvshare_store.tensors.rope import Rope


class Store(Parts):
    """One store of KV rows. Thread-safe. Use as a context manager, or call `close`.

    `HomeError` or `BusyError` when the home cannot be used or belongs to another process.
    """

    # --- serve -------------------------------------------------------------------------------

    def plan(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        *,
        policy: str | None = None,
        owner: str = "",
        deadline_ms: float | None = None,
        pools: Sequence[str] = (),
        source: bytes = b"",
    ) -> ReusePlan:
        """Which stored rows can serve this prompt, and what is left to compute.

        The plan's blocks are leased until `finish`. A plan without use says why in `declined`.
        `policy` may only be stricter than the configured one. `pools`: names of pools whose rows it
        may use too. `ConfigError`/`PlanError` for input that makes no sense; nothing else is
        raised.
        """
        return self.plan_soon(
            tokens,
            namespace,
            policy=policy,
            owner=owner,
            deadline_ms=deadline_ms,
            pools=pools,
            source=source,
        ).result()

    def plan_soon(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        *,
        policy: str | None = None,
        owner: str = "",
        deadline_ms: float | None = None,
        request: str = "",
        far: bool = False,
        look: bool = False,
        pools: Sequence[str] = (),
        source: bytes = b"",
        stores: bool = True,
    ) -> Future[ReusePlan]:
        """`plan` without waiting for a tier: the lookup itself runs in the caller's thread, and
        the future is done on return unless blocks must come from below shared memory.

        Then it ends within the deadline in another thread, which also runs its callbacks: keep them
        short. Input that makes no sense raises here; the future has a plan in every other case.
        `request`: the engine's name of the request, for the log. `far`: the rows go to another
        machine, so loading is weighed at the rate measured there. `look`: for a second look, which
        is neither counted as a request nor logged. `source`: who sends the request, hashed
        (`namespace.Sources`); its own rows are preferred. `stores`: the request will be stored too.
        """
        return self.serving.plan_soon(
            as_tokens(tokens),
            namespace,
            policy,
            owner,
            deadline_ms,
            request,
            far=far,
            look=look,
            pools=tuple(pools),
            source=source,
            stores=stores,
        )

    def explain(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        *,
        policy: str | None = None,
        only: str = "",
        without: Collection[str] = (),
        pools: Collection[str] = (),
        source: bytes = b"",
    ) -> Explanation:
        """Why a plan for this prompt would be what it is; nothing is leased, counted or logged.

        `policy`: also a laxer one than the configured; None: under a bound, that of the prompt's
        class. `only`: the id of the one donor to consider; `without`: of those to leave out;
        `pools`, `source`: as in `plan`. `NodeError` if `only` is not here.
        """
        donor = self.tree.get(only) if only else None
        if only and (donor is None or donor.namespace != namespace.digest):
            raise NodeError(f"node {short(only)} is not in the store")
        asked = Explained(as_tokens(tokens), namespace, policy, donor, without, pools, source)
        return self._maker.explain(asked)

    @property
    def requests(self) -> RequestLog:
        """The last requests, and how they ended."""
        return self.outcomes.log

    def finish(self, plan: ReusePlan | str, outcome: Outcome) -> None:
        """The request has loaded the plan, or given it up: ends the lease and counts the outcome.

        A lease that has ended already is ignored: it was counted when it expired. `PlanError` for
        an outcome that the plan cannot have; the plan has then ended as a miss.
        """
        self.outcomes.finish(plan if isinstance(plan, str) else plan.lease, outcome)

    def next_look(
        self, owner: str, namespaces: Collection[str], *, scores: bool = False
    ) -> Look | None:
        """The edited prompt of these namespaces (digests) that is most worth computing in full,
        leased to `owner`; None if there is none. `scores`: the engine can say how good answers
        were, so it is given controls too."""
        working = self.text.engines_work
        return self.saving.looks.next(owner, namespaces, working=working, scores=scores)

    @property
    def verdicts(self) -> Verdicts:
        """What second looks have said of nodes and requests."""
        return self.saving.looks.verdicts

    def observe(self, model: str, tokens: int, seconds: float, *, far: bool = False) -> None:
        """An engine has prefilled `tokens` tokens in so many seconds; `model`: the `model_digest`
        of its namespace, `far`: on another machine."""
        costs = self.far_costs if far else self.costs
        costs.observe(model, tokens, seconds)

    def load(self, plan: ReusePlan, rope: Rope | None = None) -> EditedRows:
        """The rows of a plan's spans, K moved to its new positions; ends the lease.

        `rope` is the model's rotary table; without it only rows that did not move can be loaded
        (`UnsupportedError`). `LeaseError` if the lease ran out before the rows were copied. After
        an error the plan has ended as well, as a miss.
        """
        from kvshare_store.plan.editor import Editor  # noqa: PLC0415 - the daemon never loads torch

        start = perf_counter()
        namespace = self.nodes.namespaces.get(plan.namespace)
        if namespace is None:
            raise PlanError(f"namespace {short(plan.namespace)} is not one of this store's")
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
        """The bytes of one of a plan's blocks; `LeaseError` if the lease no longer holds it."""
        ref = plan.blocks[block]
        self.blocks.host.arena.check(ref)
        return self.blocks.host.arena.rows(ref.offset, ref.nbytes)

    # --- save --------------------------------------------------------------------------------

    def stage(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        reuse: Reuse | None = None,
        *,
        owner: str = "",
        extends: int = 0,
        greedy: bool = False,
        request: str = "",
        source: bytes = b"",
    ) -> Staged:
        """Which rows of this prompt are not stored yet: `Staged.fresh`.

        `extends`: the first so many tokens are a prompt that is stored, and the others its answer.
        The rows of that prompt are taken from its node, whose place the longer one takes; `reuse`
        says only of which generation and contexts they are. `known` if there is no such node.
        `greedy`, of an answer: the request asked for the likeliest token at each step. `request`:
        the engine's name of it. `source`: who sent it, hashed; empty: whoever has looked the prompt
        up.

        `commit` them, or `abandon`; a staged save of an `owner` also ends when that stages another
        prompt or is reaped. `PlanError` or `NamespaceError` if `reuse` is not true of the prompts
        it names, `StorageError` while nothing can be stored, `OverloadError` while hundreds of
        prompts wait to be made durable, `LimitError` beyond `saves_per_second`.
        """
        if self.serving.ending:
            raise UnavailableError("the daemon is ending and takes no more prompts")
        self.metrics.health.check_storing()
        self._queue.admit()
        self._failures.setdefault(owner, self._queue.failures)
        return self.saving.stage(
            as_tokens(tokens),
            namespace,
            reuse or Reuse(),
            owner,
            extends,
            greedy=greedy,
            request=request,
            source=source,
        )

    def abandon(self, staged_id: str) -> None:
        """Forget a staged save."""
        self.saving.abandon(staged_id)

    def commit(self, staged_id: str, rows: RowSource) -> str | None:
        """The staged prompt becomes a node with fresh rows copied from `rows`. Returns its id.

        It can be reused at once and is durable soon after (`flush` waits for that). None if rows it
        builds on left the store meanwhile. `LeaseError` if the staged save has ended already,
        `NoSpaceError` when the host budget is full of rows in use, `PlanError` if there are too few
        rows; whatever fails, the save has ended and nothing else has changed.
        """
        node = self.saving.commit(staged_id, rows)
        if node is not None:
            self.text.saved(node)
            self._maker.saved(node)
        return node

    def save(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        rows: Any,
        plan: ReusePlan | None = None,
    ) -> str | None:
        """Stage and commit a prompt from a buffer. None if it is stored already, or as `commit`.

        `rows`: bytes-like, the rows of every position that `plan`'s spans do not fill with rows of
        the namespace itself (`ReusePlan.own`), ascending, canonical order. `NamespaceError` if
        their number does not fit.
        """
        staged = self.stage(tokens, namespace, reuse_of(plan) if plan is not None else None)
        if staged.known:
            return None
        try:
            buffer = Buffer(packed(rows, staged.sizes, namespace.layout))
        except KVShareError:
            self.abandon(staged.id)
            raise
        return self.commit(staged.id, buffer)

    # --- the rest ----------------------------------------------------------------------------

    def evict(self, *, nodes: int = 0, namespace: str | None = None) -> int:
        """Forget the nodes of least value, except pinned ones, or all nodes of one namespace;
        returns how many.

        They are gone from lookup at once; their blocks follow once their rows are gone from the
        catalogue. Leased blocks stay until their lease ends.
        """
        return self.nodes.evict(nodes, namespace)

    def clear(self) -> int:
        """Forget every node and remove its blocks; returns how many nodes there were.
        `StorageError` if the catalogue refuses to remove rows."""
        with self.nodes.lock:
            count = self.nodes.remove([node.id for node in self.tree], whatever=True)
        self._queue.check_removed()
        return count

    def pin(self, node_id: str, pinned: bool = True) -> bool:
        """Keep a node until it is purged, or stop keeping it; False if it is not here.

        A pin survives restarts once it is durable (`flush` waits for that).
        """
        return self._rewriter.pin(node_id, pinned)

    def collect(self, *, dry_run: bool = False) -> Collected:
        """Collect garbage now, as the janitor does every `gc_seconds`."""
        return self.janitor.collect(dry_run=dry_run)

    def purge(
        self, namespace: str = "", *, tenant: str | None = None, pool: str = "",
        patience: float = 0.0, dry_run: bool = False,
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[Purged]:  # fmt: skip
        """Remove every byte of a namespace (the beginning of its digest), or of all of a tenant's
        or a pool's.

        Waits up to `patience` seconds for leases and saves to end, for each of them, and no
        longer than until `given_up`; `Purged` says what remains. `NamespaceError` if there is no
        such namespace.
        """
        found = matching(self.nodes, namespace, tenant, pool)
        parts = self.repository, self.outcomes, self.saving
        purges = [Purge(*parts, one, given_up) for one in found]
        return [one.preview() if dry_run else one.run(patience) for one in purges]

    def purge_lineage(self, node_id: str, *, dry_run: bool = False) -> Purged:
        """Remove a node, pinned or not, and what was computed behind its rows; durable on return.

        Nothing that was planned from these nodes is saved any more. `NodeError` if there is no such
        node.
        """
        purge = LineagePurge(self.repository, self.saving, node_id)
        return purge.preview() if dry_run else purge.run()

    def flush(self, *, owner: str = "") -> None:
        """Wait until everything committed so far is durable; later commits are not waited for.

        `StorageError` if storage has refused a prompt, of any owner, between this owner's first
        save since its last `flush` and now: one of its own may be lost.
        """
        self._queue.flush(self._failures.pop(owner, None))

    def namespace(self, digest: str) -> Namespace | None:
        """The record behind a digest."""
        return self.nodes.namespaces.get(digest)
