"""The worker's orders for each step, and the blocks that steps in flight load or wrote."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from kvshare_connectors.vllm.adapters import Adapters
from kvshare_connectors.vllm.metadata import KVShareMetadata, LoadSpec, SaveSpec
from kvshare_connectors.vllm.requests import Kept, RequestState
from kvshare_connectors.vllm.scoring import is_greedy
from vllm.v1.request import RequestStatus

from kvshare_store.config import StoreConfig
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Run, gaps
from kvshare_store.save.staging import Reuse, contexts_of_rows, without_scrap

if TYPE_CHECKING:
    from kvshare_connectors.vllm.events import Announcer
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_IN_FLIGHT = 2
"""Steps that vLLM may schedule before it learns which loads of the first one failed."""


class Orders:
    """One per engine; called only from the scheduler's thread."""

    def __init__(
        self,
        config: StoreConfig,
        adapters: Adapters,
        block: int,
        announcer: Announcer | None = None,
    ) -> None:
        """`block`: tokens of a paged block. `announcer`: where vLLM publishes KV events."""
        self.config = config
        self._announcer = announcer
        self._adapters = adapters
        self._block = block
        self._step = KVShareMetadata()
        self._ended: deque[list[Sequence[int]]] = deque([[]], _IN_FLIGHT)
        """Paged blocks of requests that ended since this step and the one before. They are
        published, and it is not known yet whether these steps computed them right."""
        self.loading: deque[set[int]] = deque(maxlen=_IN_FLIGHT)
        """Paged blocks that these steps load. Which loads fail is not known yet."""

    # --- the next step -----------------------------------------------------------------------

    def load(self, state: RequestState, plan: ReusePlan) -> None:
        """Order the promised rows to be written into the blocks that vLLM gave the request."""
        taken = msgspec.structs.replace(plan, spans=tuple(state.loaded))
        spec = LoadSpec(state.id, taken, state.block_ids[0], state.local, state.carrier)
        self._step.loads.append(spec)

    def finish_load(self, request_id: str) -> None:
        """Report to vLLM that the parked request may go on."""
        self._step.finished_loads.append(request_id)

    def take_back(self, request_id: str) -> bool:
        """Undo `finish_load`; False if the worker has been told already."""
        if request_id not in self._step.finished_loads:
            return False
        self._step.finished_loads.remove(request_id)
        return True

    def build(self, output: SchedulerOutput, states: Mapping[str, RequestState]) -> KVShareMetadata:
        """The orders of this step, with the saves of prompts that it completes."""
        step, self._step = self._step, KVShareMetadata()
        self._ended.append([])
        own = (spec.own_blocks(self._block) for spec in step.loads)
        self.loading.append({block for ids in own for block in ids})
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, before in computed.items():
            state = states.get(request_id)
            after = before + output.num_scheduled_tokens[request_id]
            if state is not None and after >= state.length and self._wanted(state):
                self.save(state, output, step)
        return step

    def _wanted(self, state: RequestState) -> bool:
        """Whether to store the rows of its prompt, which this step completes."""
        short = state.length < self.config.min_prompt_tokens
        return not state.saved and not short and self._sure(state)

    def _sure(self, state: RequestState) -> bool:
        """Whether its rows are known to be what the store would take them for."""
        if state.declined or state.request.num_preemptions > state.restarts:
            return False
        adapter = self._adapters.of(state.request.lora_request)
        # if its files have changed since, the rows may come from either version
        return not adapter.declined and adapter.identity == state.namespace.lora

    def save(self, state: RequestState, output: SchedulerOutput, step: KVShareMetadata) -> None:
        """Order the rows of a prompt that this step completes to be stored."""
        state.saved = True
        reuse = state.reuse(state.loaded)
        fresh = gaps(state.own(reuse.spans), 0, state.length)
        edited = any(span.edited for span in reuse.spans)
        if not edited and sum(run.length for run in fresh) <= 1:
            state.kept = _kept(reuse, fresh[0].start if fresh else state.length)
            if self._announcer is not None and _exact(reuse) and len(reuse.donors) == 1:
                self._announcer.found(state, state.kept.tokens, reuse.donors[0])
            return  # the very prompt is stored
        if state.stored is not None:
            reuse = without_scrap(reuse, [ref.rows for ref in state.stored.blocks])
            fresh = gaps(state.own(reuse.spans), 0, state.length)
        blocks = output.kv_connector_block_state
        if blocks is not None:
            state.kept = _kept(reuse, state.length)
            if self._announcer is not None and _exact(reuse):
                self._announcer.saving(state, state.length)
            (block_ids,) = blocks.resolve_block_ids(state.id)
            tokens = as_tokens(state.request.prompt_token_ids or ()).tobytes()
            step.saves.append(
                SaveSpec(
                    state.id,
                    state.namespace,
                    tokens,
                    reuse,
                    fresh,
                    list(block_ids),
                    trace=state.carrier,
                    source=state.source,
                )
            )

    # --- answers -----------------------------------------------------------------------------

    def answer(self, state: RequestState, block_ids: Sequence[int]) -> None:
        """Order the rows of the tokens that an ended request has generated to be stored.

        `block_ids`: its paged blocks, free from now on. A step that is in flight writes none of the
        rows that count here, and the next one copies them first.
        """
        kept = state.kept if self.config.store_answers else None
        if kept is None or not self._sure(state):
            return
        rows = self._rows(state.request, block_ids)
        if rows <= state.length:
            return
        spec = SaveSpec(
            state.id,
            state.namespace,
            as_tokens(state.request.all_token_ids[:rows]).tobytes(),
            kept.reuse,
            [Run(kept.tokens, rows)],
            list(block_ids),
            kept.tokens,
            state.carrier,
            is_greedy(state.request.sampling_params),
            state.source,
        )
        self._step.answers.append(spec)
        if self._announcer is not None and _exact(kept.reuse):
            self._announcer.saving(state, rows)

    def _rows(self, request: Request, block_ids: Sequence[int]) -> int:
        """How many tokens of an ended request have rows, or 0 if some of these are missing.

        The last token has none. What steps in flight compute does not count.
        """
        rows = int(request.num_tokens) - 1
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        missing = rows > min(computed, len(block_ids) * self._block)
        return 0 if missing or request.status == RequestStatus.FINISHED_ERROR else rows

    def forget_answers(self) -> None:
        """Store none that the next step would: what their blocks hold may be gone or stale."""
        self._step.answers.clear()

    # --- steps in flight ---------------------------------------------------------------------

    def ended(self, block_ids: Sequence[int]) -> None:
        """A request has given these paged blocks back."""
        self._ended[-1].append(block_ids)

    def own(self, invalid: set[int]) -> set[int]:
        """Those of the invalid paged blocks that KVShare loads, not another connector."""
        return invalid & set().union(*self.loading)

    def failed(self, invalid: set[int]) -> set[int]:
        """Loads into these blocks failed. Returns all blocks whose contents are wrong.

        Not those of running requests: the scheduler finds them.
        """
        self._step.handled |= invalid
        ended = (ids for step in self._ended for ids in step)
        return invalid.union(block for ids in ended for block in from_first(ids, invalid))


def _exact(reuse: Reuse) -> bool:
    """Whether all rows of a prompt that was computed with it are exact."""
    return not (reuse.generation or reuse.contexts or any(not s.exact for s in reuse.spans))


def _kept(reuse: Reuse, tokens: int) -> Kept:
    """The first `tokens` rows of a prompt that was computed with `reuse`."""
    contexts = contexts_of_rows(reuse, tokens)
    provenance = Reuse(donors=reuse.donors, generation=reuse.generation, contexts=contexts)
    return Kept(tokens, provenance)


def from_first(block_ids: Sequence[int], invalid: set[int]) -> Sequence[int]:
    """A request's paged blocks from the first one that is invalid; none if none is."""
    first = next((at for at, block in enumerate(block_ids) if block in invalid), len(block_ids))
    return block_ids[first:]
