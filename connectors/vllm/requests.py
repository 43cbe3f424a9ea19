"""The scheduler side's state of one request, and what its client asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from kvshare_connectors.vllm.private_hashes import PrivateHashes
from kvshare_connectors.vllm.settings import PREFIX

from kvshare_store.config import policy_names
from kvshare_store.namespace import Namespace
from kvshare_store.plan import LABEL_CHARS, ReusePlan
from kvshare_store.plan.spans import Run, Span, clip_spans
from kvshare_store.save.staging import Reuse, reuse_of

if TYPE_CHECKING:
    from kvshare_connectors.vllm.tracing import Trace
    from vllm.v1.request import Request

POLICY = "kvshare.policy"
POOLS = "kvshare.pools"
SOURCE = "kvshare.source"
ANSWERED = frozenset(
    PREFIX + name
    for name in (
        "asked", "continued", "donor", "edited", "exact", "generation", "policy", "prefix_cached",
        "quality_bound", "reason", "recomputed", "reused", "unknown",
    )
)  # fmt: skip
"""Fields of an answer. Proxies may send them back with a request: only the policy is read, and
`kvshare.pools` and `SOURCE`, which no answer has."""


class Wish(NamedTuple):
    """What a client asked for in `kv_transfer_params`."""

    policy: str | None = None
    source: str = ""
    """Who sends the request, as the gateway says."""
    unknown: tuple[str, ...] = ()
    """Parameters with the prefix `kvshare.` that do not exist, or whose value makes no sense."""
    pools: bool = True
    """Whether rows of pools may be used. Of which pools, a request cannot say."""


class Reserved(NamedTuple):
    """Batch rows and tokens that a step sets aside for the placeholder runs of one request."""

    rows: int = 0
    tokens: int = 0

    def holds(self, runs: Sequence[Run]) -> bool:
        """Whether these runs fit into it."""
        return len(runs) <= self.rows and sum(run.length for run in runs) <= self.tokens


class Promise(NamedTuple):
    """What vLLM was last promised for a request. It may ask again, or use none of it."""

    local: int
    """Tokens that vLLM's own prefix cache covers."""
    spans: list[Span]
    """Spans that are loaded behind them if vLLM uses the promise."""
    reason: str = ""
    """Why nothing is promised, if nothing is."""
    parks: bool = False
    """Whether the request is parked: it waits for its rows or placeholders while others
    continue."""

    @property
    def tokens(self) -> int:
        """Positions from `local` to the end of the last span."""
        return self.spans[-1].stop - self.local if self.spans else 0


class Kept(NamedTuple):
    """The part of a request's prompt that is stored, or is about to be."""

    tokens: int
    """Number of leading tokens whose rows are stored."""
    reuse: Reuse
    """Generation and contexts of these rows."""


@dataclass
class RequestState:
    """The connector's state of one request, from its arrival to its end."""

    request: Request
    namespace: Namespace
    wish: Wish = field(default_factory=Wish)
    policy: str = "off"
    """The policy for it: the configured one, or a stricter one that it asked for."""
    declined: str = ""
    """Why the request is neither looked up nor stored."""
    proven: bool = True
    """Its salt proves the tenant of `namespace`, or none has to be proven."""
    pools: tuple[str, ...] = ()
    """Whose rows its plan may use beside its namespace's."""
    source: bytes = b""
    """Who sends it, hashed."""
    reason: str = ""
    """Why nothing is reused, as far as that is known."""
    asked: bytes | None = None
    """Id of the lookup, once it has started."""
    asked_at: float = 0.0
    wanted_at: float = 0.0
    """When a step first waited for the lookup."""
    early: bool = False
    """The lookup started when the request arrived, and no step has waited for it yet."""
    looked_up: bool = False
    """The lookup has ended, with or without a plan."""
    plan: ReusePlan | None = None
    """The plan that may be loaded."""
    stored: ReusePlan | None = None
    """The same plan, kept after it was loaded or given up: it tells which rows are stored."""
    planned_at: float = 0.0
    taken_at: float = 0.0
    """When vLLM took its plan; 0 before, and once its first token is there."""
    promise: Promise = field(default_factory=lambda: Promise(0, []))
    reserved: Reserved = field(default_factory=Reserved)
    """What this step has set aside for it. Nothing if the plan was not there when the step
    began."""
    local: int = 0
    """Tokens that vLLM's own prefix cache covered when the request was admitted."""
    in_engine: int = 0
    """The same number if these are tokens of its plan, found under private hashes; else 0."""
    cached_counted: bool = False
    """Whether the daemon has been told of them."""
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
    """Its prompt is stored, or must not be stored."""
    kept: Kept | None = None
    """The stored prefix that its answer extends; None while the answer must not be stored."""
    resumed: bool = False
    """It was preempted, and had reused nothing: what vLLM's own cache has of it now it has computed
    itself."""
    restarts: int = 0
    """How often it was preempted because a load of its rows failed."""
    trace: Trace | None = None
    """Its trace spans, if vLLM exports traces."""
    look: bool = False
    """It is nobody's request but a second look: not counted, logged or traced."""

    @property
    def id(self) -> str:
        """vLLM's request id."""
        return self.request.request_id

    @property
    def label(self) -> str:
        """The id as messages have it."""
        return self.id[:LABEL_CHARS]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.request.num_prompt_tokens)

    @property
    def carrier(self) -> dict[str, str] | None:
        """The context of its trace span, for the worker."""
        return None if self.trace is None else self.trace.carrier

    @property
    def holds_plan(self) -> bool:
        """Whether its lookup runs, or its plan keeps blocks in memory."""
        asking = self.asked is not None and not self.looked_up
        return asking or (self.plan is not None and not self.loaded)

    def count_reuse(self) -> None:
        """Correct vLLM's statistics: it counts everything that is promised as cached."""
        if self.request.prefill_stats is not None:
            loaded = sum(span.length for span in self.loaded)
            self.request.prefill_stats.set(self.length, self.local, loaded)

    def restarted(self) -> None:
        """Its load failed while it was running: it starts over and is computed in full."""
        self.start_over("load_failed")
        self.cached_counted = False  # nobody knows yet what vLLM's own cache still has of it
        self.resumed = False
        self.restarts += 1

    def preempted(self) -> None:
        """vLLM took its blocks: everything it computes from now on is exact."""
        self.show_hashes()
        if self.loaded or self.in_engine:
            self.start_over("preempted")
            self.cached_counted = True  # as reused, when its rows were loaded
        elif self.reason != "preempted":
            self.resumed = True

    def start_over(self, reason: str = "") -> None:
        """Forget the plan and what was loaded: the engine computes the whole prompt."""
        self.plan, self.stored, self.saved, self.kept = None, None, False, None
        self.loaded, self.runs, self.in_engine = [], [], 0
        # vLLM's own schedulers ask no more: they go on behind what their cache had
        self.promise = Promise(self.local, [])
        self.reason = reason
        self.show_hashes()

    def ask_again(self) -> None:
        """Forget the lookup, so that the next step starts a new one."""
        self.asked, self.looked_up, self.stored, self.reason = None, bool(self.declined), None, ""
        self.cached_counted, self.wanted_at = False, 0.0

    @property
    def planned(self) -> Reuse:
        """What is reused if its whole plan is loaded."""
        return Reuse() if self.stored is None else reuse_of(self.stored)

    def holding(self, external: int) -> Reuse:
        """What is reused if vLLM uses `external` tokens of the promise."""
        local = self.promise.local
        return self.reuse(clip_spans(self.promise.spans, local, local + external))

    def reuse(self, loaded: Sequence[Span]) -> Reuse:
        """Which of the store's rows it reuses: its exact prefix, what vLLM's own cache had of its
        plan, and what is loaded."""
        if self.stored is None:
            return Reuse()
        exact = [span for span in self.stored.spans if span.exact]
        found = clip_spans(self.stored.spans, 0, self.in_engine)
        others = [span for span in (*found, *loaded) if not span.exact]
        return reuse_of(self.stored, [*exact, *others])

    def own(self, spans: Sequence[Span]) -> Sequence[Span]:
        """Those of `reuse` whose rows are stored in its namespace already: none from pools."""
        return spans if self.stored is None else self.stored.own(spans)

    def hide_hashes(self, keys: list[tuple[int, bytes]]) -> None:
        """Publish and find its blocks under private hashes.

        `keys`: see `private_hashes.keys_of`.
        """
        if self.hashes is None or self.hashes.keys != keys:
            self.show_hashes()
            self.hashes = PrivateHashes(self.request, keys)
        self.hashes.hide()

    def show_hashes(self) -> None:
        """Publish its blocks under vLLM's own hashes: it holds no edited rows."""
        if self.hashes is not None:
            self.hashes.show()


def granted(configured: str, asked: str | None) -> str:
    """The stricter of the two policies; `off` for an unknown one.

    The daemon is asked for it by name: another engine may have started it with a laxer one.
    """
    if asked is None:
        return configured
    if asked not in policy_names():
        return "off"
    return min(configured, asked, key=policy_names().index)


def wish_of(request: Request) -> Wish:
    """What the client asks for in `kv_transfer_params`.

    Names without the prefix `kvshare.` belong to other connectors. An unknown name with it is
    taken for a mistake, perhaps a mistyped policy.
    """
    params: Any = request.kv_transfer_params
    if not isinstance(params, dict):
        return Wish()
    ours = {name for name in params if isinstance(name, str) and name.startswith(PREFIX)}
    asked, pools = params.get(POLICY), params.get(POOLS, True)
    unknown = ours - ANSWERED - {SOURCE} - ({POOLS} if isinstance(pools, bool) else set())
    return Wish(
        None if asked is None else str(asked),
        str(params.get(SOURCE) or ""),
        tuple(sorted(unknown)),
        pools is True,
    )
