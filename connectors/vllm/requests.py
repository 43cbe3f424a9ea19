"""One request as the scheduler side knows it, and what it may ask of the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from kvshare_connectors.vllm.private_hashes import PrivateHashes

from kvshare_store.config import policy_names
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan, Run, Span

if TYPE_CHECKING:
    from vllm.v1.request import Request

PREFIX = "kvshare."
POLICY = "kvshare.policy"
ANSWERED = frozenset(
    PREFIX + name
    for name in (
        "asked", "donor", "edited", "exact", "policy", "prefix_cached", "reason", "recomputed",
        "reused", "unknown",
    )
)  # fmt: skip
"""What an answer says. A client may send it back, as proxies do: only the policy is read."""


class Wish(NamedTuple):
    """What a client asked for in `kv_transfer_params`."""

    policy: str | None = None
    unknown: tuple[str, ...] = ()
    """Names that begin with `kvshare.` and mean nothing."""


class Reserved(NamedTuple):
    """What a step sets aside for the placeholder runs of one request, as its plan had them."""

    rows: int = 0
    tokens: int = 0

    def holds(self, runs: Sequence[Run]) -> bool:
        """Whether these runs fit into it."""
        return len(runs) <= self.rows and sum(run.length for run in runs) <= self.tokens


class Promise(NamedTuple):
    """What the last answer to vLLM promised; it holds once vLLM has allocated blocks for it."""

    local: int
    """Tokens that vLLM's own prefix cache covers."""
    spans: list[Span]
    """From there on, loaded if the promise is taken."""
    reason: str = ""
    """Why nothing is promised, if nothing is."""
    parks: bool = False
    """Whether vLLM was told that the request waits for it."""

    @property
    def tokens(self) -> int:
        """Positions from `local` to the end of the last span."""
        return self.spans[-1].stop - self.local if self.spans else 0


@dataclass
class RequestState:
    """What the connector knows about one request between its arrival and its end."""

    request: Request
    namespace: Namespace
    wish: Wish = field(default_factory=Wish)
    policy: str = "off"
    """The policy that it gets: the configured one, or a stricter one that it asked for."""
    declined: str = ""
    """Why the request is neither looked up nor stored."""
    reason: str = ""
    """Why nothing is reused, as far as that is known."""
    asked: bytes | None = None
    asked_at: float = 0.0
    early: bool = False
    """Asked for when the request arrived, and nobody has waited for the answer yet."""
    settled: bool = False
    """The lookup has ended, with a plan or without."""
    plan: ReusePlan | None = None
    """What may be loaded."""
    stored: ReusePlan | None = None
    """What says which rows the store has already, loaded or not."""
    planned_at: float = 0.0
    promise: Promise = field(default_factory=lambda: Promise(0, []))
    reserved: Reserved = field(default_factory=Reserved)
    """Of this step. Nothing while the plan is not there: it may come before vLLM asks for it."""
    local: int = 0
    """Tokens that vLLM's own prefix cache covered when the request was admitted."""
    cached_counted: bool = False
    """The daemon knows of them."""
    loaded: list[Span] = field(default_factory=list)
    """Spans that were promised to vLLM and are loaded."""
    runs: list[Run] = field(default_factory=list)
    """Placeholder runs that no step has computed yet, ascending."""
    block_ids: tuple[list[int], ...] = ()
    """Paged blocks at admission; later ones may have come since."""
    hashes: PrivateHashes | None = None
    """Its private block hashes, made when it was first about to hold edited rows."""
    parked: bool = False
    saved: bool = False
    """Its prompt is stored, or must not be."""
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

    @property
    def holds_plan(self) -> bool:
        """Its lookup runs, or its plan pins blocks in memory."""
        asking = self.asked is not None and not self.settled
        return asking or (self.plan is not None and not self.loaded)

    def start_over(self, reason: str = "") -> None:
        """Nothing of it is loaded any more: the engine computes the prompt in full."""
        self.plan, self.stored, self.saved = None, None, False
        self.loaded, self.runs = [], []
        self.promise = Promise(0, [])
        self.reason = reason
        self.show_hashes()

    def ask_again(self) -> None:
        """The next lookup is a new one."""
        self.asked, self.settled, self.stored, self.reason = None, bool(self.declined), None, ""
        self.cached_counted = False

    def hide_hashes(self, key: bytes, first: int) -> None:
        """It is about to hold edited rows, from block `first` on: nobody else's are like them."""
        if self.hashes is None or self.hashes.key != key:
            self.show_hashes()
            self.hashes = PrivateHashes(self.request, key, first)
        self.hashes.hide()

    def show_hashes(self) -> None:
        """It holds no edited rows (any more): its blocks are shared as vLLM shares them."""
        if self.hashes is not None:
            self.hashes.show()


def decline_reason(request: Request, wish: Wish, policy: str) -> str:
    """Why a request is served without the store, or the empty string."""
    sampling = request.sampling_params
    if request.mm_features or request.prompt_embeds is not None:
        return "multimodal"
    if sampling is None or not request.prompt_token_ids:
        return "pooling"
    if (
        sampling.prompt_logprobs is not None
        or getattr(sampling, "prompt_logprob_token_ids", None) is not None
    ):
        return "prompt_logprobs"
    if request.resumable:
        return "streaming_input"
    if wish.unknown:
        return "unknown_parameter"
    if wish.policy is not None and wish.policy not in policy_names():
        return "unknown_policy"
    return "policy_off" if policy == "off" else ""


def granted(configured: str, asked: str | None) -> str:
    """The stricter of the two policies; `off` for one that nobody knows.

    The daemon is asked for it by name: another engine may have started it with a laxer one.
    """
    if asked is None:
        return configured
    if asked not in policy_names():
        return "off"
    return min(configured, asked, key=policy_names().index)


def wish_of(request: Request) -> Wish:
    """What the client asks for. It may steer one thing, a stricter policy.

    What other connectors read is none of ours; a name that begins with `kvshare.` and means
    nothing is a mistake, and may be a mistyped policy.
    """
    params: Any = request.kv_transfer_params
    if not isinstance(params, dict):
        return Wish()
    ours = [name for name in params if isinstance(name, str) and name.startswith(PREFIX)]
    asked = params.get(POLICY)
    unknown = tuple(sorted(set(ours) - ANSWERED))
    return Wish(None if asked is None else str(asked), unknown)
