"""ReusePlan: which rows of which blocks fill which positions, and what is left to compute. `editor`
moves the rows there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from kvshare_store.plan.contexts import Context
from kvshare_store.plan.spans import Reused, Run, Span, gaps

Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
LONGEST_S, LONGEST_PATIENCE_S = 1e9, 600.0
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=LONGEST_S)]
Patience = Annotated[float, msgspec.Meta(ge=0.0, le=LONGEST_PATIENCE_S)]
LABEL_CHARS = 128
Label = Annotated[str, msgspec.Meta(max_length=LABEL_CHARS)]
"""What clients say: checked when it is decoded, so that sums stay numbers and names short."""


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
    assumed_speed: float = 0.0
    """Tokens per second of prefill that `saving_ms` rests on, where none was measured yet; 0 where
    one was. A daemon of the release before does not say."""
    policy: str = ""
    quality_bound: float = 0.0
    """The operator's bound, where it made the policy stricter than it would have been."""
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
