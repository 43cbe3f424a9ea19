"""Node: one prompt in the DELTA tree, and where every row of it lies."""

from __future__ import annotations

import re
import secrets
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from operator import attrgetter

import blake3
import msgspec
import numpy as np

from kvshare_store.errors import PlanError
from kvshare_store.plan import Span, gaps
from kvshare_store.tree.edits import Edit, Tokens

_HEX = re.compile("[0-9a-f]+")
NODE_FORMAT = 1
"""A release that changes what the fields mean counts on; one that only adds fields does not."""


class Node(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """One stored prompt. Its segments cover every position of it exactly once.

    A segment has the fields of a `Span`; its `block` indexes this node's `blocks`. Rows that the
    node shares with its parent are segments into the parent's blocks; only fresh rows are its own.
    """

    id: str
    namespace: str
    token_bytes: bytes
    parent: str | None = None
    edits: tuple[Edit, ...] = ()
    segments: tuple[Span, ...]
    blocks: tuple[str, ...]
    block_bytes: tuple[int, ...] = ()
    """Bytes of the rows of each block, whatever a tier makes of them: what quotas count, and what
    forgetting the node may free, known without asking any tier."""
    exact_rows: int
    """Leading rows that were computed in their own full context."""
    generation: int = 0
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

    @property
    def tokens(self) -> Tokens:
        """Token ids, int32, read-only."""
        return np.frombuffer(self.token_bytes, np.int32)

    @property
    def length(self) -> int:
        """How many tokens, and so rows."""
        return len(self.token_bytes) // 4

    @property
    def exact(self) -> bool:
        """Provenance: every row was computed in its own full context."""
        return self.generation == 0


class _Stamps:
    """Stamps of this process. They grow over all that it has seen, whatever its clock says."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen = 0

    def saw(self, stamps: Iterable[int]) -> None:
        with self._lock:
            self._seen = max(self._seen, *stamps, 0)

    def new(self) -> int:
        with self._lock:
            number = max(time.time_ns() >> _DRAWN, (self._seen >> _DRAWN) + 1)
        return number << _DRAWN | secrets.randbits(_DRAWN)


_DRAWN = 20
"""Bits of a stamp (a millisecond) that are drawn: two machines may make one at the same moment."""
_stamps = _Stamps()


def new_stamp() -> int:
    """The stamp of a row that is made now: greater than any that this process has seen."""
    return _stamps.new()


def saw_stamps(stamps: Iterable[int]) -> None:
    """Rows of a catalogue have these."""
    _stamps.saw(stamps)


def node_id(namespace: str, tokens: Tokens, exact: bool) -> str:
    """The same prompt with the same provenance is the same node, whoever saves it."""
    hasher = blake3.blake3(f"{namespace}:{int(exact)}:".encode())
    hasher.update(tokens.tobytes())
    return hasher.hexdigest(length=16)


def check_node(node: Node, row_bytes: int) -> None:
    """`PlanError` unless the node's fields agree with one another: what a row of the catalogue must
    pass before it is believed. `row_bytes`: of the namespace's rows."""
    if node.id != node_id(node.namespace, node.tokens, node.exact):
        raise PlanError("its id is not that of its tokens")
    if not 0 <= node.exact_rows <= node.length or node.generation < 0:
        raise PlanError(f"{node.exact_rows} exact rows of {node.length}")
    if node.exact and node.exact_rows != node.length:
        raise PlanError("it is exact, but not all of its rows are")
    if not _HEX.fullmatch("".join(node.blocks)) or any(len(n) != 64 for n in node.blocks):
        raise PlanError("a block has a name that no block has")
    check_segments(node.segments, node.length, len(node.blocks))
    if node.block_bytes and len(node.block_bytes) != len(node.blocks):
        raise PlanError(f"{len(node.block_bytes)} sizes of {len(node.blocks)} blocks")
    for segment in node.segments:
        nbytes = node.block_bytes[segment.block] if node.block_bytes else 0
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
    first = bisect_right(node.segments, start, key=_start) - 1
    return node.segments[first : bisect_left(node.segments, stop, first, key=_start)]


_start = attrgetter("start")
