"""Spans: runs of positions that are filled from the rows of one block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec


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


def clip_spans(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    """The parts of `spans` inside `start … stop-1`."""
    return [clipped for span in spans if (clipped := span.clip(start, stop)) is not None]


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
