"""Virtual rows: what the runner sees of them, and how many fit into a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvshare_connectors.vllm.metadata import KVShareMetadata
from kvshare_connectors.vllm.requests import RequestState
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorMetadata
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from kvshare_store.errors import InternalError
from kvshare_store.plan.spans import Run

_SAMPLES_NOTHING = SamplingParams(temperature=0, max_tokens=1)
_SCORES = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)


@dataclass
class Room:
    """What a step has left for runs of parked requests."""

    tokens: int
    rows: int
    adapters: set[int] = field(default_factory=set)
    """Ids of the adapters in the step."""

    @classmethod
    def left(
        cls, output: SchedulerOutput, requests: Mapping[str, Request], tokens: int, rows: int
    ) -> Room:
        """`rows`: free rows of the batch, not counting the virtual ones that this step has."""
        scheduled = [requests.get(name) for name in output.num_scheduled_tokens]
        loras = [request.lora_request for request in scheduled if request is not None]
        adapters = {lora.lora_int_id for lora in loras if lora is not None}
        return cls(tokens, rows - scheduled.count(None), adapters)

    def take(self, state: RequestState, most_adapters: int) -> Iterator[Run]:
        """Take the next runs off the request, as far as they fit; the last may be cut short."""
        lora = state.request.lora_request
        if lora is not None and len(self.adapters | {lora.lora_int_id}) > most_adapters:
            return
        while state.runs and self.tokens > 0 and self.rows > 0:
            run = state.runs.pop(0)
            part = Run(run.start, min(run.stop, run.start + self.tokens))
            if part.stop < run.stop:
                state.runs.insert(0, Run(part.stop, run.stop))
            if lora is not None:
                self.adapters.add(lora.lora_int_id)
            self.tokens, self.rows = self.tokens - part.length, self.rows - 1
            yield part


def add_row(output: SchedulerOutput, state: RequestState, run: Run) -> str:
    """Add a virtual request, which samples nothing and ends with the step. Returns its id.

    Its prompt continues past the run, so the runner takes it for an unfinished prefill. The prompt
    is the request's own list, so that all rows of a step pickle it once.
    """
    prompt = state.request.prompt_token_ids or []
    return _add(output, state.request, run, prompt, state.block_ids, _SAMPLES_NOTHING)


def add_scored_row(
    output: SchedulerOutput, look: Request, run: Run, block_ids: tuple[list[int], ...]
) -> str:
    """Add a virtual request that computes a run of a look again, and says how probable each token
    but the first is (`scoring.regrets_of`). Returns its id.

    Its prompt ends with the run, so the runner takes it for the end of a prefill and reports. What
    it writes is what the look has computed for these positions, or computes in this step.
    """
    prompt = (look.prompt_token_ids or [])[: run.stop]
    return _add(output, look, run, prompt, block_ids, _SCORES)


def _add(
    output: SchedulerOutput,
    request: Request,
    run: Run,
    prompt: list[int],
    block_ids: tuple[list[int], ...],
    sampling: SamplingParams,
) -> str:
    name = f"{request.request_id}/kvshare-{run.start}"
    output.scheduled_new_reqs.append(
        NewRequestData(
            req_id=name,
            prompt_token_ids=prompt,
            mm_features=[],
            sampling_params=sampling,
            pooling_params=None,
            block_ids=block_ids,
            num_computed_tokens=run.start,
            lora_request=request.lora_request,
            prefill_token_ids=prompt,
        )
    )
    output.num_scheduled_tokens[name] = run.length
    output.total_num_scheduled_tokens += run.length
    return name


def metadata_of(output: SchedulerOutput) -> KVShareMetadata:
    """KVShare's part of a step's metadata."""
    metadata = output.kv_connector_metadata
    parts = metadata.metadata if isinstance(metadata, MultiKVConnectorMetadata) else (metadata,)
    for part in parts:
        if isinstance(part, KVShareMetadata):
            return part
    raise InternalError("vLLM's step holds no orders of KVShare")
