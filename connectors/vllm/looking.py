"""The second look in the scheduler: requests of its own, which nobody outside hears of.

They begin while there is no other request and end when one comes. docs/design/second_look.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvshare_connectors.vllm.beside import all_of
from kvshare_connectors.vllm.looks import Looks
from kvshare_connectors.vllm.placing import add_scored_row, metadata_of
from kvshare_connectors.vllm.recovery import Recovery
from kvshare_connectors.vllm.scoring import cannot_score
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

log = logging.getLogger("kvshare")

_COMPUTED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


class Looking(Recovery):
    """Mixin over a vLLM scheduler; it changes nothing unless `second_look` is on."""

    look: Request | None = None
    """The prompt that is computed in full."""
    _looks: Looks | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        planning = self._planning()
        if planning is None or planning.looks is None:
            return
        if reason := _cannot_look(self.vllm_config, alone=len(all_of(self.connector)) == 1):
            log.warning("kvshare: second_look is off here: %s", reason)
            return
        self._looks = planning.looks
        self._looks.scores = not cannot_score(self.vllm_config)
        if self.vllm_config.shutdown_timeout:
            self._looks.spell_s = self.vllm_config.shutdown_timeout / 2

    # --- steps -------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        looks = self._looks
        if looks is None:
            return super().schedule(*args, **kwargs)
        if self._taken(looks.share):
            self._drop()
            looks.disturbed()
        elif self.look is None:
            self._begin(looks)
        if self.look is None:
            return super().schedule(*args, **kwargs)
        return self._look_on(self.look, looks, *args, **kwargs)

    def _others(self) -> int:
        """Requests besides the look."""
        return len(self.requests) - (self.look is not None)

    def _taken(self, share: float) -> bool:
        """Whether the step belongs to requests alone: one waits, or one runs and no `share` of the
        tokens is for looks."""
        if self.pause_state != PauseState.UNPAUSED:
            return True
        _, waiting = self.get_request_counts()
        return waiting > 0 if share else self._others() > 0

    def _begin(self, looks: Looks) -> None:
        look = looks.next(idle=not self._others())
        if look is None:
            return
        if look.num_prompt_tokens >= self.max_model_len or not self._has_words(look):
            looks.ended("declined")
            return
        self.look = look
        super().add_request(look)

    def _has_words(self, look: Request) -> bool:
        """Whether the model has all of the prompt's tokens: vLLM's frontend, which refuses others,
        has not seen a look, and one that is out of range would end the engine."""
        tokens, words = look.prompt_token_ids or [], self.vllm_config.model_config.get_vocab_size()
        return bool(tokens) and 0 <= min(tokens) <= max(tokens) < words

    def _look_on(self, look: Request, looks: Looks, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """A step with some tokens of the look, not counted."""
        tokens, manager = self.max_num_scheduled_tokens, self.kv_cache_manager
        stats, counts = self.connector_prefix_cache_stats, manager.log_stats
        self.max_num_scheduled_tokens = self._budget(look, looks)
        self.connector_prefix_cache_stats, manager.log_stats = None, False
        self._hurries = True
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = tokens
            self.connector_prefix_cache_stats, manager.log_stats = stats, counts
            self._hurries = False
        metadata_of(output).prefilled = 0  # a short step does not say how fast prefill is
        if look.request_id in output.num_scheduled_tokens:
            looks.began()
        self._score(look, looks, output)
        planning = self._planning()
        state = planning.find(look) if planning is not None else None
        answered = state is None or state.looked_up
        if look.status != RequestStatus.RUNNING and answered:
            self._drop()  # vLLM has no blocks for it
            looks.rest()
        return output

    def _budget(self, look: Request, looks: Looks) -> int:
        """Tokens of a step: what others need, and few for the look, none while some are in flight.

        vLLM serves running requests in order, so the look goes behind the others.
        """
        total, others = self.max_num_scheduled_tokens, [r for r in self.running if r is not look]
        need = sum(self._need(request) for request in others)
        mine = self._most(look, looks)
        scored = looks.scored(mine - 1)
        if look not in self.running:
            mine -= scored.length if scored is not None else 0  # it may be short
        else:
            self.running = [*others, look]
            left = self._need(look)
            if scored is not None and mine - scored.length < left <= mine:
                mine = left - 1  # the last step scores the answer too
        return min(total, need + (0 if look.num_in_flight_tokens else mine))

    def _most(self, look: Request, looks: Looks) -> int:
        """Tokens that a look may have of a step."""
        alone = all(request is look for request in self.running)
        share = int(looks.share * self.max_num_scheduled_tokens)
        return looks.tokens if alone else min(looks.tokens, share)

    def _score(self, look: Request, looks: Looks, output: SchedulerOutput) -> None:
        """Beside the last tokens of a look, compute the first ones of its answer once more: the
        runner says how probable these are. Where the step has no room, the answer has no score."""
        mine = output.num_scheduled_tokens.get(look.request_id, 0)
        if not mine or look.num_computed_tokens < look.num_prompt_tokens:
            return
        room = self.max_num_scheduled_tokens - output.total_num_scheduled_tokens
        run = looks.scored(min(self._most(look, looks) - mine, room))
        virtual = sum(name not in self.requests for name in output.num_scheduled_tokens)
        if run is None or self._free_rows() <= virtual:
            return
        blocks = self.kv_cache_manager.get_block_ids(look.request_id)
        row = add_scored_row(output, look, run, blocks)
        self.finished_req_ids.add(row)
        looks.scoring(row, run.length - 1)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        look = self.look
        if self._looks is not None:
            self._looks.computed(model_runner_output)
            self._stepped(look, self._looks, scheduler_output.num_scheduled_tokens)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if look is not None:
            _hide(outputs, look.request_id)
        return outputs

    def _stepped(self, look: Request | None, looks: Looks, scheduled: dict[str, int]) -> None:
        """Learn from a step that was the look's alone how long its tokens take."""
        mine = scheduled.get(look.request_id, 0) if look is not None else 0
        if mine and sum(name in self.requests for name in scheduled) == 1:
            looks.stepped(mine)

    # --- requests come and go ----------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        self._drop()
        super().add_request(request)
        planning = self._planning()
        if self._looks is not None and planning is not None:
            self._looks.arrived(request, planning.find(request))

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        if request_ids is not None or self._looks is None:
            return super().finish_requests(request_ids, finished_status)
        self._drop()
        found = super().finish_requests(None, finished_status)
        self._looks.rest()
        return found

    def _drop(self) -> None:
        """End the look as it is: its blocks are free, and nothing of it is stored."""
        if self.look is not None:
            super().finish_requests(self.look.request_id, RequestStatus.FINISHED_ABORTED)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        planning, looks = self._planning(), self._looks
        if looks is None or planning is None:
            return super()._free_request(request, *args, **kwargs)
        if request is not self.look:
            looks.served(planning.find(request))
            return super()._free_request(request, *args, **kwargs)
        self.look = None
        found = super()._free_request(request, *args, **kwargs)
        if self.finished_req_ids_dict is not None:  # what frontends are told
            told = self.finished_req_ids_dict[request.client_index]
            told.discard(request.request_id)
            if not told:
                del self.finished_req_ids_dict[request.client_index]
        looks.ended("computed" if request.status in _COMPUTED else "dropped")
        return found

    # --- what vLLM asks and says -------------------------------------------------------------

    def has_requests(self) -> bool:
        looks = self._looks
        quiet = self.pause_state == PauseState.UNPAUSED and not self._others()
        return (looks is not None and looks.curious and quiet) or super().has_requests()

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()
        if self.look is None:
            return running, waiting
        runs = self.look.status == RequestStatus.RUNNING
        return running - runs, waiting - (not runs)

    def set_pause_state(self, pause_state: PauseState) -> None:
        if pause_state != PauseState.UNPAUSED:
            self._drop()
        super().set_pause_state(pause_state)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        self._drop()
        return super().reset_prefix_cache(*args, **kwargs)

    def reset_connector_cache(self) -> bool:
        self._drop()
        if self._looks is not None:
            self._looks.forget()
        return super().reset_connector_cache()


def _cannot_look(config: VllmConfig, *, alone: bool) -> str:
    """Why an engine makes no second looks; empty if it may.

    `alone`: KVShare is its only connector.
    """
    if not alone:
        return "other connectors would take the prompts for requests"
    if config.parallel_config.data_parallel_size > 1:
        return "with data parallelism all ranks would step for it"
    if config.speculative_config is not None:
        return "not with speculative decoding"
    if not config.scheduler_config.enable_chunked_prefill:
        return "it needs chunked prefill"
    return ""


def _hide(outputs: dict[int, EngineCoreOutputs], name: str) -> None:
    """Take all that is said of one request out of what frontends get."""
    for client, said in list(outputs.items()):
        kept = [output for output in said.outputs if output.request_id != name]
        if len(kept) < len(said.outputs):
            said.outputs[:] = kept
            if not kept and said.scheduler_stats is None and not said.finished_requests:
                del outputs[client]
