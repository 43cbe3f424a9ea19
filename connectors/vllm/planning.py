"""The scheduler side: promises tokens to vLLM and remembers what became of each request.

Edited KV never reaches vLLM's prefix cache under an exact hash: while vLLM allocates blocks for a
request that loads edited rows, and from then on, its block hashes are private from the first
edited position on.
"""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from kvshare_connectors.vllm.adapters import Adapters
from kvshare_connectors.vllm.answers import Warnings, answer_of, log_line, show_log_lines
from kvshare_connectors.vllm.idle import Unserved
from kvshare_connectors.vllm.lookups import LOOK_AHEAD, Lookups
from kvshare_connectors.vllm.metadata import KVShareMetadata
from kvshare_connectors.vllm.orders import Orders
from kvshare_connectors.vllm.private_hashes import key_of
from kvshare_connectors.vllm.requests import (
    Promise,
    RequestState,
    decline_reason,
    granted,
    wish_of,
)
from vllm.v1.request import RequestStatus

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.link import Link
from kvshare_store.namespace import UNPROVEN, Namespace, Tenants
from kvshare_store.plan import ReusePlan, Span, clip_spans, gaps

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvshare")


class Planning:
    """One per engine; called only from the scheduler's thread."""

    def __init__(
        self,
        config: StoreConfig,
        namespace: Namespace,
        link: Link,
        block: int,
        tenants: Tenants | None = None,
    ) -> None:
        """`block`: tokens of a paged block."""
        self.config = config
        self.lookups = Lookups(config, link)
        self._adapters = Adapters()
        self._tenants = tenants or Tenants(config)
        self.orders = Orders(config, self._adapters, block)
        self._namespace = self._origin = namespace
        self._link = link
        self._block = block
        self._secret = secrets.token_bytes(32)
        self._warnings = Warnings()
        self._states: dict[str, RequestState] = {}
        self._ready: list[RequestState] = []
        """Admitted in this step, all runs to be computed in it."""
        self._parked: dict[str, RequestState] = {}
        self._placeholders = 0
        """Promised in this step and computed by virtual rows, though vLLM counts them as hits."""
        self._manager: KVCacheManager | None = None
        self._unserved = ""
        """Why the worker loads and stores nothing."""
        self.places_runs = False
        """Whether the scheduler computes placeholder runs; without it only prefixes are reused."""
        self.may_start: Callable[[Request], bool] = lambda request: True
        """Asked before rows are promised: whether the scheduler has room for the request."""
        if config.log_requests:
            show_log_lines()

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's manager of paged blocks: hashes are hidden before it publishes blocks."""
        self._manager = manager
        allocate = manager.allocate_slots

        @functools.wraps(allocate)
        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
            hidden = self._hide_hashes(request, kwargs.get("num_external_computed_tokens", 0))
            blocks = allocate(request, *args, **kwargs)
            if blocks is None and hidden is not None:
                hidden.show_hashes()
            return blocks

        manager.allocate_slots = allocate_slots  # type: ignore[method-assign]

    def place_runs(self, may_start: Callable[[Request], bool], *, exact_only: bool) -> None:
        """The scheduler computes placeholder runs, so edited rows may be served."""
        self.places_runs = True
        self.may_start = may_start
        self.lookups.exact_only = exact_only

    def close(self) -> None:
        """Let go of the daemon, which stays."""
        self._link.close()

    # --- requests come and go ----------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """A new request: its lookup runs while it waits, unless enough others hold plans."""
        state = self.state_of(request)
        holding = (other for other in self._states.values() if other.holds_plan)
        if len(list(itertools.islice(holding, LOOK_AHEAD))) < LOOK_AHEAD:
            self.lookups.ask_early(state)

    def state_of(self, request: Request) -> RequestState:
        """The state of a request, made at its first mention."""
        state = self._states.get(request.request_id)
        if state is None:
            wish = wish_of(request)
            adapter = self._adapters.of(request.lora_request)
            tenant = self._tenants.of(request.cache_salt or "")
            namespace = self._namespace.for_tenant(tenant or "", adapter.identity)
            policy = granted(self.config.policy, wish.policy)
            declined = self._unserved or decline_reason(request, wish, policy) or adapter.declined
            if tenant is None:
                declined = declined or UNPROVEN
            if not protocol.lookup_fits(namespace, request.num_prompt_tokens):
                declined = declined or "too_long"
            state = RequestState(request, namespace, wish, policy, declined)
            self._states[request.request_id] = state
            self._link.working(True)
            self._warnings.consider(state)
            if state.declined:
                state.settled = True
                self._link.tell(protocol.Decline(state.declined, state.length))
        return state

    def look_ahead(self, requests: Iterable[Request], *, busy: bool) -> list[RequestState]:
        """Look up the requests that this step may admit; returns their states in order."""
        return self.lookups.look_ahead(map(self.state_of, requests), busy=busy)

    def finished(self, request: Request, block_ids: Sequence[int] = ()) -> dict[str, Any] | None:
        """The request has ended, well or not, and gives its paged blocks back.

        Returns what its answer says about reuse.
        """
        self.orders.ended(block_ids)
        state = self._states.pop(request.request_id, None)
        if state is None:
            return None
        self._link.working(bool(self._states))
        self.lookups.ended(state)
        if state.parked:
            self.unpark(state)
            self.orders.finish_load(state.id)
        answer = answer_of(state)
        if self.config.log_requests:
            log_line(state, answer)
        return answer

    # --- vLLM's questions --------------------------------------------------------------------

    def matched(self, request: Request, local: int) -> tuple[int | None, bool]:
        """How many tokens past `local` the plan covers, and whether the request is parked for it.

        `(None, …)`: ask again next step. vLLM may ask several times, and may not take what is
        promised: nothing happens before `allocated`.
        """
        state = self.state_of(request)
        if request.num_preemptions > 0 or state.loaded:
            state.promise = Promise(local, [])
            return 0, False  # a resumed request may hold edited rows of its own: compute the rest
        if not self.may_start(request):
            return None, False
        if not self.places_runs:
            self.lookups.look_ahead([state], busy=True)  # nobody else does
        self.lookups.ask(state)
        self.lookups.collect(state, self.lookups.patience())
        if not state.settled:
            return None, False
        promise = self._promise(state, local)
        state.promise = promise._replace(parks=self._parks(state, promise))
        return promise.tokens, state.promise.parks

    def _promise(self, state: RequestState, local: int) -> Promise:
        if state.plan is None:
            return Promise(local, [])
        spans = clip_spans(state.plan.spans, local, state.length - 1)
        if not self.places_runs:
            spans = [span for span in spans if span.exact]
        if self.worth(state.plan, spans):
            return Promise(local, spans)
        return Promise(local, [], "engine_prefix" if self.places_runs else "plain_scheduler")

    def _parks(self, state: RequestState, promise: Promise) -> bool:
        """Whether the request waits for its rows or placeholders while others go on.

        With vLLM's own schedulers always: what they do about a failed load of a request that runs
        already is wrong in some of vLLM's runners (see `VirtualRows._handle_invalid_blocks`).
        """
        if not promise.spans or not self.places_runs:
            return bool(promise.spans)
        runs = gaps(promise.spans, promise.local, promise.spans[-1].stop)
        return bool(runs) and not state.reserved.holds(runs)

    def worth(self, plan: ReusePlan, spans: list[Span]) -> bool:
        """Whether what vLLM's own cache leaves of the plan still saves enough."""
        reused = sum(span.length for span in spans)
        return plan.saving_ms * reused >= self.config.min_saving_ms * plan.reused and reused > 0

    def _hide_hashes(self, request: Request, external: int) -> RequestState | None:
        """Before vLLM publishes blocks of a request that is about to load edited rows.

        Returns its state if there are such rows. What is hidden is shown again when vLLM has no
        room, or does not take the promise.
        """
        state = self._states.get(request.request_id)
        if state is None or state.plan is None or state.loaded or not external:
            return None
        spans = state.promise.spans
        edited = next((span.start for span in spans if not span.exact), None)
        if edited is None or request._block_hasher is None:
            return None
        first = edited // self._block
        made_of = clip_spans(spans, first * self._block, state.length)  # all before it is exact
        key = key_of(self._secret, state.namespace.digest, state.policy, state.plan, made_of)
        state.hide_hashes(key, first)
        return state

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """vLLM has taken (or, with 0, not taken) the promise and given the request its blocks."""
        state = self.state_of(request)
        if state.loaded:
            return
        state.local = state.promise.local
        if state.plan is None:
            self.lookups.count_cached(state)
            return
        if external <= 0:
            state.show_hashes()
            self.lookups.give_up(state, state.promise.reason or "not_taken")
            return
        stop = state.local + external
        state.loaded = clip_spans(state.promise.spans, state.local, stop)
        state.runs = gaps(state.loaded, state.local, stop)
        state.block_ids = blocks.get_block_ids()
        state.parked = bool(state.runs) and state.promise.parks
        self.orders.load(state, state.plan)
        self._count_reuse(state)
        if not self.places_runs:
            self.orders.finish_load(state.id)
        elif state.parked:
            self._parked[state.id] = state
        elif state.runs:
            self._ready.append(state)

    def _count_reuse(self, state: RequestState) -> None:
        """vLLM takes all that is promised for cached; placeholders are computed."""
        self._placeholders += sum(run.length for run in state.runs)
        stats = state.request.prefill_stats
        if stats is not None:
            stats.set(state.length, state.local, sum(span.length for span in state.loaded))

    # --- one step ----------------------------------------------------------------------------

    def build_metadata(self, output: SchedulerOutput) -> KVShareMetadata:
        """What the worker must do in this step; `KVShareScheduler` adds to it afterwards."""
        step = self.orders.build(output, self._states)
        step.model = self._namespace.model_digest
        return step

    def take_ready(self) -> list[RequestState]:
        """Requests admitted in this step whose runs all belong to it."""
        ready, self._ready = self._ready, []
        return ready

    def take_placeholders(self) -> int:
        """Tokens promised since the last call that are computed, not loaded."""
        placeholders, self._placeholders = self._placeholders, 0
        return placeholders

    @property
    def parked(self) -> list[RequestState]:
        """Requests that wait for their placeholder runs, in order of admission."""
        return list(self._parked.values())

    def unpark(self, state: RequestState) -> None:
        """Its last run is placed: vLLM may schedule the rest once this step is done."""
        self._parked.pop(state.id, None)
        state.parked = False

    # --- rows that are lost ------------------------------------------------------------------

    def worker_output(self, output: KVConnectorOutput) -> None:
        """A load failed: its request is computed in full, nothing of it stays published.

        A worker that serves nothing at all says so: later requests are not even looked up.
        """
        if isinstance(output.kv_connector_worker_meta, Unserved):
            self._unserved = output.kv_connector_worker_meta.reason
        invalid = self.orders.own(set(output.invalid_block_ids or ()))
        if not invalid:
            return
        wrong = self.orders.failed(invalid)
        for state in self._states.values():
            own = state.block_ids[0][state.local // self._block :] if state.loaded else ()
            if invalid.isdisjoint(own):
                continue
            state.start_over("load_failed")
            if state.parked:
                self.unpark(state)
                self.orders.finish_load(state.id)
        if self._manager is not None:
            self._manager.block_pool.evict_blocks(wrong)

    def restarted(self, request: Request) -> None:
        """Rows that a running request held did not load: it begins again and computes its own."""
        state = self._states.get(request.request_id)
        if state is not None:
            state.start_over("load_failed")
            state.restarts += 1

    def preempted(self, request: Request) -> None:
        """vLLM took its blocks: whatever it computes from now on is exact."""
        state = self._states.get(request.request_id)
        if state is None:
            return
        state.show_hashes()
        if state.loaded:
            state.start_over("preempted")
            state.cached_counted = True  # as reused, when its rows were loaded

    def holds_rows(self, request: Request) -> bool:
        """Whether a request that does not run holds blocks for rows that KVShare loads."""
        state = self._states.get(request.request_id)
        return state is not None and bool(state.block_ids)

    def released(self, request: Request) -> bool:
        """Such a request gave its blocks back: it begins again, with a new lookup.

        Returns whether the worker has been told to report its load, which then means nothing.
        """
        state = self._states[request.request_id]
        told = not state.parked and not self.orders.take_back(state.id)
        self.unpark(state)
        state.start_over()
        state.block_ids = ()
        state.ask_again()
        return told

    def reset(self) -> bool:
        """The weights may have changed: nothing stored so far is served by this engine again.

        Rows are stored under a new epoch of the namespace from now on. Plans are dropped. Requests
        that run go on, and are not stored. Returns False if a request waits for rows that are
        being loaded.
        """
        revision = f"{self._origin.revision}@{secrets.token_hex(8)}"
        self._namespace = msgspec.structs.replace(self._origin, revision=revision)
        for state in self._states.values():
            if not state.loaded and not state.request.num_preemptions:
                self.lookups.abandon(state, "reset")
            wall = state.namespace
            state.namespace = self._namespace.for_tenant(wall.tenant, wall.lora)
            state.saved = state.saved or state.request.num_computed_tokens > 0
        waiting = RequestStatus.WAITING_FOR_REMOTE_KVS
        return not any(s.loaded and s.request.status == waiting for s in self._states.values())
