"""One request as the scheduler side knows it, and what it may ask of the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvshare_store.config import policy_names
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan, Run, Span

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass
class RequestState:
    """What the connector knows about one request between its arrival and its end."""

    request: Request
    namespace: Namespace
    declined: str = ""
    """Why the request is neither looked up nor stored."""
    asked: bytes | None = None
    asked_at: float = 0.0
    settled: bool = False
    """The lookup has ended, with a plan or without."""
    plan: ReusePlan | None = None
    """What may be loaded."""
    stored: ReusePlan | None = None
    """What says which rows the store has already, loaded or not."""
    planned_at: float = 0.0
    reserved: bool = False
    """Budget of this step is set aside for all placeholder runs."""
    local: int = 0
    """Tokens that vLLM's own prefix cache covers."""
    cached_counted: bool = False
    """The daemon knows of them."""
    loaded: list[Span] = field(default_factory=list)
    """Spans that were promised to vLLM and are loaded."""
    runs: list[Run] = field(default_factory=list)
    """Placeholder runs that no step has computed yet, ascending."""
    block_ids: tuple[list[int], ...] = ()
    """Paged blocks at admission; later ones may have come since."""
    exact_hasher: Any = None
    """vLLM's own block hasher, once the request's hashes were made private."""
    private_from: int | None = None
    """First block whose hash is private."""
    parked: bool = False
    saved: bool = False
    restarts: int = 0
    """How often it was preempted because rows that it held did not load."""

    @property
    def id(self) -> str:
        """vLLM's request id."""
        return self.request.request_id

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.request.num_prompt_tokens)


def decline_reason(request: Request, configured: str) -> str:
    """Why a request is served without the store, or the empty string."""
    sampling = request.sampling_params
    if request.mm_features or request.prompt_embeds is not None:
        return "multimodal"
    if sampling is None or not request.prompt_token_ids:
        return "pooling"
    if sampling.prompt_logprobs is not None:
        return "prompt_logprobs"
    if request.resumable:
        return "streaming_input"
    asked = asked_policy(request)
    if asked is not None and asked not in policy_names():
        return "unknown_policy"
    return "policy_off" if stricter(configured, asked) == "off" else ""


def stricter(configured: str, asked: str | None) -> str:
    """What to ask the daemon for, which another engine may have started with a laxer policy."""
    return configured if asked is None else min(configured, asked, key=policy_names().index)


def asked_policy(request: Request) -> str | None:
    """The one thing a client may steer: a stricter policy. All else in the field is ignored."""
    params: Any = request.kv_transfer_params
    asked = params.get("kvshare.policy") if isinstance(params, dict) else None
    return None if asked is None else str(asked)
