"""Partial prefill by virtual requests.

A placeholder run becomes one more row of the step's batch: the request's own block table, computed
tokens = run start, scheduled tokens = run length. The stock runner sees ordinary chunked prefill,
and because every layer writes the K and V of all rows before it attends, later runs see the fresh
rows of earlier ones: exact causal attention with stock kernels.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvshare_connectors.vllm.beside import check_failure_policy, keeps_rows_by_tokens, ours
from kvshare_connectors.vllm.lookups import LOOK_AHEAD
from kvshare_connectors.vllm.metadata import KVShareMetadata
from kvshare_connectors.vllm.orders import from_first
from kvshare_connectors.vllm.placing import Room, add_row, metadata_of
from kvshare_connectors.vllm.planning import Planning
from kvshare_connectors.vllm.requests import Reserved
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object

_MEASURED_PREFILL = 128


class VirtualRows(_Base):
    """Mixin over a vLLM scheduler; without a KVShare connector it changes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._meaningless_reports: Counter[str] = Counter()
        """Loads that the worker will report as finished, of requests that were released."""
        planning = self._planning()
        if planning is not None:
            check_failure_policy(planning, recompute=self.recompute_kv_load_failures)
            planning.place_runs(self._adapter_fits, exact_only=keeps_rows_by_tokens(self.connector))

    def _planning(self) -> Planning | None:
        connector = ours(self.connector)
        return connector.planning if connector is not None else None

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        planning = self._planning()
        if planning is None or self.pause_state == PauseState.PAUSED_ALL:
            return super().schedule(*args, **kwargs)
        tokens, rows = self._reserve(planning)
        active = self.max_num_active_reqs
        self.max_num_scheduled_tokens -= tokens
        self.max_num_active_reqs = min(active, self.max_num_running_reqs - rows)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens += tokens
            self.max_num_active_reqs = active
        self._place_runs(planning, output)
        self._uncount(planning.take_placeholders())
        return output

    # --- before the step ---------------------------------------------------------------------

    def _free_rows(self) -> int:
        """Rows of the batch that no request has; one that vLLM does not schedule keeps its own."""
        taken = len(self.running) + self.num_waiting_for_streaming_input
        return self.max_num_running_reqs - taken

    def _reserve(self, planning: Planning) -> tuple[int, int]:
        """Tokens and rows of the batch to keep free for placeholder runs.

        Decides who computes all of them in this step. Running requests come first. What is set
        aside for a request that is then not admitted is lost for this step only. A request gets
        what its plan needs as far as it is known here: one whose plan comes later is parked.
        """
        total = self.max_num_scheduled_tokens
        free = total - sum(self._need(request) for request in self.running)
        rows = self._free_rows()
        parked = [run.length for state in planning.parked for run in state.runs]
        # at least half the step goes to requests already parked, and new ones leave them their
        # rows, or they might wait for ever
        reserved = min(sum(parked), max(free, total // 2) - 1) if parked and rows > 0 else 0
        reserved_rows = min(len(parked), max(rows, 0))
        free, rows = free - reserved, rows - reserved_rows
        busy = bool(self.running) or bool(parked)
        for state in planning.look_ahead(self._fresh_heads(), busy=busy):
            runs = state.plan.placeholders() if state.plan is not None else []
            placeholders = sum(run.length for run in runs)
            tail = state.length - (state.plan.stop if state.plan is not None else 0)
            rows -= 1
            fits = placeholders + tail <= free and len(runs) <= rows
            free -= tail
            if fits:
                state.reserved = Reserved(len(runs), placeholders)
                reserved, free = reserved + placeholders, free - placeholders
                reserved_rows, rows = reserved_rows + len(runs), rows - len(runs)
        return reserved, reserved_rows

    def _need(self, request: Request) -> int:
        known = request.num_tokens_with_spec + request.num_output_placeholders
        return int(known - request.num_computed_tokens)

    def _fresh_heads(self) -> list[Request]:
        """The first requests of the queue that this step may admit."""
        if self.pause_state != PauseState.UNPAUSED:
            return []
        return [r for r in itertools.islice(self._heads(), LOOK_AHEAD) if _is_fresh(r)]

    def _heads(self) -> Iterator[Request]:
        return iter(self.waiting)

    def _adapter_fits(self, request: Request) -> bool:
        """Whether the request's adapter has a place beside those of running requests, which vLLM
        counts, and of requests that hold rows without running, which have virtual rows."""
        if not self.lora_config or request.lora_request is None:
            return True
        held = {r.lora_request.lora_int_id for r in self._holders() if r.lora_request is not None}
        held.add(request.lora_request.lora_int_id)
        return len(held) <= self.lora_config.max_loras

    def _holders(self) -> Iterator[Request]:
        yield from self.running
        planning = self._planning()
        if planning is not None:
            yield from (r for r in self.kv_holding_waiting if planning.holds_rows(r))
            yield from (state.request for state in planning.parked)  # of this step

    # --- after it ----------------------------------------------------------------------------

    def _place_runs(self, planning: Planning, output: SchedulerOutput) -> None:
        metadata = metadata_of(output)
        prefill_only = not output.scheduled_cached_reqs.req_ids
        if prefill_only and output.total_num_scheduled_tokens >= _MEASURED_PREFILL:
            metadata.prefilled = output.total_num_scheduled_tokens
        before = output.total_num_scheduled_tokens
        for state in planning.take_ready():
            for run in state.runs:
                self.finished_req_ids.add(add_row(output, state, run))
            state.runs = []
        touched = {spec.request_id for spec in metadata.loads} | self._place_parked(
            planning, output, metadata
        )
        if metadata.loads:
            output.has_sync_kv_loads = True  # placed rows attend to what is loaded
        if output.total_num_scheduled_tokens > before:
            metadata.prefilled = 0
            if before == 0 and self.defer_block_free:
                self.sched_step_seq += 1
        self._fence(touched, empty=output.total_num_scheduled_tokens == 0)

    def _place_parked(
        self, planning: Planning, output: SchedulerOutput, metadata: KVShareMetadata
    ) -> set[str]:
        """Runs of parked requests go into what the step has left, in order; their ids."""
        adapters = self.lora_config.max_loras if self.lora_config else 0
        room = Room.left(output, self.requests, self._tokens_left(output), self._free_rows())
        placed = set()
        for state in planning.parked:
            for run in room.take(state, adapters):
                self.finished_req_ids.add(add_row(output, state, run))
                placed.add(state.id)
            if not state.runs:
                planning.unpark(state)
                metadata.finished_loads.append(state.id)
        return placed

    def _tokens_left(self, output: SchedulerOutput) -> int:
        return self.max_num_scheduled_tokens - output.total_num_scheduled_tokens

    def _fence(self, touched: set[str], *, empty: bool) -> None:
        """Blocks that this step writes outside of vLLM's own rows are not free before its end.

        A step without tokens has no number; what comes after it has run it too.
        """
        if self.defer_block_free:
            for request_id in touched:
                self.requests[request_id].last_sched_seq = self.sched_step_seq + empty

    def _uncount(self, placeholders: int) -> None:
        """vLLM counts all that is promised as hits; placeholders are computed."""
        stats = self.connector_prefix_cache_stats
        connector = ours(self.connector)
        if stats is not None and connector is not None and placeholders:
            stats.hits -= placeholders
            source = connector._cache_hit_source
            stats.hits_by_source[source] = stats.hits_by_source.get(source, 0) - placeholders

    # --- requests that lose their rows -------------------------------------------------------

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        planning = self._planning()
        if planning is not None:
            planning.preempted(request)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        planning = self._planning()
        if planning is not None and reset_running_requests:
            self._release_waiting(planning)
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def reset_connector_cache(self) -> bool:
        planning = self._planning()
        if planning is not None:
            self._release_waiting(planning)  # what they hold is stale too
        return super().reset_connector_cache()

    def _release_waiting(self, planning: Planning) -> None:
        """Requests that hold rows of KVShare without running give them back and begin again."""
        held = [r for r in self.kv_holding_waiting if planning.holds_rows(r)]
        self.kv_holding_waiting.remove_requests(held)
        self.deferred_waiting.difference_update(held)
        for request in reversed(held):  # each goes to the head of the queue
            name = request.request_id
            waiting = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            reported = not waiting or name in self.finished_recving_kv_req_ids
            if planning.released(request) and not reported:
                self._meaningless_reports[name] += 1
            self.finished_recving_kv_req_ids.discard(name)
            self.failed_recving_kv_req_ids.discard(name)
            self._inflight_prefills.discard(request)
            self._set_kv_fetch_stage(request, None)
            self._free_request_blocks(request)
            request.status = RequestStatus.WAITING
            request.num_computed_tokens = 0
            self.waiting.prepend_request(request)

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
        """Preempt running requests that hold such blocks: they begin again, computed in full.

        vLLM's own way is to go on from the first such block. What an asynchronous scheduler has
        scheduled ahead then stays in its counts, and the step that follows reads tokens that do
        not exist (vllm-project/vllm#45138, #49250). Preemption undoes all of it. Only KVShare may
        do so: after a failure it promises nothing again, which another connector would.
        """
        planning = self._planning()
        own = planning.orders.own(invalid_block_ids) if planning is not None else set()
        if planning is None or not own:
            return super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        held = [request for request in self.running if self._forget(request, own)]
        for request in reversed(held):  # each goes to the head of the queue
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            planning.restarted(request)
        parked = super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        return parked | {request.request_id for request in held}

    def _forget(self, request: Request, invalid: set[int]) -> bool:
        """Whether a request holds such a block. If so, that block and all that was computed after
        it leave the prefix cache."""
        (block_ids,) = self.kv_cache_manager.get_block_ids(request.request_id)
        wrong = set(from_first(block_ids, invalid))
        self.kv_cache_manager.evict_blocks(wrong)
        return bool(wrong)


def _is_fresh(request: Request) -> bool:
    return request.num_computed_tokens == 0 and request.status == RequestStatus.WAITING


class KVShareScheduler(VirtualRows, Scheduler):
    """vLLM's scheduler with partial prefill."""


class KVShareAsyncScheduler(VirtualRows, AsyncScheduler):
    """vLLM's asynchronous scheduler (the default on GPU) with partial prefill."""
