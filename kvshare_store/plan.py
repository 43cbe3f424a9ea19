"""ReusePlan: which rows of which blocks fill which positions, and what is left to compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import blake3
import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
LONGEST_S, LONGEST_PATIENCE_S = 1e9, 600.0
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=LONGEST_S)]
Patience = Annotated[float, msgspec.Meta(ge=0.0, le=LONGEST_PATIENCE_S)]
LABEL_CHARS = 128
Label = Annotated[str, msgspec.Meta(max_length=LABEL_CHARS)]
"""What clients say: checked when it is decoded, so that sums stay numbers and names short."""


class Run(NamedTuple):
    """Positions `start … stop-1` of a request."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many positions."""
        return self.stop - self.start


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A run of request positions filled from the rows of one block.

    `source` is the position the first row's K was rotated for when it was computed. A span is
    `exact` when it belongs to the exact prefix; then `source == start`. It is `continued` when its
    rows stay in the context that an edited prompt computed them in: the same tokens before them, at
    the same position. All other spans are edited.
    """

    start: int
    length: int
    source: int
    block: int
    """Index into the plan's (or node's) blocks."""
    row: int
    """First row inside that block."""
    exact: bool = False
    continued: bool = False

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + self.length

    @property
    def edited(self) -> bool:
        """Its rows moved, or stand behind other text than the one they were computed behind."""
        return not (self.exact or self.continued)

    @property
    def kind(self) -> str:
        """`exact`, `continued` or `edited`."""
        return "exact" if self.exact else "continued" if self.continued else "edited"

    def clip(self, start: int, stop: int) -> Span | None:
        """The part of this span inside `start … stop-1`, or None."""
        first, last = max(self.start, start), min(self.stop, stop)
        if first >= last:
            return None
        skip = first - self.start
        return Span(
            first,
            last - first,
            self.source + skip,
            self.block,
            self.row + skip,
            self.exact,
            self.continued,
        )


def of_used_blocks(spans: Sequence[Span]) -> tuple[tuple[Span, ...], list[int]]:
    """The spans as they index a list of only the blocks that they use, and the places of these in
    the list that they index now, ascending."""
    used = sorted({span.block for span in spans})
    at = {block: index for index, block in enumerate(used)}
    return tuple(msgspec.structs.replace(span, block=at[span.block]) for span in spans), used


class Context(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """From position `start` on a prompt's rows were computed behind edited rows: these.

    Prompts with the same tokens and contexts up to a position have the same rows up to there.
    """

    start: int
    digest: bytes
    """Of the edited spans, 16 bytes."""
    stop: int = 0
    """Where the last of them ends."""


class BlockRef(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a leased block lies: `offset` bytes into the arena (-1: not resident), and what its
    label must say there. Before the lease only the name is known."""

    name: str
    rows: int = 0
    nbytes: int = 0
    offset: int = -1
    seq: int = 0
    """Number of the copy into that place; no other copy has it."""
    lossy: bool = False
    """A codec has changed these rows: they are not the bytes that the name is of."""


class ReusePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one lookup. Either it has spans and a lease, or `declined` says why not."""

    namespace: str
    tokens: int
    """Length of the request."""
    exact: int = 0
    """Length of the exact prefix."""
    continued: int = 0
    """One past the last position that continues an edited prompt; 0 if none does."""
    contexts: tuple[Context, ...] = ()
    """Of the rows that are continued."""
    spans: tuple[Span, ...] = ()
    blocks: tuple[BlockRef, ...] = ()
    donors: tuple[str, ...] = ()
    stamps: tuple[int, ...] = ()
    """Of each donor, which form of it was planned."""
    generation: int = 0
    """Provenance of the request's KV when this plan is used (0 = exact)."""
    lease: str = ""
    arena: str = ""
    """Id of the shared memory that `BlockRef.offset` points into."""
    saving_ms: float = 0.0
    policy: str = ""
    declined: str = ""
    pooled: tuple[int, ...] = ()
    """Blocks (indexes) of pools. A tenant's prompt never points there: whoever saves on top of this
    plan stores the rows that came from them as the prompt's own."""
    wiped: str = ""
    """Another text after each purge. Whoever keeps copies of rows drops all of them when it
    changes. A daemon of the release before does not say."""

    @property
    def reused(self) -> int:
        """Positions filled from stored rows."""
        return sum(span.length for span in self.spans)

    @property
    def stop(self) -> int:
        """One past the last reused position; what follows is ordinary prefill."""
        return self.spans[-1].stop if self.spans else 0

    def own(self, spans: Iterable[Span]) -> list[Span]:
        """Those of its spans whose rows lie in the namespace itself."""
        return [span for span in spans if span.block not in self.pooled]

    @property
    def block_names(self) -> tuple[str, ...]:
        """What `Span.block` indexes."""
        return tuple(block.name for block in self.blocks)

    def placeholders(self, start: int = 0) -> list[Run]:
        """Runs from `start` up to `stop` that the engine must compute, ascending."""
        return gaps(self.spans, start, self.stop)


class Outcome(msgspec.Struct, frozen=True):
    """What became of a plan. Tokens, bytes, seconds; `failed` is a reason code, or empty: then a
    plan of which no token was reused counts as `not_taken`."""

    exact: Count = 0
    edited: Count = 0
    recomputed: Count = 0
    nbytes: Count = 0
    seconds: Seconds = 0.0
    failed: Label = ""
    cached: Count = 0
    """Tokens that the engine's own prefix cache had, so the plan was not asked for them."""
    continued: Count = 0

    @property
    def reused(self) -> Reused:
        """Tokens that were not computed."""
        return Reused(self.exact, self.continued, self.edited)


def contexts_of(
    inherited: Iterable[Context], spans: Iterable[Span], names: Sequence[str], exact: int = 0
) -> tuple[Context, ...]:
    """The contexts of a prompt's rows: those of the prompt that it continues, and one for the
    edited spans behind that.

    `names`: of the blocks that the spans index. `exact`: length of the prompt's exact prefix. Where
    that is longer than the continued prompt's, its rows stand before those of an inherited context,
    which makes it another one.
    """
    contexts = list(inherited)
    before = [context for context in contexts if context.start < exact]
    if before:
        stop = max(context.stop for context in before)
        contexts = [Context(exact, _digest(before), stop), *contexts[len(before) :]]
    edited = list(_joined(span for span in spans if span.edited))
    if edited:
        made_of = [(s.start, s.length, s.source, names[s.block], s.row) for s in edited]
        contexts.append(Context(edited[0].start, _digest(made_of), edited[-1].stop))
    return tuple(contexts)


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """The same rows in as few spans as possible: an engine loads a part of what was planned."""
    last: Span | None = None
    for span in spans:
        if last is not None and span == _following(last, span.length):
            last = msgspec.structs.replace(last, length=last.length + span.length)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def _following(span: Span, length: int) -> Span:
    """The next rows of the same block, for the next positions."""
    places = {"start": span.stop, "source": span.source + span.length}
    return msgspec.structs.replace(span, row=span.row + span.length, length=length, **places)


def cut_contexts(contexts: Iterable[Context], length: int) -> tuple[Context, ...]:
    """The contexts of the first `length` rows of a prompt. One whose edited rows go on behind them
    is another one: what follows is not what followed there."""
    return tuple(
        c if c.stop <= length else Context(c.start, _digest((c.digest, length)), length)
        for c in contexts
        if c.start < length
    )


def _digest(made_of: Any) -> bytes:
    return blake3.blake3(msgspec.msgpack.encode(made_of)).digest(length=16)


def gaps(spans: Iterable[Span], start: int, stop: int) -> list[Run]:
    """Positions of `start … stop-1` that no span covers. `spans` ascend and do not overlap."""
    return list(_gaps(spans, start, stop))


def _gaps(spans: Iterable[Span], start: int, stop: int) -> Iterator[Run]:
    at = start
    for span in spans:
        if span.start > at:
            yield Run(at, min(span.start, stop))
        at = max(at, span.stop)
        if at >= stop:
            return
    if at < stop:
        yield Run(at, stop)


class Reused(NamedTuple):
    """Tokens of one prompt that need not be computed, by kind."""

    exact: int = 0
    continued: int = 0
    edited: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def kind(self) -> str:
        """The least exact kind that there is."""
        if self.edited:
            return "edited"
        return "continued" if self.continued else "exact"


def reused_of(spans: Iterable[Span]) -> Reused:
    """How many tokens spans cover, by kind."""
    counts = Counter[str]()
    for span in spans:
        counts[span.kind] += span.length
    return Reused(**counts)


def clip_spans(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    """The parts of `spans` inside `start … stop-1`."""
    return [clipped for span in spans if (clipped := span.clip(start, stop)) is not None]
