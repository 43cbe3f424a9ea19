"""Partial prefill by virtual requests.

A placeholder run becomes one more row of the step's batch: the request's own block table, computed
tokens = run start, scheduled tokens = run length. The stock runner sees ordinary chunked prefill,
and because every layer writes the K and V of all rows before it attends, later runs see the fresh
rows of earlier ones: exact causal attention with stock kernels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvshare_connectors.vllm.connector import KVShareConnector
from kvshare_connectors.vllm.metadata import KVShareMetadata
from kvshare_connectors.vllm.planning import Planning, from_first
from kvshare_connectors.vllm.requests import RequestState
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from kvshare_store.plan import Run

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object

_LOOK_AHEAD = 8
_MEASURED_PREFILL = 128


class VirtualRows(_Base):
    """Mixin over a vLLM scheduler; without a KVShare connector it changes nothing."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        planning = self._planning()
        if planning is None:
            return super().schedule(*args, **kwargs)
        planning.places_runs = True
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
        return output

    def _planning(self) -> Planning | None:
        siblings = (
            self.connector.sub_connectors if isinstance(self.connector, MultiConnector) else ()
        )
        for connector in (self.connector, *siblings):
            if isinstance(connector, KVShareConnector):
                return connector.planning
        return None

    # --- before the step ---------------------------------------------------------------------

    def _reserve(self, planning: Planning) -> tuple[int, int]:
        """Tokens and rows of the batch to keep free for placeholder runs.

        Decides who computes all of them in this step. Running requests come first. What is set
        aside for a request that is then not admitted is lost for this step only.
        """
        total = self.max_num_scheduled_tokens
        free = total - sum(self._need(request) for request in self.running)
        rows = self.max_num_running_reqs - len(self.running)
        parked = [run.length for state in planning.parked for run in state.runs]
        # at least half the step goes to requests already parked, and new ones leave them their
        # rows, or they might wait for ever
        reserved = min(sum(parked), max(free, total // 2) - 1) if parked and rows else 0
        reserved_rows = min(len(parked), rows)
        free, rows = free - reserved, rows - reserved_rows
        heads = [r for r in itertools.islice(self._heads(), _LOOK_AHEAD) if _is_fresh(r)]
        busy = bool(self.running) or bool(parked)
        for state in planning.look_ahead(heads, busy=busy):
            runs = state.plan.placeholders() if state.plan is not None else []
            placeholders = sum(run.length for run in runs)
            tail = state.length - (state.plan.stop if state.plan is not None else 0)
            rows -= 1
            state.reserved = placeholders + tail <= free and len(runs) <= rows
            free -= tail
            if state.reserved:
                reserved, free = reserved + placeholders, free - placeholders
                reserved_rows, rows = reserved_rows + len(runs), rows - len(runs)
        return reserved, reserved_rows

    def _need(self, request: Request) -> int:
        known = request.num_tokens_with_spec + request.num_output_placeholders
        return int(known - request.num_computed_tokens)

    def _heads(self) -> Iterator[Request]:
        return iter(self.waiting)

    # --- after it ----------------------------------------------------------------------------

    def _place_runs(self, planning: Planning, output: SchedulerOutput) -> None:
        metadata = output.kv_connector_metadata
        if not isinstance(metadata, KVShareMetadata):
            metadata = next(m for m in metadata.metadata if isinstance(m, KVShareMetadata))  # type: ignore[union-attr]
        prefill_only = not output.scheduled_cached_reqs.req_ids
        if prefill_only and output.total_num_scheduled_tokens >= _MEASURED_PREFILL:
            metadata.prefilled = output.total_num_scheduled_tokens
        before = output.total_num_scheduled_tokens
        for state in planning.take_ready():
            for run in state.runs:
                self._add_row(output, state, run)
            state.runs = []
        for state in planning.parked:
            self._advance(planning, output, state)
        for state in [s for s in planning.parked if not s.runs]:
            planning.unpark(state)
            metadata.finished_loads.append(state.id)
        if metadata.loads:
            output.has_sync_kv_loads = True  # placed rows attend to what is loaded
        if output.total_num_scheduled_tokens > before:
            metadata.prefilled = 0
            if before == 0 and self.defer_block_free:
                self.sched_step_seq += 1

    def _advance(self, planning: Planning, output: SchedulerOutput, state: RequestState) -> None:
        """Place as many of a parked request's runs as fit what the step has left, in order."""
        left = self.max_num_scheduled_tokens - output.total_num_scheduled_tokens
        rows = self.max_num_running_reqs - max(len(self.running), len(output.num_scheduled_tokens))
        while state.runs and left > 0 and rows > 0:
            run = state.runs.pop(0)
            part = Run(run.start, min(run.stop, run.start + left))
            if part.stop < run.stop:
                state.runs.insert(0, Run(part.stop, run.stop))
            self._add_row(output, state, part)
            left, rows = left - part.length, rows - 1
        if self.defer_block_free:
            state.request.last_sched_seq = self.sched_step_seq + 1

    def _add_row(self, output: SchedulerOutput, state: RequestState, run: Run) -> None:
        """One virtual request: samples nothing, is forgotten at the start of the next step."""
        name = f"{state.id}/kvshare-{run.start}"
        # one token beyond the run: the runner then takes the row for an unfinished prefill
        prompt = list(state.request.prompt_token_ids or ())[: run.stop + 1]
        output.scheduled_new_reqs.append(
            NewRequestData(
                req_id=name,
                prompt_token_ids=prompt,
                mm_features=[],
                sampling_params=SamplingParams(temperature=0, max_tokens=1),
                pooling_params=None,
                block_ids=state.block_ids,
                num_computed_tokens=run.start,
                lora_request=state.request.lora_request,
                prefill_token_ids=prompt,
            )
        )
        output.num_scheduled_tokens[name] = run.length
        output.total_num_scheduled_tokens += run.length
        self.finished_req_ids.add(name)

    # --- loads that failed -------------------------------------------------------------------

    def _handle_invalid_blocks(
        self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]
    ) -> set[str]:
        """Preempt running requests that hold such blocks: they begin again, computed in full.

        vLLM's own way is to go on from the first such block. What an asynchronous scheduler has
        scheduled ahead then stays in its counts, and the step that follows reads tokens that do
        not exist (vllm-project/vllm#45138, #49250). Preemption undoes all of it.
        """
        planning = self._planning()
        if planning is None:
            return super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        held = [request for request in self.running if self._forget(request, invalid_block_ids)]
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
