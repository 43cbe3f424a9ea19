"""Messages between clients and the daemon: msgpack, one struct a message, a versioned hello.

Unknown fields of a message are ignored, so that releases one version apart understand each other;
an unknown message is refused and the connection lives on. Rows never travel here: clients map
the daemon's arena, whose descriptor comes with the welcome; the daemon reads the client's outbox,
whose descriptor comes with the hello.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

import msgspec

from kvshare_store.daemon.wire import MESSAGE_BYTES, MIB
from kvshare_store.errors import KVShareError, ProtocolError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Count, Label, Outcome, Seconds
from kvshare_store.save.staging import Reuse

Patience = Annotated[float, msgspec.Meta(ge=0.0, le=600.0)]

OLDEST, NEWEST = 2, 2
"""Versions of the protocol that this release speaks. (1 was spoken over ZeroMQ.)"""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a connection: the versions that the client speaks. Reply: `Welcome`.

    The client's outbox, a memory file, comes along as a descriptor. What the client holds ends with
    the connection.
    """

    oldest: int = OLDEST
    newest: int = NEWEST


class Plan(msgspec.Struct, frozen=True, tag="plan"):
    """Reply: `ReusePlan`. `tokens`: int32, native byte order (both sides are one machine)."""

    namespace: Namespace
    tokens: bytes
    policy: str | None = None
    until: float = 0.0
    """Monotonic seconds after which nobody waits for the plan, so none is made; 0: never."""


class Decline(msgspec.Struct, frozen=True, tag="decline"):
    """The engine asked for no plan, and why; counted as a lookup that missed. Reply: None."""

    reason: Label
    tokens: Count


class EngineCached(msgspec.Struct, frozen=True, tag="engine_cached"):
    """Tokens of a missed lookup that the engine's own prefix cache had. Reply: None."""

    tokens: Count


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Reply: None."""

    lease: str
    outcome: Outcome


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


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """The rows that were wanted lie in the client's outbox. Reply: node id or None."""

    staged: str


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


class Flush(msgspec.Struct, frozen=True, tag="flush"):
    """Reply: None, once everything committed is durable."""


class ListNodes(msgspec.Struct, frozen=True, tag="list"):
    """Reply: list of node summaries, the most recently used first."""

    limit: int = 50


class ShowNode(msgspec.Struct, frozen=True, tag="show"):
    """Reply: one node in full, found by its id or a unique beginning of it."""

    node: str


class Clear(msgspec.Struct, frozen=True, tag="clear"):
    """Forget everything. Reply: number of nodes removed."""


class Pin(msgspec.Struct, frozen=True, tag="pin"):
    """Keep a node until it is purged, or no longer. Reply: its id, once that is durable.

    The node is found by its id or a unique beginning of it.
    """

    node: str
    pinned: bool = True


class Collect(msgspec.Struct, frozen=True, tag="collect"):
    """Collect garbage now. Reply: `Collected`, what was or would be removed."""

    dry_run: bool = False


class Purge(msgspec.Struct, frozen=True, tag="purge"):
    """Remove every byte of a namespace or of a tenant. Reply: list of `Purged`."""

    namespace: str = ""
    """The beginning of a digest."""
    tenant: str | None = None
    patience: Patience = 0.0
    """Seconds to wait for leases and saves to end. The client waits too, or the purge is over."""
    dry_run: bool = False


class CheckTree(msgspec.Struct, frozen=True, tag="check_tree"):
    """Reply: `TreeReport`."""

    repair: bool = False


class CheckBlocks(msgspec.Struct, frozen=True, tag="check_blocks"):
    """Reply: `BlocksReport`."""

    names: tuple[str, ...]
    repair: bool = False


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Shut the daemon down. Reply: None, before it does."""


Request = (
    Hello | Plan | Decline | EngineCached | Finish | Observe | Working | Stage | Commit | Abandon
    | Failed | Settings | Stats | Flush | ListNodes | ShowNode | Clear | Pin | Collect | Purge
    | CheckTree | CheckBlocks | Stop
)  # fmt: skip


_KINDS: dict[str, type[msgspec.Struct]] = {
    str(kind.__struct_config__.tag): kind for kind in get_args(Request)
}


class Welcome(msgspec.Struct, frozen=True):
    """Answer to a hello. The descriptor of the arena comes along."""

    version: int
    """The newest version that both sides speak."""
    pid: int
    """The daemon's process, for people: in another PID namespace it has another number."""
    arena: str
    policy: str


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
_TOKEN_BYTES = 4
_BESIDE_BYTES = MIB
"""Room for what a lookup and a save hold beside tokens and namespace."""


def lookup_fits(namespace: Namespace, tokens: int) -> bool:
    """Whether a lookup, and a save, of so many tokens are short enough to be sent."""
    nbytes = len(encode(namespace)) + tokens * _TOKEN_BYTES
    return nbytes + _BESIDE_BYTES <= MESSAGE_BYTES


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
        return _requests.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed request: {error}") from error


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
