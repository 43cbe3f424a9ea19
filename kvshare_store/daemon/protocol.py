"""Messages between clients and the daemon: msgpack, one struct a message, a versioned hello.

Frames of a request: `[id, body]`; of a reply: `[id, body]` with the same id. Rows never travel
here: both sides map the arena.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from kvshare_store.errors import ProtocolError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome
from kvshare_store.staging import Reuse

VERSION = 1
_LONGEST_SOCKET_PATH = 100
"""Unix sockets are limited to 107 bytes; a margin for temporary names."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a session. Reply: `Welcome`."""

    version: int
    client: str
    """Name of the client: what it holds is released when its process is gone."""
    pid: int = 0


class Plan(msgspec.Struct, frozen=True, tag="plan"):
    """Reply: `ReusePlan`. `tokens`: int32, native byte order (both sides are one machine)."""

    namespace: Namespace
    tokens: bytes
    policy: str | None = None
    until: float = 0.0
    """Monotonic seconds after which nobody waits for the plan, so none is made; 0: never."""


class Decline(msgspec.Struct, frozen=True, tag="decline"):
    """The engine asked for no plan, and why; counted as a lookup that missed. Reply: None."""

    reason: str
    tokens: int


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Reply: None."""

    lease: str
    outcome: Outcome


class Observe(msgspec.Struct, frozen=True, tag="observe"):
    """What the engine measured: tokens prefilled in how many seconds. Reply: None."""

    tokens: int
    seconds: float
    model: str = ""
    """`Namespace.model_digest`; an engine of the release before does not say."""


class Working(msgspec.Struct, frozen=True, tag="working"):
    """The client's engine has requests from now on, or has none. Reply: None.

    It is sent when that changes; a client that is gone has none.
    """

    busy: bool


class Stage(msgspec.Struct, frozen=True, tag="stage"):
    """Reply: `Staged`."""

    namespace: Namespace
    tokens: bytes
    reuse: Reuse


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Reply: node id or None."""

    staged: str


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Reply: None."""

    staged: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A client counts a failure on its side. Reply: None."""

    kind: str


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
    patience: float = 0.0
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
    Hello | Plan | Decline | Finish | Observe | Working | Stage | Commit | Abandon | Failed
    | Stats | Flush | ListNodes | ShowNode | Clear | Pin | Collect | Purge | CheckTree | CheckBlocks
    | Stop
)  # fmt: skip


class Welcome(msgspec.Struct, frozen=True):
    """Answer to a hello."""

    version: int
    pid: int
    arena: str
    policy: str


class Reply(msgspec.Struct, frozen=True):
    """`error` is an `ErrorKind` with `message`, or empty with `result`."""

    result: Any = None
    error: str = ""
    message: str = ""


_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)
encode = msgspec.msgpack.Encoder().encode


def decode_request(body: bytes) -> Request:
    """A request, or `ProtocolError`."""
    try:
        return _requests.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise ProtocolError(f"malformed request: {error}") from error


def decode_reply(body: bytes) -> Reply:
    """A reply, or `ProtocolError`."""
    try:
        return _replies.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise ProtocolError(f"malformed reply: {error}") from error


def socket_path(home: Path) -> Path:
    """The daemon's socket: in the home, or under the temporary folder if that path is too long."""
    path = home / "kvshare.sock"
    if len(str(path)) <= _LONGEST_SOCKET_PATH:
        return path
    name = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"kvshare-{os.getuid()}-{name}.sock"
