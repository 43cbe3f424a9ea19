"""The scheduler side: asks for plans, promises tokens, places placeholder runs, orders saves.

A plan is asked for when its request reaches the head of the queue. Edited KV never reaches vLLM's
prefix cache under an exact hash: the request's block hashes are made private from the first edited
position on, before vLLM can publish them.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import blake3
from kvshare_connectors.vllm.adapters import Adapters
from kvshare_connectors.vllm.metadata import KVShareMetadata, LoadSpec, SaveSpec
from kvshare_connectors.vllm.requests import (
    RequestState,
    asked_policy,
    decline_reason,
    stricter,
)

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.link import Link
from kvshare_store.errors import DeadlineError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome, ReusePlan, Span, clip_spans, gaps
from kvshare_store.staging import Reuse, reuse_of
from kvshare_store.tree.edits import as_tokens

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvshare")

_BUSY_WAIT_S = 0.005
"""How long a step with other work in it waits for plans; they are asked again in the next step."""


class Planning:
    """One per engine; called only from the scheduler's thread."""

    def __init__(self, config: StoreConfig, namespace: Namespace, link: Link, run: int) -> None:
        self.config = config
        self._namespace = namespace
        self._link = link
        self._hash_block = run
        self._adapters = Adapters()
        self._states: dict[str, RequestState] = {}
        self._ready: list[RequestState] = []
        """Admitted in this step, all runs to be computed in it."""
        self._parked: dict[str, RequestState] = {}
        self._step = KVShareMetadata()
        self._heads: list[RequestState] = []
        self._late: list[RequestState] = []
        """Requests that ended before their plan came."""
        self._ended: list[Sequence[int]] = []
        self._ended_before: list[Sequence[int]] = []
        """Paged blocks of requests that ended since this step was made, and since the one before:
        what these steps computed in them is published, and its worth not known yet."""
        self._wait_until = 0.0
        self._pool: BlockPool | None = None
        self._told_busy = False
        self.places_runs = False
        """Whether the scheduler computes placeholder runs; without it only prefixes are reused."""

    def bind_block_pool(self, pool: BlockPool) -> None:
        """vLLM's pool, for evicting blocks whose load failed."""
        self._pool = pool

    def close(self) -> None:
        """Let go of the daemon, which stays."""
        self._link.close()

    # --- lookup ------------------------------------------------------------------------------

    def state_of(self, request: Request) -> RequestState:
        """The state of a request, made at its first mention."""
        state = self._states.get(request.request_id)
        if state is None:
            adapter = self._adapters.of(request.lora_request)
            namespace = self._namespace.for_tenant(request.cache_salt or "", adapter.identity)
            declined = decline_reason(request, self.config.policy) or adapter.declined
            state = RequestState(request, namespace, declined=declined)
            self._states[request.request_id] = state
            self._tell_busy()
            if state.declined:
                state.settled = True
                self._link.tell(protocol.Decline(state.declined, state.length))
        return state

    def _tell_busy(self) -> None:
        """While there are requests the daemon does nothing that can wait."""
        busy = bool(self._states)
        if busy != self._told_busy and self._link.tell(protocol.Working(busy)):
            self._told_busy = busy

    def ask(self, state: RequestState) -> None:
        """Start the lookup, unless it was started or there is nothing to look up."""
        if state.settled or state.asked is not None:
            return
        tokens = as_tokens(state.request.prompt_token_ids or ())
        policy = stricter(self.config.policy, asked_policy(state.request))
        state.asked = self._link.ask(tokens, state.namespace, policy)
        state.asked_at = time.monotonic()
        state.settled = state.asked is None

    def collect(self, state: RequestState, seconds: float) -> None:
        """Take the answer if it comes within `seconds`; past the deadline the request is a miss."""
        if state.settled or state.asked is None:
            return
        left = state.asked_at + self.config.plan_deadline_ms / 1e3 - time.monotonic()
        try:
            plan = self._link.answer(state.asked, max(0.0, min(seconds, left)))
        except DeadlineError:
            if left <= seconds:
                self._link.give_up(state.asked)
                state.settled = True
            return
        state.settled = True
        state.planned_at = time.monotonic()
        if plan is not None and not plan.declined:
            state.plan = state.stored = plan

    def refresh(self, state: RequestState) -> None:
        """A plan that waited in the queue for half its lease is asked for again."""
        if (
            state.plan is not None
            and time.monotonic() - state.planned_at > self.config.lease_seconds / 2
        ):
            self._give_up(state, "queued_too_long")
            state.asked, state.settled, state.stored = None, False, None

    def look_ahead(self, requests: Iterable[Request], *, busy: bool) -> list[RequestState]:
        """Look up the requests that this step may admit; returns their states in order."""
        for state in self._heads:
            state.reserved = False
        self._heads = states = [self.state_of(request) for request in requests]
        for state in states:
            self.refresh(state)
            self.ask(state)
        patience = _BUSY_WAIT_S if busy else self.config.plan_deadline_ms / 1e3
        self._wait_until = time.monotonic() + patience
        for state in states:
            self.collect(state, self._patience())
        for state in self._late:
            self._let_go(state)
        self._late = [state for state in self._late if not state.settled]
        return states

    def _patience(self) -> float:
        """Seconds that this step may still wait for plans."""
        return max(0.0, self._wait_until - time.monotonic())

    # --- vLLM's questions --------------------------------------------------------------------

    def matched(self, request: Request, local: int) -> tuple[int | None, bool]:
        """How many tokens past `local` the plan covers, and whether the request is parked for it.

        `(None, …)`: ask again next step. Called possibly several times before allocation.
        """
        state = self.state_of(request)
        if request.num_preemptions > 0 or state.loaded:
            return 0, False  # a resumed request may hold edited rows of its own: compute the rest
        self.ask(state)
        patience = self._patience() if self.places_runs else self.config.plan_deadline_ms / 1e3
        self.collect(state, patience)
        if not state.settled:
            return None, False
        if state.plan is None:
            return 0, False
        state.local = local
        spans = clip_spans(state.plan.spans, local, state.length - 1)
        if not self.places_runs and spans and (runs := gaps(spans, local, spans[-1].stop)):
            spans = clip_spans(spans, local, runs[0].start)
        if not self._worth(state.plan, spans):
            self._give_up(state, "engine_prefix" if self.places_runs else "plain_scheduler")
            return 0, False
        self._make_private(state, spans)
        return spans[-1].stop - local, self._parks(state, spans)

    def _parks(self, state: RequestState, spans: list[Span]) -> bool:
        """Whether the request waits for its rows or placeholders while others go on.

        With vLLM's own schedulers always: what they do about a failed load of a request that runs
        already is wrong in some of vLLM's runners (see `VirtualRows._handle_invalid_blocks`).
        """
        if not self.places_runs:
            return True
        return bool(gaps(spans, state.local, spans[-1].stop)) and not state.reserved

    def _worth(self, plan: ReusePlan, spans: list[Span]) -> bool:
        """Whether what vLLM's own cache leaves of the plan still saves enough."""
        reused = sum(span.length for span in spans)
        return plan.saving_ms * reused >= self.config.min_saving_ms * plan.reused and reused > 0

    def _make_private(self, state: RequestState, spans: list[Span]) -> None:
        """Hash blocks from the first edited position on as nobody else's.

        vLLM publishes a request's blocks while it allocates them; a chain that goes on from a
        private hash is private to its end. vLLM asks at every step until it has room, so this
        must do nothing the second time.
        """
        request = state.request
        edited = next((span.start for span in spans if not span.exact), None)
        if edited is None or request._block_hasher is None:
            return
        first = edited // self._hash_block
        if state.private_from is not None and state.private_from <= first:
            return
        state.private_from = first
        state.exact_hasher = exact_hasher = state.exact_hasher or request._block_hasher
        secret = secrets.token_bytes(32)

        def hasher(hashed: Request) -> list[Any]:
            start = len(hashed.block_hashes)
            return [
                digest if start + index < first else blake3.blake3(secret + digest).digest()
                for index, digest in enumerate(exact_hasher(hashed))
            ]

        del request.block_hashes[first:]
        request._block_hasher = hasher
        request.update_block_hashes()

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """vLLM has taken (or, with 0, not taken) the promise and given the request its blocks."""
        state = self.state_of(request)
        if state.loaded or state.plan is None:
            return
        if external <= 0:
            self._give_up(state, "not_taken")
            return
        stop = state.local + external
        state.loaded = clip_spans(state.plan.spans, state.local, stop)
        state.runs = gaps(state.loaded, state.local, stop)
        state.block_ids = blocks.get_block_ids()
        state.parked = bool(state.runs) and not state.reserved
        self._step.loads.append(self._load_spec(state, state.plan))
        if not self.places_runs:
            self._step.finished_loads.append(state.id)
        elif state.parked:
            self._parked[state.id] = state
        elif state.runs:
            self._ready.append(state)

    def _load_spec(self, state: RequestState, plan: ReusePlan) -> LoadSpec:
        reused = sum(span.length for span in state.loaded)
        return LoadSpec(
            request_id=state.id,
            lease=plan.lease,
            arena=plan.arena,
            spans=state.loaded,
            blocks=plan.blocks,
            block_ids=state.block_ids[0],
            start=state.local,
            exact=sum(span.length for span in state.loaded if span.exact),
            recomputed=state.length - state.local - reused,
        )

    def _give_up(self, state: RequestState, reason: str) -> None:
        if state.plan is not None:
            outcome = Outcome(failed=reason, recomputed=state.length - state.local)
            self._link.tell(protocol.Finish(state.plan.lease, outcome))
        state.plan = None

    # --- one step ----------------------------------------------------------------------------

    def build_metadata(self, output: SchedulerOutput) -> KVShareMetadata:
        """What the worker must do in this step; `KVShareScheduler` adds to it afterwards."""
        step, self._step = self._step, KVShareMetadata()
        step.model = self._namespace.model_digest
        self._ended_before, self._ended = self._ended, []
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, before in computed.items():
            state = self._states.get(request_id)
            after = before + output.num_scheduled_tokens[request_id]
            if state is not None and after >= state.length:
                self._order_save(state, output, step)
        return step

    def _order_save(
        self, state: RequestState, output: SchedulerOutput, step: KVShareMetadata
    ) -> None:
        unwanted = state.declined or state.request.num_preemptions > state.restarts
        if state.saved or unwanted or state.length < self.config.min_prompt_tokens:
            return
        adapter = self._adapters.of(state.request.lora_request)
        if adapter.declined or adapter.identity != state.namespace.lora:
            return  # its files have changed since: the rows may be of either, or of both
        state.saved = True
        edited = [span for span in state.loaded if not span.exact]
        exact = [span for span in state.stored.spans if span.exact] if state.stored else []
        spans = [*exact, *edited]  # the exact prefix comes first
        fresh = gaps(spans, 0, state.length)
        if not edited and sum(run.length for run in fresh) <= 1:
            return  # the very prompt is stored
        block_ids = _block_ids(state, output)
        if block_ids:
            tokens = as_tokens(state.request.prompt_token_ids or ()).tobytes()
            reuse = reuse_of(state.stored, spans) if state.stored is not None else Reuse()
            step.saves.append(
                SaveSpec(state.id, state.namespace, tokens, reuse, fresh, list(block_ids[0]))
            )

    def take_ready(self) -> list[RequestState]:
        """Requests admitted in this step whose runs all belong to it."""
        ready, self._ready = self._ready, []
        return ready

    @property
    def parked(self) -> list[RequestState]:
        """Requests that wait for their placeholder runs, in order of admission."""
        return list(self._parked.values())

    def unpark(self, state: RequestState) -> None:
        """Its last run is placed: vLLM may schedule the rest once this step is done."""
        self._parked.pop(state.id, None)
        state.parked = False

    def worker_output(self, output: KVConnectorOutput) -> None:
        """A load failed: its request is computed in full, nothing of it stays published."""
        invalid = set(output.invalid_block_ids or ())
        if not invalid:
            return
        self._step.handled |= invalid
        for state in self._states.values():
            own = state.block_ids[0][state.local // self._hash_block :] if state.loaded else ()
            if invalid.isdisjoint(own):
                continue
            state.plan, state.stored, state.saved = None, None, False
            state.loaded, state.runs = [], []
            if state.parked:
                self.unpark(state)
                self._step.finished_loads.append(state.id)
        if self._pool is not None:
            ended = (*self._ended, *self._ended_before)
            built_on = (block for ids in ended for block in from_first(ids, invalid))
            self._pool.evict_blocks(invalid.union(built_on))

    def restarted(self, request: Request) -> None:
        """Rows that a running request held did not load: it begins again and computes its own."""
        state = self._states.get(request.request_id)
        if state is not None:
            state.plan, state.stored, state.saved = None, None, False
            state.loaded, state.runs = [], []
            state.restarts += 1

    def finished(self, request: Request, block_ids: Sequence[int] = ()) -> None:
        """The request has ended, well or not, and gives its paged blocks back."""
        self._ended.append(block_ids)
        state = self._states.pop(request.request_id, None)
        if state is None:
            return
        self._tell_busy()
        self._let_go(state, _BUSY_WAIT_S)
        if not state.settled and state.asked is not None:
            self._late.append(state)
        if state.parked:
            self.unpark(state)
            self._step.finished_loads.append(state.id)

    def _let_go(self, state: RequestState, seconds: float = 0.0) -> None:
        """The request has ended: a plan that it did not load holds blocks for nobody."""
        self.collect(state, seconds)
        if state.plan is not None and not state.loaded:
            self._give_up(state, "aborted")


def from_first(block_ids: Sequence[int], invalid: set[int]) -> Sequence[int]:
    """A request's paged blocks from the first one that is invalid; none if none is."""
    first = next((at for at, block in enumerate(block_ids) if block in invalid), len(block_ids))
    return block_ids[first:]


def _block_ids(state: RequestState, output: SchedulerOutput) -> tuple[list[int], ...]:
    """Paged blocks of a request as they are in this step."""
    blocks = output.kv_connector_block_state
    return () if blocks is None else tuple(blocks.resolve_block_ids(state.id))
