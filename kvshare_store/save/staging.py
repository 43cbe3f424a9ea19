"""Staged saves: which rows of a prompt are missing, and where a commit gets them from."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import msgspec

from kvshare_store.errors import NamespaceError, PlanError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import MOST_GENERATIONS, Node
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.contexts import Context, contexts_of, cut_contexts
from kvshare_store.plan.spans import Run, Span, gaps, of_used_blocks
from kvshare_store.tensors.layout import KVLayout

_SCRAP = 0.25
"""The share of a block that is copied rather than kept in it."""


class Reuse(msgspec.Struct, frozen=True):
    """What a client has used of a plan, so that these rows need not be stored again."""

    spans: tuple[Span, ...] = ()
    blocks: tuple[str, ...] = ()
    donors: tuple[str, ...] = ()
    generation: int = 0
    stamps: tuple[int, ...] = ()
    """By donor, the form that was planned. Empty: the form that is here now."""
    policy: str = ""
    """The policy of the plan."""
    contexts: tuple[Context, ...] = ()
    """Contexts of the continued rows."""


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    """A save in progress. `fresh` are the positions whose rows `commit` wants, ascending. The rows
    are packed into blocks of `sizes` rows, one after another, each in canonical order.

    `known` True: the store wants no rows. It has every row of this prompt, or does not store it at
    all.
    """

    id: str = ""
    fresh: tuple[Run, ...] = ()
    sizes: tuple[int, ...] = ()
    known: bool = False

    @property
    def rows(self) -> int:
        """How many fresh rows there are."""
        return sum(self.sizes)


class Save(msgspec.Struct, frozen=True):
    """What the store remembers about a staged save until it is committed."""

    namespace: Namespace
    tokens: Tokens
    reuse: Reuse
    kept: Reuse
    """The part of it whose rows the node points at. What came from pools is stored anew: a tenant's
    node has blocks of the tenant's alone."""
    block_bytes: tuple[int, ...]
    """Bytes of each block of `kept`."""
    policy: str
    """The laxest policy that any of its rows is reused under."""
    staged: Staged
    owner: str
    extends: int = 0
    """Number of leading tokens that are the prompt; the others are its answer. 0: all of it is a
    prompt."""
    base: Node | None = None
    """The node that an answer's prompt rows are taken from."""
    sources: tuple[bytes, ...] = ()
    """Who has sent the prompt, hashed."""
    greedy: bool = False
    """Of an answer: the request asked for the likeliest token at each step."""
    request: str = ""
    """The engine's name of the request."""


class RowSource(Protocol):
    """Where a commit copies fresh rows from: blocks one after another, as `Staged` says."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` from byte `offset` on; `PlanError` if there are fewer bytes."""


class Buffer:
    """Packed rows in this process's own memory."""

    def __init__(self, data: Any) -> None:
        self._view = memoryview(data).cast("B")

    def read_into(self, offset: int, target: memoryview) -> None:
        """As `RowSource`."""
        part = self._view[offset : offset + len(target)]
        if len(part) < len(target):
            raise PlanError(f"{len(self._view)} bytes are fewer rows than were staged")
        target[:] = part


def packed(rows: Any, sizes: Sequence[int], layout: KVLayout) -> bytearray:
    """Canonical rows side by side, cut into blocks of `sizes` rows.

    `rows`: bytes-like. `NamespaceError` if it does not hold as many rows as the blocks.
    """
    total = sum(sizes)
    if memoryview(rows).nbytes != total * layout.row_bytes:
        raise NamespaceError(f"expected {total} fresh rows of {layout.row_bytes} bytes")
    blocks = bytearray(total * layout.row_bytes)
    if not total:
        return blocks
    source, at = layout.words(rows, total), 0
    for size in sizes:
        nbytes = size * layout.row_bytes
        start = at * layout.row_bytes
        target = layout.words(memoryview(blocks)[start : start + nbytes], size)
        target[:] = source[:, :, at : at + size]
        at += size
    return blocks


def new_staged(spans: Sequence[Span], length: int, block_tokens: int) -> Staged:
    """A staged save of the positions that `spans` do not cover."""
    fresh = tuple(gaps(spans, 0, length))
    sizes = block_sizes(sum(run.length for run in fresh), block_tokens)
    return Staged(id=uuid.uuid4().hex, fresh=fresh, sizes=tuple(sizes))


def without_unused_blocks(reuse: Reuse) -> Reuse:
    """The same without the blocks that no span uses."""
    spans, used = of_used_blocks(reuse.spans)
    blocks = tuple(reuse.blocks[block] for block in used)
    return msgspec.structs.replace(reuse, spans=spans, blocks=blocks)


def without_scrap(reuse: Reuse, rows: Sequence[int]) -> Reuse:
    """The same without its last span, if all is exact and that takes at most a quarter of a block,
    so that its rows are stored anew. For a few rows the prompt would keep a whole block, long after
    the end of the prompt that the others are of is gone.

    `rows`: of each of its blocks. Those without a span stay, so that numbers of blocks do.
    """
    last = reuse.spans[-1] if reuse.spans else None
    if last is None or not last.exact or last.length > _SCRAP * rows[last.block]:
        return reuse
    return msgspec.structs.replace(reuse, spans=reuse.spans[:-1])


def without_blocks(reuse: Reuse, names: Collection[str]) -> Reuse:
    """The same without the spans of these blocks."""
    if not names:
        return reuse
    kept = tuple(span for span in reuse.spans if reuse.blocks[span.block] not in names)
    return without_unused_blocks(msgspec.structs.replace(reuse, spans=kept))


def check_reuse(reuse: Reuse, length: int) -> None:
    """`PlanError` unless the spans ascend, stay within the prompt and within the blocks named."""
    at, in_place = 0, True
    for span in reuse.spans:
        in_place = in_place and not span.edited
        inside = at <= span.start < span.stop <= length and 0 <= span.block < len(reuse.blocks)
        if not inside or span.row < 0 or span.source < 0:
            raise PlanError(f"span {span} does not fit a prompt of {length} tokens")
        if span.exact and span.source != span.start:
            raise PlanError(f"span {span} has moved and cannot be exact")
        if span.exact and span.continued:
            raise PlanError(f"span {span} is of two kinds")
        if not (in_place or span.edited):
            raise PlanError(f"span {span} stands behind edited rows")
        at = span.stop
    if not reuse.contexts and any(span.continued for span in reuse.spans):
        raise PlanError("rows are continued, but nothing says in which context")
    starts = [context.start for context in reuse.contexts]
    if starts != sorted(starts) or any(not 0 <= start < length for start in starts):
        raise PlanError("contexts do not ascend within the prompt")
    if len(starts) > length:
        raise PlanError(f"a prompt of {length} tokens has no {len(starts):,} contexts")
    if not 0 <= reuse.generation <= MOST_GENERATIONS:
        raise PlanError(f"no rows are of generation {reuse.generation}")


def check_extends(extends: int, reuse: Reuse, length: int) -> None:
    """`PlanError` unless an answer of at least one token extends a prompt of `extends` tokens."""
    if not 0 <= extends < max(1, length):
        raise PlanError(f"{length} tokens cannot extend a prompt of {extends}")
    if extends and reuse.spans:
        raise PlanError(
            "the save of an answer must not name rows of its prompt: the store finds them itself"
        )


def block_sizes(fresh_rows: int, block_tokens: int) -> list[int]:
    """Rows of each block that `fresh_rows` rows are packed into."""
    full, rest = divmod(fresh_rows, block_tokens)
    return [block_tokens] * full + ([rest] if rest else [])


def fresh_segments(fresh: Sequence[Run], sizes: Sequence[int], first_block: int) -> list[Span]:
    """Segments of the fresh rows: runs packed one after another into blocks of `sizes` rows."""
    segments = []
    block = row = 0
    for run in fresh:
        at = run.start
        while at < run.stop:
            if row == sizes[block]:
                block, row = block + 1, 0
            length = min(run.stop - at, sizes[block] - row)
            segments.append(Span(at, length, at, first_block + block, row))
            at, row = at + length, row + length
    return segments


def exact_rows(spans: Sequence[Span], length: int) -> int:
    """Leading rows computed in their own full context: all up to the first edited span."""
    return next((span.start for span in spans if not span.exact), length)


def contexts_of_rows(reuse: Reuse, length: int) -> tuple[Context, ...]:
    """The contexts that the rows of a prompt of `length` tokens are computed in."""
    exact = exact_rows(reuse.spans, length)
    continued = max((span.stop for span in reuse.spans if span.continued), default=0)
    return contexts_of(reuse.contexts, reuse.spans, reuse.blocks, exact, continued)


def reuse_of(plan: ReusePlan, spans: Sequence[Span] | None = None) -> Reuse:
    """What a client tells the store about a plan of which it used all spans, or only `spans`."""
    if plan.declined:
        return Reuse()
    kept = plan.spans if spans is None else tuple(spans)
    exact = all(span.exact for span in kept)
    names = plan.block_names
    generation = 0 if exact else plan.generation
    stop = max((span.stop for span in kept if span.continued), default=0)
    contexts = cut_contexts(plan.contexts, stop)
    return Reuse(kept, names, plan.donors, generation, plan.stamps, plan.policy, contexts)
