"""Node: one prompt in the DELTA tree, and where every row of it lies."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, cast

import blake3
import msgspec
import numpy as np

from kvshare_store.errors import PlanError
from kvshare_store.nodes.edits import Edit, Tokens
from kvshare_store.nodes.packed import Edits, Names, Sizes, Spans
from kvshare_store.plan.contexts import Context
from kvshare_store.plan.spans import Span, gaps

NODE_FORMAT = 1
"""A release that changes what the fields mean counts on; one that only adds fields does not."""
SOURCES = 4
"""So many sources of a node are remembered: two tell that several have sent it."""
MOST_GENERATIONS = 1 << 15
"""Of edits, one on another: more than any policy builds on."""


class Node(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """One stored prompt. Its segments cover every position of it exactly once.

    A segment has the fields of a `Span`; its `block` indexes this node's `blocks`. Rows that the
    node shares with its parent are segments into the parent's blocks; only fresh rows are its own.
    The sequences are kept packed (`nodes/packed.py`).
    """

    id: str
    namespace: str
    token_bytes: bytes
    parent: str | None = None
    edits: Sequence[Edit] = ()
    segments: Sequence[Span]
    blocks: Sequence[str]
    block_bytes: Sequence[int] = ()
    """Bytes of the rows of each block, whatever a tier makes of them: what quotas count, and what
    forgetting the node may free, known without asking any tier."""
    exact_rows: int
    """Leading rows that were computed in their own full context."""
    generation: int = 0
    policy: str = ""
    """The laxest policy that any of its rows was reused under; empty if it is exact, or if it was
    written by a release that did not say."""
    contexts: tuple[Context, ...] = ()
    """Behind which edited rows its rows were computed, ascending."""
    created: float = msgspec.field(default_factory=time.time)
    merged: bool = False
    """Its rows were gathered into blocks of their own: chains of edits begin anew below it."""
    pinned: bool = False
    """Only a purge removes it."""
    stamp: int = 0
    """Names this form of the node's row: about the nanoseconds since 1970 when it was made, never
    twice the same. Whoever replaces or removes a row says which form of it is meant. 0: written by
    a release that had no stamps."""
    format: int = NODE_FORMAT
    """How a reader must understand the other fields. One with a greater number is left alone."""
    sources: tuple[bytes, ...] = ()
    """Hashes of sources that have sent all of its tokens, `SOURCES` at most. Releases before lose
    them when they write the row again; the node is then nobody's."""
    prompt_tokens: int = 0
    """Leading tokens that are the prompt; the others are its answer. 0: all of them, or a release
    that did not say has written the row."""

    def __post_init__(self) -> None:
        if not isinstance(self.edits, Edits):
            msgspec.structs.force_setattr(self, "edits", Edits.of(self.edits))
        if not isinstance(self.segments, Spans):
            msgspec.structs.force_setattr(self, "segments", Spans.of(self.segments))
        if not isinstance(self.block_bytes, Sizes):
            msgspec.structs.force_setattr(self, "block_bytes", Sizes.of(self.block_bytes))
        if not isinstance(self.blocks, Names):
            with contextlib.suppress(ValueError):  # what are no names `check_node` refuses
                msgspec.structs.force_setattr(self, "blocks", Names.of(self.blocks))

    @property
    def tokens(self) -> Tokens:
        """Token ids, int32, read-only."""
        return np.frombuffer(self.token_bytes, np.int32)

    @property
    def length(self) -> int:
        """How many tokens, and so rows."""
        return len(self.token_bytes) // 4

    @property
    def answer_tokens(self) -> int:
        """Tokens at its end that are the answer, as far as is known."""
        return self.length - self.prompt_tokens if self.prompt_tokens else 0

    @property
    def exact(self) -> bool:
        """Provenance: every row was computed in its own full context."""
        return self.generation == 0


class _Fields(msgspec.Struct, kw_only=True, gc=False):
    """A node as bytes: what is packed in memory is taken as it is, and must be checked."""

    id: str
    namespace: str
    token_bytes: bytes
    parent: str | None = None
    edits: msgspec.Raw = msgspec.Raw(b"\x90")
    segments: msgspec.Raw
    blocks: tuple[str, ...]
    block_bytes: msgspec.Raw = msgspec.Raw(b"\x90")
    exact_rows: int
    generation: int = 0
    policy: str = ""
    contexts: tuple[Context, ...] = ()
    created: float = msgspec.field(default_factory=time.time)
    merged: bool = False
    pinned: bool = False
    stamp: int = 0
    format: int = NODE_FORMAT
    sources: tuple[bytes, ...] = ()
    prompt_tokens: int = 0


def _as_they_were(packed: Any) -> Any:
    return list(packed) if isinstance(packed, Names) else msgspec.Raw(packed.raw)


_NO_EDITS = Edits.of(())
_encoder = msgspec.msgpack.Encoder(enc_hook=_as_they_were)
_decoder = msgspec.msgpack.Decoder(_Fields)


def encode_node(node: Node) -> bytes:
    """A map of the fields, in MessagePack."""
    return _encoder.encode(node)


def decode_node(encoded: bytes) -> Node:
    """The reverse. `check_node` must check it: sequences may be none. `msgspec.DecodeError` or
    `UnicodeDecodeError` if the other fields are not a node's."""
    read = _decoder.decode(encoded)
    return Node(
        id=read.id,
        namespace=_interned(read.namespace),
        token_bytes=read.token_bytes,
        parent=read.parent,
        edits=Edits(bytes(read.edits)) if bytes(read.edits) != _NO_EDITS.raw else _NO_EDITS,
        segments=_interned(bytes(read.segments), Spans),
        blocks=read.blocks,
        block_bytes=_interned(bytes(read.block_bytes), Sizes),
        exact_rows=read.exact_rows,
        generation=read.generation,
        policy=read.policy,
        contexts=read.contexts,
        created=read.created,
        merged=read.merged,
        pinned=read.pinned,
        stamp=read.stamp,
        format=read.format,
        sources=_interned(read.sources),
        prompt_tokens=read.prompt_tokens,
    )


@lru_cache(4096)
def _interned(value: Any, kind: Any = None) -> Any:
    """Segments and sizes of most prompts of one length are equal: kept once, they take no memory.
    That many are remembered."""
    return value if kind is None else kind(value)


class _Stamps:
    """Stamps of this process. They grow over all that it has seen, whatever its clock says."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen = 0

    def saw(self, stamps: Iterable[int]) -> None:
        """Rows of a catalogue have these."""
        with self._lock:
            self._seen = max(self._seen, *stamps, 0)

    def new(self) -> int:
        """The stamp of a row that is made now: greater than any that this process has seen."""
        with self._lock:
            number = max(time.time_ns() >> _DRAWN, (self._seen >> _DRAWN) + 1)
        return number << _DRAWN | secrets.randbits(_DRAWN)


_DRAWN = 20
"""Bits of a stamp (a millisecond) that are drawn: two machines may make one at the same moment."""
_stamps = _Stamps()
new_stamp, saw_stamps = _stamps.new, _stamps.saw


def with_sources(node: Node, sources: Iterable[bytes]) -> Node:
    """The node with more sources, as far as there is room; itself if it has them already."""
    found = tuple(dict.fromkeys((*node.sources, *sources)))[: max(SOURCES, len(node.sources))]
    return node if found == node.sources else msgspec.structs.replace(node, sources=found)


def node_id(namespace: str, tokens: Tokens, exact: bool) -> str:
    """The same prompt with the same provenance is the same node, whoever saves it."""
    hasher = blake3.blake3(f"{namespace}:{int(exact)}:".encode() + tokens.tobytes())
    return hasher.hexdigest(length=16)


def prompt_key(namespace: str, tokens: Tokens) -> bytes:
    """16 bytes that name a prompt of a namespace, stored or not, whatever its provenance."""
    return blake3.blake3(namespace.encode() + tokens.tobytes()).digest(length=16)


def check_node(node: Node, row_bytes: int) -> None:
    """`PlanError` unless the node's fields agree with one another: what a row of the catalogue must
    pass before it is believed. `row_bytes`: of the namespace's rows."""
    if node.id != node_id(node.namespace, node.tokens, node.exact):
        raise PlanError("its id is not that of its tokens")
    if not 0 <= node.exact_rows <= node.length or node.generation < 0:
        raise PlanError(f"{node.exact_rows} exact rows of {node.length}")
    if node.exact and node.exact_rows != node.length:
        raise PlanError("it is exact, but not all of its rows are")
    if not 0 <= node.prompt_tokens <= node.length:
        raise PlanError(f"{node.prompt_tokens} tokens of a prompt, of {node.length}")
    starts = [context.start for context in node.contexts]
    if starts != sorted(starts) or any(start < node.exact_rows for start in starts):
        raise PlanError("its contexts are not in order")
    if not isinstance(node.blocks, Names):
        raise PlanError("a block has a name that no block has")
    try:
        cast(Edits, node.edits).unpacked()
        segments, sizes = cast(Spans, node.segments).raw, cast(Sizes, node.block_bytes).raw
        _check_rows(segments, sizes, node.length, len(node.blocks), row_bytes)
    except msgspec.DecodeError as error:
        raise PlanError(str(error)) from error


@lru_cache(4096)
def _check_rows(
    packed_segments: bytes, packed_sizes: bytes, length: int, blocks: int, row_bytes: int
) -> None:
    """`PlanError` unless the segments cover the node, within its blocks. What holds of the segments
    of one node holds of all that are equal."""
    segments, sizes = Spans(packed_segments).unpacked(), Sizes(packed_sizes).unpacked()
    check_segments(segments, length, blocks)
    if sizes and len(sizes) != blocks:
        raise PlanError(f"{len(sizes)} sizes of {blocks} blocks")
    for segment in segments:
        nbytes = sizes[segment.block] if sizes else 0
        if nbytes and (segment.row + segment.length) * row_bytes > nbytes:
            raise PlanError(f"segment {segment} ends behind its block of {nbytes} bytes")


def check_segments(segments: Sequence[Span], length: int, blocks: int) -> None:
    """`PlanError` unless the segments cover `length` positions once and stay within `blocks`."""
    at = 0
    for segment in segments:
        if segment.start != at or segment.length < 1 or not 0 <= segment.block < blocks:
            raise PlanError(f"segment {segment} does not continue the node at {at}")
        if segment.row < 0 or segment.source < 0:
            raise PlanError(f"segment {segment} points before the start")
        at = segment.stop
    if at != length:
        missing = gaps(segments, 0, length)
        raise PlanError(f"segments cover {at} of {length} positions; missing {missing[:3]}")


def segments_between(node: Node, start: int, stop: int) -> Sequence[Span]:
    """The segments with rows of the positions `start … stop-1`, of which there is at least one."""
    segments = cast(Spans, node.segments).unpacked()
    first = bisect_right(segments, start, key=_start) - 1
    return segments[first : bisect_left(segments, stop, first, key=_start)]


_start = attrgetter("start")
