"""Partial prefill by virtual requests.

A placeholder run becomes one more row of the step's batch: the request's own block table, computed
tokens = run start, scheduled tokens = run length. The stock runner sees ordinary chunked prefill,
and because every layer writes the K and V of all rows before it attends, later runs see the fresh
rows of earlier ones: exact causal attention with stock kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from kvshare_connectors.vllm.beside import check_failure_policy, keeps_rows_by_tokens, ours
from kvshare_connectors.vllm.looking import Looking
from kvshare_connectors.vllm.lookups import LOOK_AHEAD
from kvshare_connectors.vllm.metadata import KVShareMetadata
from kvshare_connectors.vllm.placing import Room, add_row, metadata_of
from kvshare_connectors.vllm.planning import Planning
from kvshare_connectors.vllm.recovery import Recovery
from kvshare_connectors.vllm.requests import Reserved
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

_MEASURED_PREFILL = 128


class VirtualRows(Recovery):
    """Mixin over a vLLM scheduler; without a KVShare connector it changes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        planning = self._planning()
        if planning is not None:
            check_failure_policy(planning, recompute=self.recompute_kv_load_failures)
            planning.place_runs(self._adapter_fits, exact_only=keeps_rows_by_tokens(self.connector))

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
        self._uncount(planning.runs.take_placeholders())
        return output

    # --- before the step ---------------------------------------------------------------------

    def _reserve(self, planning: Planning) -> tuple[int, int]:
        """Tokens and rows of the batch to keep free for placeholder runs.

        Decides which requests compute all their runs in this step. Running requests come first. A
        request whose plan is not there yet gets nothing and is parked. What is set aside for a
        request that vLLM then does not admit is lost for this step only.
        """
        total = self.max_num_scheduled_tokens
        free = total - sum(self._need(request) for request in self.running)
        rows = self._free_rows()
        parked = [run.length for state in planning.runs.parked for run in state.runs]
        # requests already parked get up to half the step, and their rows: else they might wait
        # for ever
        reserved = min(sum(parked), max(free, total // 2) - 1) if parked and rows > 0 else 0
        reserved_rows = min(len(parked), max(rows, 0))
        free, rows = free - reserved, rows - reserved_rows
        busy = self._hurries or bool(self.running) or bool(parked)
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

    def _fresh_heads(self) -> list[Request]:
        """The first requests of the queue that this step may admit."""
        if self.pause_state != PauseState.UNPAUSED:
            return []
        return [r for r in itertools.islice(self._heads(), LOOK_AHEAD) if _is_fresh(r)]

    def _heads(self) -> Iterator[Request]:
        return iter(self.waiting)

    def _adapter_fits(self, request: Request) -> bool:
        """Whether the request's adapter fits beside those in use.

        vLLM counts running requests only. Requests that hold rows without running count too: they
        have virtual rows.
        """
        if not self.lora_config or request.lora_request is None:
            return True
        held = {r.lora_request.lora_int_id for r in self._holders() if r.lora_request is not None}
        held.add(request.lora_request.lora_int_id)
        return len(held) <= self.lora_config.max_loras

    def _holders(self) -> Iterator[Request]:
        yield from self.running
        planning = self._planning()
        if planning is not None:
            yield from (state.request for state in self._held(planning))
            yield from (state.request for state in planning.runs.parked)  # of this step

    # --- after it ----------------------------------------------------------------------------

    def _place_runs(self, planning: Planning, output: SchedulerOutput) -> None:
        metadata = metadata_of(output)
        prefill_only = not output.scheduled_cached_reqs.req_ids
        if prefill_only and output.total_num_scheduled_tokens >= _MEASURED_PREFILL:
            metadata.prefilled = output.total_num_scheduled_tokens
        before = output.total_num_scheduled_tokens
        for state in planning.runs.take_ready():
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
        """Fill the rest of the step with runs of parked requests, in order; returns their ids."""
        adapters = self.lora_config.max_loras if self.lora_config else 0
        room = Room.left(output, self.requests, self._tokens_left(output), self._free_rows())
        placed = set()
        for state in planning.runs.parked:
            for run in room.take(state, adapters):
                self.finished_req_ids.add(add_row(output, state, run))
                placed.add(state.id)
            if not state.runs:
                planning.runs.unpark(state)
                metadata.finished_loads.append(state.id)
        return placed

    def _tokens_left(self, output: SchedulerOutput) -> int:
        return self.max_num_scheduled_tokens - output.total_num_scheduled_tokens

    def _fence(self, touched: set[str], *, empty: bool) -> None:
        """Keep blocks that virtual rows and loads write allocated until this step has ended.

        A step without tokens has no number: it has ended once the next one has.
        """
        if self.defer_block_free:
            for request_id in touched:
                self.requests[request_id].last_sched_seq = self.sched_step_seq + empty

    def _uncount(self, placeholders: int) -> None:
        """Take placeholders out of vLLM's count of cache hits: they are computed."""
        stats = self.connector_prefix_cache_stats
        connector = ours(self.connector)
        if stats is not None and connector is not None and placeholders:
            stats.hits -= placeholders
            source = connector._cache_hit_source
            stats.hits_by_source[source] = stats.hits_by_source.get(source, 0) - placeholders


def _is_fresh(request: Request) -> bool:
    return request.num_computed_tokens == 0 and request.status == RequestStatus.WAITING


class KVShareScheduler(Looking, VirtualRows, Scheduler):
    """vLLM's scheduler with partial prefill and second looks."""


class KVShareAsyncScheduler(Looking, VirtualRows, AsyncScheduler):
    """vLLM's asynchronous scheduler (the default on GPU) with the same."""
