"""What people and programs ask of a daemon and let it do, a struct a message.

`protocol` has all messages, and how they are sent.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvshare_store.daemon.engine_messages import Ids, Pools
from kvshare_store.plan import Count, Label, Patience, Seconds


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
    tenant: str | None = None
    """Of this tenant, in place of `namespace`. Releases before ignore it."""


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
