"""The scheduler side of the connector: what becomes of each request.

A request's life: it arrives and its plan is asked for, vLLM is promised rows (`promises`), blocks
are allocated (`publishing`), rows are loaded and runs computed (`orders`, `runs`), it ends. Rows
may be lost at any time.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from kvshare_connectors.vllm.adapters import Adapters
from kvshare_connectors.vllm.answers import answer_of, log_line, show_log_lines
from kvshare_connectors.vllm.arrivals import Arrivals
from kvshare_connectors.vllm.idle import Unserved
from kvshare_connectors.vllm.looks import Looks
from kvshare_connectors.vllm.lookups import LOOK_AHEAD, Lookups
from kvshare_connectors.vllm.metadata import KVShareMetadata
from kvshare_connectors.vllm.metrics import Tally
from kvshare_connectors.vllm.orders import Orders
from kvshare_connectors.vllm.promises import promise_of
from kvshare_connectors.vllm.publishing import Publishing
from kvshare_connectors.vllm.requests import Promise, RequestState
from kvshare_connectors.vllm.runs import Runs
from vllm.v1.request import RequestStatus

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.link import Link
from kvshare_store.namespace import Namespace, Tenants
from kvshare_store.plan.spans import clip_spans, gaps

if TYPE_CHECKING:
    from kvshare_connectors.vllm.events import Announcer
    from kvshare_connectors.vllm.tracing import Trace
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class Planning:
    """One per engine; called only from the scheduler's thread."""

    def __init__(
        self,
        config: StoreConfig,
        namespace: Namespace,
        link: Link,
        block: int,
        tenants: Tenants | None = None,
        announcer: Announcer | None = None,
        pool: str = "",
    ) -> None:
        """`namespace`: of requests without tenant and adapter. `block`: tokens of a paged block.
        `announcer`: where vLLM publishes KV events. `pool`: see `Arrivals`."""
        self.config = config
        adapters = Adapters()
        self.states: dict[str, RequestState] = {}
        self._arrivals = Arrivals(config, adapters, tenants or Tenants(config), pool)
        self.tally = Tally()
        self.lookups = Lookups(config, link, self.tally)
        self.publishing = Publishing(self.states, block)
        self.announcer = announcer
        self.orders = Orders(config, adapters, block, announcer)
        self.runs = Runs()
        self.looks = Looks(config, link, self.tally) if config.second_look != "off" else None
        self.namespace = self._origin = namespace
        self.link = link
        self._block = block
        self._unserved = ""
        """Why the worker loads and stores nothing; empty if it does."""
        self.places_runs = False
        """Whether the scheduler computes placeholder runs; without it only prefixes are reused."""
        self.trace_of: Callable[[Request], Trace] | None = None
        """Begins the trace of a request."""
        self.may_start: Callable[[Request], bool] = lambda request: True
        """Asked before rows are promised: whether the scheduler has room for the request."""
        if config.log_requests:
            show_log_lines()

    def place_runs(self, may_start: Callable[[Request], bool], *, exact_only: bool) -> None:
        """The scheduler computes placeholder runs, so edited rows may be served."""
        self.places_runs = True
        self.may_start = may_start
        self.lookups.exact_only = exact_only

    def close(self) -> None:
        """Disconnect from the daemon, which stays."""
        if self.announcer is not None:
            self.announcer.close()
        self.link.close()

    # --- requests come and go ----------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """A new request: start its lookup while it waits, unless enough others hold plans."""
        state = self.state_of(request)
        holding = (other for other in self.states.values() if other.holds_plan)
        if len(list(itertools.islice(holding, LOOK_AHEAD))) < LOOK_AHEAD:
            self.lookups.ask_early(state)

    def find(self, request: Request) -> RequestState | None:
        """The state of a request, if KVShare has heard of it."""
        return self.states.get(request.request_id)

    def state_of(self, request: Request) -> RequestState:
        """The state of a request, created when it is first seen."""
        state = self.find(request)
        if state is None:
            state = self._arrivals.state_of(request, self.namespace, self._unserved)
            self.states[state.id] = state
            state.look = self.looks is not None and self.looks.made(request)
            if self.trace_of is not None and not state.look:
                state.trace = self.trace_of(request)
            self.link.working(True)
            if state.declined and not state.look:
                self.link.tell(_decline(state))
        return state

    def look_ahead(self, requests: Iterable[Request], *, busy: bool) -> list[RequestState]:
        """Look up the requests that this step may admit; returns their states in order."""
        return self.lookups.look_ahead(map(self.state_of, requests), busy=busy)

    def finished(self, request: Request, block_ids: Sequence[int] = ()) -> dict[str, Any] | None:
        """The request has ended or was aborted, and its paged blocks are free.

        Returns the report on reuse for its answer.
        """
        self.orders.ended(block_ids)
        state = self.states.pop(request.request_id, None)
        if state is None:
            return None
        self.link.working(bool(self.states))
        self.lookups.ended(state)
        self._stop_waiting(state)
        self.orders.answer(state, block_ids)
        answer = answer_of(state)
        self._first_token(state)
        computed = request.num_output_tokens > 0 or request.num_computed_tokens >= state.length
        if not state.look:
            self.tally.ended(answer, computed=computed)
            if self.config.log_requests:
                log_line(state, answer)
        if state.trace is not None:
            state.trace.end(answer)
        return answer

    def _stop_waiting(self, state: RequestState) -> None:
        """No more runs of a parked request are computed: let vLLM go on with it."""
        if state.parked:
            self.runs.unpark(state)
            self.orders.finish_load(state.id)

    # --- vLLM's questions --------------------------------------------------------------------

    def matched(self, request: Request, local: int) -> tuple[int | None, bool]:
        """How many tokens past `local` the plan covers, and whether the request is parked for it.

        `(None, …)`: ask again in the next step. vLLM may ask several times and may not take the
        promise, so nothing happens before `allocated`.
        """
        state = self.state_of(request)
        if request.num_preemptions > 0 or state.loaded:
            # vLLM's cache may hold rows of its generated tokens, too
            state.promise = Promise(min(local, state.length), [])
            return 0, False  # a resumed request may still hold edited rows: compute the rest
        if not self.may_start(request):
            return None, False
        if not self.places_runs:
            self.lookups.look_ahead([state], busy=True)  # vLLM's own scheduler does not
        self.lookups.ask(state)
        self.lookups.collect(state, self.lookups.patience())
        if not state.looked_up:
            return None, False
        least = self.config.min_saving_ms
        promise = promise_of(state, local, places_runs=self.places_runs, min_saving_ms=least)
        state.promise = promise
        return promise.tokens, promise.parks

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """vLLM has allocated the request's blocks and taken `external` tokens of the promise."""
        state = self.state_of(request)
        if state.loaded or state.resumed:
            return
        state.local = state.promise.local
        if state.plan is None:
            self.lookups.count_cached(state)
            return
        if external <= 0:
            self.lookups.give_up(state, state.promise.reason or "not_taken")
            return
        stop = state.local + external
        state.loaded = clip_spans(state.promise.spans, state.local, stop)
        state.runs = gaps(state.loaded, state.local, stop)
        state.block_ids = blocks.get_block_ids()
        state.parked = bool(state.runs) and state.promise.parks
        state.count_reuse()
        state.taken_at = time.monotonic()
        if state.trace is not None:
            plan, waited = state.plan, state.taken_at - state.planned_at
            said = {"saving_ms": plan.saving_ms, "assumed_speed": plan.assumed_speed}
            state.trace.part("plan", waited, **said)
        self.orders.load(state, state.plan)
        if self.places_runs:
            self.runs.add(state)
        else:
            self.orders.finish_load(state.id)

    def build_metadata(self, output: SchedulerOutput) -> KVShareMetadata:
        """What the worker must do in this step; `KVShareScheduler` adds to it afterwards."""
        for state in self.states.values():
            self._first_token(state)
        step = self.orders.build(output, self.states)
        step.model, step.wiped = self.namespace.model_digest, self.lookups.wiped
        return step

    def _first_token(self, state: RequestState) -> None:
        """The first token says that the whole prompt is computed: report how long that took."""
        if not state.taken_at or not state.request.num_output_tokens:
            return
        took, state.taken_at = time.monotonic() - state.taken_at, 0.0
        if not state.look:
            self.link.tell(protocol.Prefilled(state.label, took))
        if state.trace is not None:
            left = sum(run.length for run in gaps(state.loaded, state.local, state.length))
            state.trace.part("partial_prefill", took, recomputed=left)

    # --- rows that are lost ------------------------------------------------------------------

    def worker_output(self, output: KVConnectorOutput) -> None:
        """Requests whose load failed are computed in full and lose their published blocks.

        If a worker cannot serve at all, later requests are declined without a lookup.
        """
        if isinstance(output.kv_connector_worker_meta, Unserved):
            self._unserved = output.kv_connector_worker_meta.reason
        invalid = self.orders.own(set(output.invalid_block_ids or ()))
        if not invalid:
            return
        wrong = self.orders.failed(invalid)
        for state in self.states.values():
            own = state.block_ids[0][state.local // self._block :] if state.loaded else ()
            if not invalid.isdisjoint(own):
                state.start_over("load_failed")
                self._stop_waiting(state)
        self.publishing.withdraw(wrong)

    def released(self, state: RequestState) -> bool:
        """A request that held blocks without running has lost them: it starts over.

        Returns whether the worker will still report its load, a report to be ignored.
        """
        told = not state.parked and not self.orders.take_back(state.id)
        self.runs.unpark(state)
        state.start_over()
        state.block_ids = ()
        state.ask_again()
        return told

    def reset(self) -> bool:
        """The weights may have changed: this engine never again serves what was stored so far.

        From now on rows are stored under a new epoch of the namespace. Plans are dropped. Running
        requests go on and are not stored. Returns False if a request waits for a load.
        """
        revision = f"{self._origin.revision}@{secrets.token_hex(8)}"
        self.namespace = msgspec.structs.replace(self._origin, revision=revision)
        self.orders.forget_answers()
        if self.announcer is not None:
            self.announcer.forget()
        for state in self.states.values():
            if not state.loaded and not state.request.num_preemptions:
                self.lookups.abandon(state, "reset")
            state.namespace = msgspec.structs.replace(state.namespace, revision=revision)
            state.saved = state.saved or state.request.num_computed_tokens > 0
            state.kept = None
        waiting = RequestStatus.WAITING_FOR_REMOTE_KVS
        return not any(s.loaded and s.request.status == waiting for s in self.states.values())


def _decline(state: RequestState) -> protocol.Decline:
    """What the daemon hears of a request that the engine declines itself."""
    known = state.proven and not state.namespace.too_long
    namespace = state.namespace if known else None
    return protocol.Decline(state.declined, state.length, state.label, namespace)
