"""Staged saves: slots in the arena that a client fills before the node exists."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import msgspec

from kvshare_store.errors import PlanError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan, Run, Span, gaps
from kvshare_store.tree.edits import Tokens


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """A reserved slot for `rows` fresh rows at `offset` of the arena."""

    offset: int
    rows: int
    nbytes: int


class Reuse(msgspec.Struct, frozen=True):
    """What of a plan was really used, and so need not be stored again."""

    spans: tuple[Span, ...] = ()
    blocks: tuple[str, ...] = ()
    donors: tuple[str, ...] = ()
    generation: int = 0


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    """A save in progress. `fresh` are the positions whose rows go, ascending, into `slots`.

    No slots and `known` True: the store has every row of this prompt already.
    """

    id: str = ""
    fresh: tuple[Run, ...] = ()
    slots: tuple[Slot, ...] = ()
    arena: str = ""
    known: bool = False

    @property
    def rows(self) -> int:
        """How many fresh rows are to be written."""
        return sum(slot.rows for slot in self.slots)


class Save(msgspec.Struct, frozen=True):
    """What the store remembers about a staged save until it is committed."""

    namespace: Namespace
    tokens: Tokens
    reuse: Reuse
    staged: Staged
    owner: str


def new_staged(slots: Sequence[Slot], spans: Sequence[Span], length: int, arena: str) -> Staged:
    """A staged save whose slots hold the positions that `spans` leave."""
    fresh = tuple(gaps(spans, 0, length))
    return Staged(id=uuid.uuid4().hex, fresh=fresh, slots=tuple(slots), arena=arena)


def check_reuse(reuse: Reuse, length: int) -> None:
    """`PlanError` unless the spans ascend, stay within the prompt and within the blocks named."""
    at = 0
    for span in reuse.spans:
        inside = at <= span.start < span.stop <= length and 0 <= span.block < len(reuse.blocks)
        if not inside or span.row < 0 or span.source < 0:
            raise PlanError(f"span {span} does not fit a prompt of {length} tokens")
        if span.exact and span.source != span.start:
            raise PlanError(f"span {span} has moved and cannot be exact")
        at = span.stop


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


def reuse_of(plan: ReusePlan, spans: Sequence[Span] | None = None) -> Reuse:
    """What a save needs to know about a plan that was used, in full or only `spans` of it."""
    if plan.declined:
        return Reuse()
    kept = plan.spans if spans is None else tuple(spans)
    edited = any(not span.exact for span in kept)
    names = tuple(block.name for block in plan.blocks)
    return Reuse(kept, names, plan.donors, plan.generation if edited else 0)
