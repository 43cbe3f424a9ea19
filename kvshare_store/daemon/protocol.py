"""Messages between clients and the daemon: msgpack, one struct a message, a versioned hello.
`engine_messages` and `operator_messages` have them by who sends them.

Unknown fields of a message are ignored, so that releases one version apart understand each other;
an unknown message is refused and the connection lives on. On one machine rows never travel here:
clients map the daemon's arena, whose descriptor comes with the welcome; the daemon reads the
client's outbox, whose descriptor comes with the hello. Between machines there are no descriptors,
and rows travel in pieces (`ReadRows`, `WriteRows`).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from kvshare_store.daemon.engine_messages import (
    Abandon,
    Commit,
    Decline,
    EngineCached,
    Failed,
    Finish,
    Forget,
    HasNodes,
    Held,
    Looked,
    NextLook,
    NodesOf,
    Observe,
    Plan,
    PlanNode,
    Prefilled,
    ReadRows,
    Stage,
    Working,
    WriteRows,
)
from kvshare_store.daemon.operator_messages import (
    Branch,
    CheckBlocks,
    CheckTree,
    Clear,
    Collect,
    Diff,
    Evict,
    Explain,
    Export,
    Flush,
    Import,
    ListNodes,
    ListRequests,
    Pin,
    Purge,
    Quality,
    Ready,
    Settings,
    ShowNode,
    Stats,
    Stop,
)
from kvshare_store.daemon.wire import MESSAGE_BYTES, MIB
from kvshare_store.errors import KVShareError, ProtocolError
from kvshare_store.namespace import Namespace

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


Request = (
    Hello | Plan | Decline | Prefilled | EngineCached | ReadRows | Finish | Observe | Working
    | NextLook | Looked | Stage | WriteRows | Commit | Abandon | Failed | HasNodes | PlanNode
    | Forget | Held | NodesOf | Settings | Stats | Ready | Flush | ListNodes | Branch | ShowNode
    | Explain | ListRequests | Quality | Diff | Clear | Pin | Evict | Export | Import | Collect
    | Purge | CheckTree | CheckBlocks | Stop
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
