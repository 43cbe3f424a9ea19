"""The second look: what an idle engine asks its daemon for (docs/design/second_look.md)."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from kvshare_connectors.vllm.metrics import Tally
from kvshare_connectors.vllm.requests import POLICY, RequestState
from kvshare_connectors.vllm.scoring import regrets_of
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvshare_store.bounded import Latest
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.link import Link
from kvshare_store.errors import DeadlineError
from kvshare_store.plan.spans import Run
from kvshare_store.save.second_looks import End, Look

if TYPE_CHECKING:
    from kvshare_connectors.vllm.types import BlockHasher
    from vllm.v1.outputs import ModelRunnerOutput

_PAUSES_S = (0.2, 0.1, 0.2, 0.4, 0.8, 1.6)
"""After the last request an engine asks after the first of these, then again after each."""
_TICK_S = 0.005
"""The longest wait of a step: a request that arrives meanwhile waits for it."""
_ANSWER_S = 5.0
_STEP_S, _LEAST, _PART = 0.05, 32, 0.15
"""What a step of a look may take, since a request that arrives waits for it: so many seconds, or
this part of the time since the last request, since small steps compute half as fast as large ones.
But it has so many tokens, however slow the machine."""
_LAST = 1 << 30
"""vLLM preempts requests with the largest number first."""
_NAMESPACES = 64


class Looks:
    """One per engine; called only from the scheduler's thread."""

    def __init__(self, config: StoreConfig, link: Link, tally: Tally) -> None:
        self._most = config.second_look_tokens
        self.tokens = self._most
        """Of a step: fewer than the operator allows where these would take longer than a step
        may."""
        self.share = config.second_look if isinstance(config.second_look, float) else 0.0
        """Of a step's tokens, beside requests that run; 0: only while there are none."""
        self.spell_s = float("inf")
        """The engine begins no look that long after its last request."""
        self.scores = True
        """Whether the runner can say how probable tokens are."""
        self.curious = False
        """Whether there may be a prompt to look at, so that an idle engine goes on making steps."""
        self._link = link
        self._tally = tally
        self._salts: Latest[str, str | None] = Latest(_NAMESPACES)
        """`cache_salt` by digest, of the namespaces of the engine's own requests."""
        self._hasher: BlockHasher | None = None
        self._client = 0
        self._quiet_from = self._ask_at = 0.0
        self._answers = 0
        """How many questions had no prompt for an answer since the last request."""
        self._edited = False
        """Edited rows were served lately: what was stored of them may be on its way."""
        self._asked: bytes | None = None
        self._asked_at = 0.0
        self._look: Look | None = None
        self._name, self._began = "", 0.0
        self._row, self._scored = "", 0
        """The virtual row that scores so many tokens of the answer, once a step has it."""
        self._regrets: tuple[float, ...] = ()

    # --- the engine's own requests -----------------------------------------------------------

    def arrived(self, request: Request, state: RequestState | None) -> None:
        """A request of somebody: learn for whom, and how, this engine can compute prompts."""
        self.disturbed()
        if state is None or state.declined or state.namespace.lora:
            return
        self._hasher, self._client = request._block_hasher, request.client_index
        self._salts[state.namespace.digest] = request.cache_salt

    def served(self, state: RequestState | None) -> None:
        """A request has ended: what was stored of it may be worth a look."""
        self.curious, self._answers = True, 0
        now = time.monotonic()
        if self._ask_at < now:
            self._ask_at = now + _PAUSES_S[0]
        if state is not None:
            self._edited |= any(not span.exact for span in state.reuse(state.loaded).spans)

    def disturbed(self) -> None:
        """The engine is not idle."""
        self._quiet_from = time.monotonic()
        self._ask_at = self._quiet_from + _PAUSES_S[0]
        self._answers, self.curious = 0, True

    def rest(self) -> None:
        """Ask no more until the next request."""
        self.curious = False

    def forget(self) -> None:
        """The weights may have changed: prompts of earlier namespaces can be computed no more."""
        self._salts.clear()

    # --- the daemon's prompts ----------------------------------------------------------------

    def next(self, *, idle: bool) -> Request | None:
        """A prompt to compute in full, as a request; None if there is none yet.

        An `idle` engine waits a few milliseconds for it, others do not.
        """
        tick = _TICK_S if idle else 0.0
        now = time.monotonic()
        if now - self._quiet_from > self.spell_s or not self._salts:
            self.rest()
        if not self.curious or (self._asked is None and not self._ask(now, tick)):
            return None
        look = self._take(tick)
        if look is None:
            return None
        self._look = look
        if look.namespace not in self._salts:
            self.ended("dropped")
            return None
        self._name = f"kvshare-look-{secrets.token_hex(8)}"
        return self._request(look)

    def _request(self, look: Look) -> Request:
        """A control is computed anew from its first token; other looks begin with exact rows."""
        policy = "off" if look.control else "exact"
        return Request(
            request_id=self._name,
            prompt_token_ids=np.frombuffer(look.tokens, np.int32).tolist(),
            sampling_params=SamplingParams(
                max_tokens=1,
                temperature=0.0,
                extra_args={"kv_transfer_params": {POLICY: policy}},
                skip_reading_prefix_cache=look.control,
            ),
            pooling_params=None,
            client_index=self._client,
            cache_salt=self._salts[look.namespace],
            priority=_LAST,
            block_hasher=self._hasher,
        )

    def _ask(self, now: float, tick: float) -> bool:
        """Ask for a prompt if it is time; whether that was done."""
        if now < self._ask_at:
            time.sleep(min(tick, self._ask_at - now))
            return False
        self._asked, self._asked_at = self._link.question(self._question()), now
        if self._asked is None:
            self.rest()
        return self._asked is not None

    def _question(self) -> protocol.NextLook:
        return protocol.NextLook((*self._salts,), self.scores)

    def _take(self, tick: float) -> Look | None:
        """The daemon's answer, if it comes within `tick` seconds and names a prompt."""
        assert self._asked is not None
        try:
            reply = self._link.reply(self._asked, tick)
        except DeadlineError:
            if time.monotonic() - self._asked_at > _ANSWER_S:
                self._link.forget(self._asked)
                self._asked = None
                self.rest()
            return None
        self._asked = None
        if reply is None:
            self._none()
            return None
        return msgspec.convert(reply, Look)

    def _none(self) -> None:
        """There was no prompt. Where edited rows were served, one may be on its way."""
        self._answers += 1
        if self._edited and self._answers < len(_PAUSES_S):
            self._ask_at = time.monotonic() + _PAUSES_S[self._answers]
        else:
            self._edited = False
            self.rest()

    def made(self, request: Request) -> bool:
        """Whether this is the request that `next` made last."""
        return request.request_id == self._name

    # --- how good the answer was -------------------------------------------------------------

    def began(self) -> None:
        """A step with tokens of the look is on its way."""
        self._began = time.perf_counter()

    def stepped(self, tokens: int) -> None:
        """It is done, and had so many tokens of the look and none of anybody else."""
        if tokens >= _LEAST:  # of fewer the time says little
            seconds = max(1e-9, time.perf_counter() - self._began)
            may_take = max(_STEP_S, _PART * (time.monotonic() - self._quiet_from))
            self.tokens = min(self._most, max(_LEAST, int(tokens * may_take / seconds)))

    def scored(self, tokens: int) -> Run | None:
        """The positions to compute once more beside the look's last ones, at most `tokens`: one
        before the tokens that are scored, and these. None if nothing is scored."""
        look = self._look
        count = 0 if look is None or not self.scores else min(look.score, tokens - 1)
        if look is None or count < 1 or not 0 < look.answer <= len(look.tokens) // 4 - count:
            return None
        return Run(look.answer - 1, look.answer + count)

    def scoring(self, row: str, count: int) -> None:
        """A step has this virtual row, which scores so many tokens of the answer."""
        self._row, self._scored, self._regrets = row, count, ()

    def computed(self, output: ModelRunnerOutput) -> None:
        """A step has been computed: keep what it says of the answer, unless its rows are wrong."""
        said = output.prompt_logprobs_dict.get(self._row) if self._row else None
        if said is None:
            return
        loads = output.kv_connector_output
        if loads is None or not loads.invalid_block_ids:
            self._regrets = regrets_of(said, self._scored)

    def ended(self, end: End) -> None:
        """The look has ended: tell the daemon, and ask for the next one."""
        look, regrets = self._look, self._regrets if end == "computed" else ()
        self._look = None
        self.scoring("", 0)
        if look is not None and look.policy and regrets:
            self._tally.scored(look, regrets)
        if look is not None:
            self._link.tell(protocol.Looked(look.node, look.stamp, end, regrets))
