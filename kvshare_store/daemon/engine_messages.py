"""What engines and other clients that store and load rows send to the daemon, a struct a message.

`protocol` has all messages, and how they are sent.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvshare_store.config import MOST_POOLS
from kvshare_store.daemon.wire import MIB
from kvshare_store.namespace import Namespace, PoolName
from kvshare_store.plan import Count, Label, Outcome, Seconds
from kvshare_store.quality.score import Regrets
from kvshare_store.save.second_looks import End
from kvshare_store.save.staging import Reuse

Ids = Annotated[tuple[Label, ...], msgspec.Meta(max_length=1 << 14)]
"""Of nodes, or what they begin with; asked for under the store's lock."""
Pools = Annotated[tuple[PoolName, ...], msgspec.Meta(max_length=MOST_POOLS)]
Source = Annotated[bytes, msgspec.Meta(max_length=16)]

PIECE_BYTES = MIB // 2
"""Rows in one message, at most."""


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


class ReadRows(msgspec.Struct, frozen=True, tag="read_rows"):
    """Reply: up to `PIECE_BYTES` of the rows of a leased block, from byte `start` on. For a client
    that shares no memory with the daemon."""

    lease: str
    block: str
    """Its name."""
    start: Count = 0


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


class WriteRows(msgspec.Struct, frozen=True, tag="write_rows"):
    """Some of the rows that a staged save wants, from a client that shares no memory with the
    daemon; `Commit` follows when all were sent. Reply: None."""

    staged: str
    start: Count
    """Byte of the outbox that such a client would have."""
    rows: Annotated[bytes, msgspec.Meta(max_length=PIECE_BYTES)]


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """The rows that were wanted lie in the client's outbox. Reply: node id or None."""

    staged: str


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Reply: None."""

    staged: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A client counts a failure on its side. Reply: None."""

    kind: Label


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
