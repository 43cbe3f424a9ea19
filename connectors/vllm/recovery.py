"""Requests that lose the rows KVShare loaded: by preemption, by a reset, by a failed load."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvshare_connectors.vllm.beside import all_of, ours
from kvshare_connectors.vllm.orders import from_first
from kvshare_connectors.vllm.planning import Planning
from kvshare_connectors.vllm.requests import RequestState
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
else:
    Scheduler = object  # the subclasses name vLLM's scheduler as their last base


class Recovery(Scheduler):
    """Mixin over a vLLM scheduler; without a KVShare connector it changes nothing."""

    _hurries = False
    """No step waits for plans, although there is no other work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._meaningless_reports: Counter[str] = Counter()
        """Loads that the worker will report as finished, of requests that were released."""

    def _planning(self) -> Planning | None:
        connector = ours(self.connector)
        return connector.planning if connector is not None else None

    def _need(self, request: Request) -> int:
        """Tokens that the next step could compute of it. None where a step in flight computes its
        last one: vLLM schedules no more of it."""
        ahead, computed = request.num_output_placeholders, request.num_computed_tokens
        longest = request.num_prompt_tokens + request.max_tokens
        if ahead and computed + 2 - ahead >= longest:
            return 0
        return int(request.num_tokens_with_spec + ahead - computed)

    def _free_rows(self) -> int:
        """Free rows of the batch. A running request keeps its row even when not scheduled."""
        taken = len(self.running) + self.num_waiting_for_streaming_input
        return self.max_num_running_reqs - taken

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        planning = self._planning()
        state = planning.find(request) if planning is not None else None
        if state is not None:
            state.preempted()

    # --- resets of the prefix cache ------------------------------------------------------------

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        planning = self._planning()
        if planning is not None and reset_running_requests:
            self._release_waiting(planning)
        with self._freeing_at_once():
            done = super().reset_prefix_cache(reset_running_requests, reset_connector)
        if done and planning is not None and planning.announcer is not None:
            planning.announcer.forget()  # vLLM tells routers to forget every block of this engine
        return done

    @contextmanager
    def _freeing_at_once(self) -> Iterator[None]:
        """Blocks that steps in flight still write are free at once, as in an engine without a
        connector: else no reset would succeed while a step is in flight.

        vLLM defers that for connectors that load while steps run. KVShare loads at the beginning of
        a step, so whoever gets these blocks next is written behind the steps in flight.
        """
        deferring = self.defer_block_free
        if ours(self.connector) is not None and len(all_of(self.connector)) == 1:
            self.defer_block_free = False
            while self.deferred_frees:
                _, blocks = self.deferred_frees.popleft()
                self.kv_cache_manager.block_pool.free_blocks(reversed(blocks))
        try:
            yield
        finally:
            self.defer_block_free = deferring

    def reset_connector_cache(self) -> bool:
        planning = self._planning()
        if planning is not None:
            self._release_waiting(planning)  # their rows are stale too
        return super().reset_connector_cache()

    def _release_waiting(self, planning: Planning) -> None:
        """Free the blocks of requests that hold rows of KVShare without running.

        They start over.
        """
        states = self._held(planning)
        held = [state.request for state in states]
        self.kv_holding_waiting.remove_requests(held)
        self.deferred_waiting.difference_update(held)
        for state in reversed(states):  # each goes to the head of the queue
            request, name = state.request, state.id
            waiting = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            reported = not waiting or name in self.finished_recving_kv_req_ids
            if planning.released(state) and not reported:
                self._meaningless_reports[name] += 1
            self.finished_recving_kv_req_ids.discard(name)
            self.failed_recving_kv_req_ids.discard(name)
            self._inflight_prefills.discard(request)
            self._set_kv_fetch_stage(request, None)
            self._free_request_blocks(request)
            request.status = RequestStatus.WAITING
            request.num_computed_tokens = 0
            self.waiting.prepend_request(request)

    def _held(self, planning: Planning) -> list[RequestState]:
        """Requests that do not run and hold blocks for rows that KVShare loads."""
        found = map(planning.find, self.kv_holding_waiting)
        return [state for state in found if state is not None and state.block_ids]

    def _update_from_kv_xfer_finished(self, kv_connector_output: KVConnectorOutput) -> None:
        reported = kv_connector_output.finished_recving or set()
        meaningless = reported & self._meaningless_reports.keys()
        if meaningless:
            self._meaningless_reports -= Counter(meaningless)
            kv_connector_output.finished_recving = reported - meaningless
        super()._update_from_kv_xfer_finished(kv_connector_output)

    # --- loads that failed -------------------------------------------------------------------

    def _handle_invalid_blocks(
        self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]
    ) -> set[str]:
        """Preempt running requests that hold such blocks: they start over, computed in full.

        vLLM itself continues a request from its first invalid block. But tokens that an
        asynchronous scheduler has scheduled ahead stay counted, and the next step reads tokens that
        do not exist (vllm-project/vllm#45138, #49250). Preemption resets all of that. It is only
        right for KVShare's blocks: another connector would promise the same rows again.
        """
        planning = self._planning()
        own = planning.orders.own(invalid_block_ids) if planning is not None else set()
        if planning is None or not own:
            return super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        held = [request for request in self.running if self._unpublish(request, own)]
        for request in reversed(held):  # each goes to the head of the queue
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            state = planning.find(request)
            if state is not None:
                state.restarted()
        others = super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        self._begin_parked_again(planning)
        return others | {request.request_id for request in held}

    def _begin_parked_again(self, planning: Planning) -> None:
        """Let parked requests whose load failed give their blocks back and ask again, as vLLM does
        where it hears of no blocks (`_handle_failed_recving`).

        Else it would go on behind what its own cache has of the plan. That may be edited rows, and
        nobody would know any more what the rows behind them were computed from.
        """
        for name in self.failed_recving_kv_req_ids:
            state = planning.states.get(name)
            if state is not None and state.loaded:
                state.request.num_computed_tokens = 0

    def _unpublish(self, request: Request, invalid: set[int]) -> bool:
        """Remove the request's first invalid block and all after it from the prefix cache.

        Returns whether it holds one.
        """
        (block_ids,) = self.kv_cache_manager.get_block_ids(request.request_id)
        wrong = set(from_first(block_ids, invalid))
        self.kv_cache_manager.evict_blocks(wrong)
        return bool(wrong)
