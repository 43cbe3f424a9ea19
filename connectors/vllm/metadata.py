"""What the scheduler side tells the worker side each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Run
from kvshare_store.save.staging import Reuse


@dataclass
class LoadSpec:
    """Rows to write into a request's paged blocks before this step's forward."""

    request_id: str
    plan: ReusePlan
    """Its spans are what vLLM's own prefix cache left of them."""
    block_ids: list[int]
    """The request's paged blocks."""
    start: int
    """First position that is loaded or computed; the blocks from here on are the request's own."""
    trace: dict[str, str] | None = None
    """Context of the request's span, where vLLM sends any."""

    @property
    def recomputed(self) -> int:
        """Positions of the prompt, from `start` on, that the engine computes."""
        return self.plan.tokens - self.start - self.plan.reused

    def own_blocks(self, block_size: int) -> list[int]:
        """The request's own blocks: those before come from vLLM's prefix cache."""
        return self.block_ids[self.start // block_size :]


@dataclass
class SaveSpec:
    """A prompt that is complete after this step's forward, or an answer that was before it."""

    request_id: str
    namespace: Namespace
    tokens: bytes
    """int32."""
    reuse: Reuse
    fresh: list[Run]
    """Positions whose rows the store does not have."""
    block_ids: list[int]
    extends: int = 0
    """Of an answer: leading tokens that are its prompt. 0: this is a prompt."""
    trace: dict[str, str] | None = None
    """As in `LoadSpec`."""
    greedy: bool = False
    """Of an answer: its request asked for the likeliest token at each step."""
    source: bytes = b""
    """Who sent the request, hashed."""


@dataclass
class KVShareMetadata(KVConnectorMetadata):
    """One step."""

    loads: list[LoadSpec] = field(default_factory=list)
    saves: list[SaveSpec] = field(default_factory=list)
    answers: list[SaveSpec] = field(default_factory=list)
    """Of requests that have ended. Their blocks may be given away in this step, so they are copied
    before it writes anything."""
    finished_loads: list[str] = field(default_factory=list)
    """Parked requests that need not wait any longer: their last run is in this step, or they were
    aborted."""
    handled: set[int] = field(default_factory=set)
    """Paged blocks whose failed load the scheduler has learned of since the last step. Until then
    an asynchronous scheduler, a step ahead, orders saves and loads that depend on these."""
    prefilled: int = 0
    """Prompt tokens computed by this step when it is a pure prefill of some length, else 0."""
    model: str = ""
    """`Namespace.model_digest` of what computed them."""
    wiped: str = ""
    """That of the newest plan (see `ReusePlan.wiped`)."""
