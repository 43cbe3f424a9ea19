"""Messages between clients and the daemon: msgpack, one struct a message, a versioned hello.

Unknown fields of a message are ignored, so that releases one version apart understand each other;
an unknown message is refused and the connection lives on. On one machine rows never travel here:
clients map the daemon's arena, whose descriptor comes with the welcome; the daemon reads the
client's outbox, whose descriptor comes with the hello. Between machines there are no descriptors,
and rows travel in pieces (`ReadRows`, `WriteRows`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec

from kvshare_store.config import MOST_POOLS
from kvshare_store.daemon.wire import MESSAGE_BYTES, MIB
from kvshare_store.errors import KVShareError, ProtocolError
from kvshare_store.namespace import Namespace, PoolName
from kvshare_store.plan import Count, Label, Outcome, Patience, Seconds
from kvshare_store.quality.score import Regrets
from kvshare_store.save.second_looks import End
from kvshare_store.save.staging import Reuse

Ids = Annotated[tuple[Label, ...], msgspec.Meta(max_length=1 << 14)]
"""Of nodes, or what they begin with; asked for under the store's lock."""
Pools = Annotated[tuple[PoolName, ...], msgspec.Meta(max_length=MOST_POOLS)]
Source = Annotated[bytes, msgspec.Meta(max_length=16)]

PIECE_BYTES = MIB // 2
"""Rows in one message, at most."""
EXPLAINED_TOKENS = 1 << 20
"""Of a prompt that is explained, at most."""

Role = Literal["reader", "engine", "admin"]
"""What a client may ask for; `kvshare_store.daemon.roles` says which role each message needs."""

OLDEST, NEWEST = 2, 2
"""Versions of the protocol that this release speaks. (1 was spoken over ZeroMQ.)"""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a connection: the versions that the client speaks. Reply: `Welcome`.

    The client's outbox, a memory file, comes along as a descriptor. What the client holds ends with
    the connection.
    """

    oldest: int = OLDEST
    newest: int = NEWEST
    role: Role = "admin"
    """The client wants to be able to do no more than this."""


class Plan(msgspec.Struct, frozen=True, tag="plan"):
    """Reply: `ReusePlan`. `tokens`: int32, little-endian."""

    namespace: Namespace
    tokens: bytes
    policy: str | None = None
    until: float = 0.0
    """Monotonic seconds after which nobody waits for the plan, so none is made; 0: never. Means
    nothing between machines, whose clocks differ."""
    request: Label = ""
    """The engine's name of the request, for the log."""
    look: bool = False
    """For a second look, which is nobody's request: it is neither counted as one nor logged."""
    source: Source = b""
    """Who sends the request, hashed; empty if nobody says. That of a reader is ignored."""
    pools: Pools = ()
    """Names of the pools whose rows the plan may have too: those for the model and adapter of
    `namespace`. A daemon of the release before uses none."""


class Decline(msgspec.Struct, frozen=True, tag="decline"):
    """The engine asked for no plan, and why; counted as a lookup that missed. Reply: None."""

    reason: Label
    tokens: Count
    request: Label = ""
    """As in `Plan`. An engine of the release before says neither this nor the namespace."""
    namespace: Namespace | None = None
    """Whose request it was; None where nobody knows, as behind a salt that proves no tenant."""


class Prefilled(msgspec.Struct, frozen=True, tag="prefilled"):
    """The engine has the first token of a request whose plan it took so many seconds before. For
    the log. Reply: None."""

    request: Label
    """The engine's name of the request, as in `Plan`."""
    seconds: Seconds


class EngineCached(msgspec.Struct, frozen=True, tag="engine_cached"):
    """Tokens of a missed lookup that the engine's own prefix cache had. Reply: None."""

    tokens: Count
    request: Label = ""
    """The engine's name of the request, as in `Plan`: its entry in the log is corrected. An engine
    of the release before does not say."""


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Reply: None."""

    lease: str
    outcome: Outcome


class ReadRows(msgspec.Struct, frozen=True, tag="read_rows"):
    """Reply: up to `PIECE_BYTES` of the rows of a leased block, from byte `start` on. For a client
    that shares no memory with the daemon."""

    lease: str
    block: str
    """Its name."""
    start: Count = 0


class Observe(msgspec.Struct, frozen=True, tag="observe"):
    """What the engine measured: tokens prefilled in how many seconds. Reply: None."""

    tokens: Count
    seconds: Seconds
    model: Label = ""
    """`Namespace.model_digest`; an engine of the release before does not say."""


class Working(msgspec.Struct, frozen=True, tag="working"):
    """The client's engine has requests from now on, or has none. Reply: None.

    It is sent when that changes; a client that is gone has none.
    """

    busy: bool


class NextLook(msgspec.Struct, frozen=True, tag="next_look"):
    """The engine is idle: which edited prompt shall it compute in full? Reply: `Look` or None.

    The prompt belongs to the engine until it says `Looked`, or for `LOOK_SECONDS`.
    """

    namespaces: Ids
    """Digests of those whose prompts it can compute."""
    scores: bool = False
    """It can say how good an answer was, so it is given controls as well."""


class Looked(msgspec.Struct, frozen=True, tag="looked"):
    """The engine has ended a look. Reply: None."""

    node: str
    stamp: int
    end: End
    regrets: Regrets = ()
    """How good the first tokens of the answer were, if that was asked for: of each, log p(the full
    model's best token) - log p(the token), nats."""


class Stage(msgspec.Struct, frozen=True, tag="stage"):
    """Reply: `Staged`, which rows are wanted."""

    namespace: Namespace
    tokens: bytes
    reuse: Reuse
    extends: Count = 0
    """Leading tokens that are a prompt which the store has, and the rest its answer; 0: all of it
    is a prompt. The store takes the prompt's rows from a node: the one whose generation and
    contexts are those of `reuse`, which names no rows. A daemon of the release before ignores this
    and wants every row."""
    greedy: bool = False
    """Of an answer: the request asked for the likeliest token at each step. An engine of the
    release before does not say."""
    request: Label = ""
    """The engine's name of the request, as in `Plan`."""
    source: Source = b""
    """As in `Plan`. Of an engine of the release before it is what its lookup said."""


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """The rows that were wanted lie in the client's outbox. Reply: node id or None."""

    staged: str


class WriteRows(msgspec.Struct, frozen=True, tag="write_rows"):
    """Some of the rows that a staged save wants, from a client that shares no memory with the
    daemon; `Commit` follows when all were sent. Reply: None."""

    staged: str
    start: Count
    """Byte of the outbox that such a client would have."""
    rows: Annotated[bytes, msgspec.Meta(max_length=PIECE_BYTES)]


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Reply: None."""

    staged: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A client counts a failure on its side. Reply: None."""

    kind: Label


class Settings(msgspec.Struct, frozen=True, tag="settings"):
    """Reply: the values in effect, by field."""


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """Reply: the dictionary of `Store.stats`."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Reply: `state` of health, and whether the daemon is `draining`. Cheap, for probes."""


class Flush(msgspec.Struct, frozen=True, tag="flush"):
    """Reply: None, once everything committed is durable."""


class ListNodes(msgspec.Struct, frozen=True, tag="list"):
    """Reply: list of node summaries, the most recently used first."""

    limit: int = 50
    pool: str = ""
    """Only those of this pool."""
    tenant: str | None = None
    """Only those of this tenant; an error if it has no namespace. Releases before ignore it."""


class Branch(msgspec.Struct, frozen=True, tag="branch"):
    """Reply: some of the nodes where the tree of a namespace begins, or of the children of one,
    the last stored first: `nodes`, `total`, and `next`, which continues the list."""

    namespace: Label = ""
    """The beginning of a digest; its nodes without a parent that is here."""
    node: Label = ""
    """Or: this node's children."""
    whole: bool = False
    """Of a namespace: every node."""
    after: Label = ""
    """`next` of the answer before."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 50


class ShowNode(msgspec.Struct, frozen=True, tag="show"):
    """Reply: one node in full, found by its id or a unique beginning of it."""

    node: str


class Explain(msgspec.Struct, frozen=True, tag="explain"):
    """Reply: `Explanation` of a prompt's plan, with the text of its parts. Nothing is served.

    The prompt is that of a logged `request`, of a stored `node`, `tokens`, or `text` for the
    tokenizer of the namespace.
    """

    tokens: bytes = b""
    text: str = ""
    node: str = ""
    """Id of a node, or a unique beginning of it; it is no candidate for its own prompt."""
    request: str = ""
    """Number or name of a logged request, or a beginning of the name."""
    only: str = ""
    """The one node that is a candidate; the answer then has its text, in parts as well."""
    namespace: str = ""
    """The beginning of a digest; may be empty where a node says it, or there is only one."""
    policy: str | None = None
    pools: Pools = ()
    """As those of a plan; a logged request says its own."""


class ListRequests(msgspec.Struct, frozen=True, tag="list_requests"):
    """Reply: list of `Logged` without prompts, the newest first, or the slowest."""

    limit: int = 50
    declined: bool = False
    slow: bool = False
    request: str = ""


class Quality(msgspec.Struct, frozen=True, tag="quality"):
    """Reply: what scored answers say of each class of traffic, those with the most of them first;
    what controls say of each namespace; and which answers were the worst lately."""

    namespace: Label = ""
    """The beginning of a digest; empty: all."""
    traffic: Label = ""
    """Only this class, as it is named in an answer."""
    trends: bool = False
    """With what was known of each policy of a class in the last day."""
    start: Count = 0
    """Without so many of the first classes."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=200)] = 50
    """Classes."""


class Diff(msgspec.Struct, frozen=True, tag="diff"):
    """Reply: the edits that turn the prompt of one node into that of another, as text."""

    first: str
    second: str


class HasNodes(msgspec.Struct, frozen=True, tag="has_nodes"):
    """Reply: for each id whether that node is here. Those that are count as used just now, but
    not where `use` is false."""

    nodes: Ids
    use: bool = True


class PlanNode(msgspec.Struct, frozen=True, tag="plan_node"):
    """Lease all rows of one exact node, found by its id: no lookup, no policy, no cost.

    Reply: `ReusePlan`.
    """

    node: str
    until: float = 0.0
    """Monotonic seconds after which nobody waits for the rows; 0: as long as a plan may take."""


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Remove nodes by their ids, pinned or not. Reply: the ids of those that were here."""

    nodes: Ids


class Held(msgspec.Struct, frozen=True, tag="held"):
    """Reply: a list of `Holding`, one for each namespace whose model's name begins so."""

    model: str


class NodesOf(msgspec.Struct, frozen=True, tag="nodes_of"):
    """Reply: a list of (id, int32 tokens), by id, of the exact nodes of a namespace."""

    namespace: str
    after: str = ""
    """Only ids behind this one."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000


class Clear(msgspec.Struct, frozen=True, tag="clear"):
    """Forget everything. Reply: number of nodes removed."""


class Pin(msgspec.Struct, frozen=True, tag="pin"):
    """Keep a node until it is purged, or no longer. Reply: its id, once that is durable.

    The node is found by its id or a unique beginning of it.
    """

    node: str
    pinned: bool = True


class Evict(msgspec.Struct, frozen=True, tag="evict"):
    """Forget the nodes for which all that is given holds; pinned ones stay. Reply: `Evicted`."""

    nodes: Ids = ()
    """Ids, or unique beginnings of them."""
    tenant: str | None = None
    older_than: Seconds | None = None
    """Stored more than so many seconds ago."""
    policy: str = ""
    """Rows of them were reused under this policy."""
    dry_run: bool = False


class Export(msgspec.Struct, frozen=True, tag="export"):
    """Write an archive of nodes, all if none is named. Reply: `Exported`."""

    path: str
    """Absolute, as the daemon sees it."""
    nodes: Ids = ()
    """Ids, or unique beginnings of them."""
    tenant: str | None = None
    plain: bool = False
    """Also of an encrypted store."""


class Import(msgspec.Struct, frozen=True, tag="import"):
    """Take in the nodes of an archive. Reply: `Imported`, once they are durable."""

    path: str
    """Absolute, as the daemon sees it."""


class Collect(msgspec.Struct, frozen=True, tag="collect"):
    """Collect garbage now. Reply: `Collected`, what was or would be removed."""

    dry_run: bool = False


class Purge(msgspec.Struct, frozen=True, tag="purge"):
    """Remove every byte of a namespace, of a tenant or of a pool, or a node with its lineage.
    Reply: list of `Purged`."""

    namespace: str = ""
    """The beginning of a digest."""
    tenant: str | None = None
    patience: Patience = 0.0
    """Seconds to wait for leases and saves to end. The client waits too, or the purge is over."""
    dry_run: bool = False
    lineage: str = ""
    """The node, by its id or a unique beginning of it, that goes with what was computed behind its
    rows. Releases before ignore it, and answer with an error since nothing else is named."""
    pool: str = ""
    """A daemon of the release before, which has none, finds nothing."""


class CheckTree(msgspec.Struct, frozen=True, tag="check_tree"):
    """Reply: `TreeReport`."""

    repair: bool = False


class CheckBlocks(msgspec.Struct, frozen=True, tag="check_blocks"):
    """Reply: `BlocksReport`."""

    names: tuple[str, ...]
    repair: bool = False


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Shut the daemon down. Reply: None, before it does."""

    drain: bool = False
    """First let leases and saves end, for at most `drain_seconds`."""


Request = (
    Hello | Plan | Decline | Prefilled | EngineCached | ReadRows | Finish | Observe | Working
    | NextLook | Looked | Stage | WriteRows | Commit | Abandon | Failed | Settings | Stats | Ready
    | Flush | ListNodes | Branch | ShowNode | Explain | ListRequests | Quality | Diff | HasNodes
    | PlanNode | Forget | Held | NodesOf | Clear | Pin | Evict | Export | Import | Collect | Purge
    | CheckTree | CheckBlocks | Stop
)  # fmt: skip


def tag_of(kind: type[msgspec.Struct]) -> str:
    """What a message of this kind has as its `type`."""
    return str(kind.__struct_config__.tag)


_KINDS: dict[str, type[msgspec.Struct]] = {tag_of(kind): kind for kind in get_args(Request)}


class Welcome(msgspec.Struct, frozen=True):
    """Answer to a hello. The descriptor of the arena comes along."""

    version: int
    """The newest version that both sides speak."""
    pid: int
    """The daemon's process, for people: in another PID namespace it has another number."""
    arena: str
    policy: str
    role: Role = "admin"
    """What this client may ask for."""


class Holding(msgspec.Struct, frozen=True):
    """What is stored of one namespace."""

    digest: str
    namespace: Namespace
    nbytes: int
    """Of rows, before any codec."""
    nodes: int = 0
    most_bytes: int = 0
    """What it may have; 0: no limit."""
    most_nodes: int = 0
    plans_per_second: float = 0.0
    """What it may ask for; 0: no limit. A daemon of the release before does not say."""
    saves_per_second: float = 0.0


class Reply(msgspec.Struct, frozen=True):
    """`error` is an `ErrorKind` with `message`, or empty with `result`."""

    result: Any = None
    error: str = ""
    message: str = ""


class _Tag(msgspec.Struct, frozen=True):
    """The one field that every request has."""

    type: str


_tags = msgspec.msgpack.Decoder(_Tag)
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)
encode = msgspec.msgpack.Encoder().encode
TOKEN_BYTES = 4
_BESIDE_BYTES = MIB
"""Room for what a lookup and a save hold beside tokens and namespace."""


def lookup_fits(namespace: Namespace, tokens: int) -> bool:
    """Whether a lookup, and a save, of so many tokens are short enough to be sent."""
    nbytes = len(encode(namespace)) + tokens * TOKEN_BYTES
    return nbytes + _BESIDE_BYTES <= MESSAGE_BYTES and not namespace.too_long


def kind_of(body: bytes | bytearray) -> type[msgspec.Struct]:
    """Which request this is, without decoding all of it; `ProtocolError` if it is none."""
    try:
        tag = _tags.decode(body).type
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed request: {error}") from error
    kind = _KINDS.get(tag)
    if kind is None:
        raise ProtocolError(f"unknown request {tag[:40]!r}: this daemon is older than its client")
    return kind


def decode_request(body: bytes | bytearray) -> Request:
    """A request, or `ProtocolError`."""
    try:
        message = _requests.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed request: {error}") from error
    if isinstance(message, Plan | Stage | Decline):
        space = message.namespace
        if space is not None and (name := space.too_long):
            raise ProtocolError(f"the {name} of the namespace is too long")
    return message


def encode_error(error: KVShareError) -> bytes:
    """The reply that says what went wrong."""
    return encode(Reply(error=str(error.kind), message=str(error)))


def decode_reply(body: bytes | bytearray) -> Reply:
    """A reply, or `ProtocolError`."""
    try:
        return _replies.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed reply: {error}") from error


def common_version(hello: Hello) -> int:
    """The newest version that both sides speak; `ProtocolError` if there is none."""
    version = min(hello.newest, NEWEST)
    if version < max(hello.oldest, OLDEST):
        raise ProtocolError(
            f"client speaks versions {hello.oldest} to {hello.newest}, the daemon {OLDEST} to "
            f"{NEWEST}: run the same kvshare-store release on both sides"
        )
    return version
