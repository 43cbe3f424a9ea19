"""Cover: which donor's which position covers each position of a request, and the spans of that."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.grams import GRAM, Hashes, gram_hashes, occur_in
from kvshare_store.lookup.policy import Mask
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.node import Node, segments_between
from kvshare_store.plan import Context, Span, contexts_of

Positions = npt.NDArray[np.int64]

_FEW_TOGETHER, _TOGETHER = 1 << 11, 1 << 15
"""Tokens of nodes that are hashed in one go, after the first node and after that."""
_ENOUGH = 64
_HASHED = 16
"""Cells that hashing a token costs."""


class Cover:
    """Which donor's which position covers each position of the request."""

    def __init__(self, request: Tokens) -> None:
        self.request = request
        self.donors: list[Node] = []
        self.donor_of: Positions = np.full(len(request), -1, np.int64)
        self.source_of: Positions = np.full(len(request), -1, np.int64)
        self.exact = 0
        self.continues: Node | None = None
        self.in_place = 0
        """Length of the prefix whose rows stay in the context that they were computed in."""
        self._grams = gram_hashes(request)

    @property
    def covered(self) -> int:
        """Positions that some donor covers."""
        return int(np.count_nonzero(self.donor_of >= 0))

    def sharing_text(self, nodes: Iterable[Node], effort: Effort) -> Iterator[Node]:
        """Those of the nodes that have some gram of the request in them, in the same order.

        The first is looked at alone, since it often is enough; then a few, then many at a time.
        """
        batch: list[Node] = []
        limit = 0
        for node in nodes:
            batch.append(node)
            if sum(each.length for each in batch) >= limit:
                yield from self._sharing(batch, effort)
                batch, limit = [], min(_TOGETHER, max(_FEW_TOGETHER, 16 * limit))
        if batch:
            yield from self._sharing(batch, effort)

    def _sharing(self, nodes: list[Node], effort: Effort) -> list[Node]:
        ends = np.cumsum([node.length for node in nodes])
        if not len(self._grams) or not effort.spend(_HASHED * int(ends[-1])):
            return []
        grams = gram_hashes(np.concatenate([node.tokens for node in nodes]))
        likely = np.flatnonzero(occur_in(grams, self._grams))
        if len(nodes) == 1:  # a few more than can be there by mistake are enough
            likely = likely[: _ENOUGH + len(grams) // 256]
        whose = np.searchsorted(ends, likely, "right")
        within = likely + GRAM <= ends[whose]  # others lie across two nodes
        asked, whose = grams[likely[within]], whose[within]
        places = np.minimum(np.searchsorted(self._ordered, asked), len(self._ordered) - 1)
        sharing = set(whose[self._ordered[places] == asked].tolist())
        return [node for at, node in enumerate(nodes) if at in sharing]

    @functools.cached_property
    def _ordered(self) -> Hashes:
        return np.sort(self._grams)

    def add(self, node: Node, matches: Sequence[Match], shortest: int = 1) -> None:
        """Let `node` cover what is still uncovered, in runs of at least `shortest`. `matches`
        ascend in the request and do not overlap there."""
        if not matches:
            return
        start, source, length = np.asarray(matches, np.int64).T
        position = np.arange(length.sum()) + np.repeat(start - np.cumsum(length) + length, length)
        free = self.donor_of[position] < 0
        if shortest > 1:
            free = _long_runs(free, np.cumsum(length)[:-1], shortest)
        position = position[free]
        self.donor_of[position] = self._index(node)
        self.source_of[position] = position + np.repeat(source - start, length)[free]

    def add_exact(self, node: Node, length: int) -> None:
        """The first `length` positions come from the same positions of `node`, bit for bit."""
        self.exact, self.in_place = length, max(length, self.in_place)
        self._add_prefix(node, 0, length)

    def add_continued(self, node: Node, length: int) -> None:
        """The positions behind the exact prefix, up to `length`, come from the same positions of
        `node`, an edited prompt that begins with the same tokens."""
        self.continues, self.in_place = node, length
        self._add_prefix(node, self.exact, length)

    @property
    def continued(self) -> int:
        """Positions that continue an edited prompt."""
        return self.in_place - self.exact

    def contexts(self) -> tuple[Context, ...]:
        """Behind which edited rows the continued ones were computed."""
        if not self.continued or self.continues is None:
            return ()
        inherited = (c for c in self.continues.contexts if c.start < self.in_place)
        return contexts_of(inherited, (), (), self.exact)

    def _add_prefix(self, node: Node, start: int, stop: int) -> None:
        self.donor_of[start:stop] = self._index(node)
        self.source_of[start:stop] = np.arange(start, stop)

    def _index(self, node: Node) -> int:
        for index, donor in enumerate(self.donors):
            if donor.id == node.id:
                return index
        self.donors.append(node)
        return len(self.donors) - 1

    def pieces(self, keep: Mask) -> Pieces:
        """The kept positions, cut where the donor or the order in it changes and where a kind of
        reuse ends."""
        at = np.flatnonzero(keep)
        if not len(at):
            return Pieces(at, at)
        first = np.ones(len(at), np.bool_)
        donors, sources = self.donor_of[at], self.source_of[at]
        first[1:] = (
            (at[1:] != at[:-1] + 1)
            | (donors[1:] != donors[:-1])
            | (sources[1:] != sources[:-1] + 1)
            | (at[1:] == self.exact)
            | (at[1:] == self.in_place)
        )
        begin = np.flatnonzero(first)
        return Pieces(at[begin], at[np.append(begin[1:], len(at)) - 1] + 1)

    def spans(self, pieces: Pieces) -> tuple[list[Span], list[str]]:
        """Spans of the pieces, and the blocks they index."""
        spans: list[Span] = []
        blocks: dict[str, int] = {}
        names = [tuple(node.blocks) for node in self.donors]  # unpacked once
        places = np.stack((*pieces, self.donor_of[pieces.start], self.source_of[pieces.start]), 1)
        for start, stop, donor, source in places.tolist():
            node, shift = self.donors[donor], start - source
            exact, continued = start < self.exact, self.exact <= start < self.in_place
            for part in segments_between(node, source, stop - shift):
                first, last = max(part.start, source), min(part.stop, stop - shift)
                skip = first - part.start
                block = blocks.setdefault(names[donor][part.block], len(blocks))
                at, row = first + shift, part.row + skip
                spans.append(
                    Span(at, last - first, part.source + skip, block, row, exact, continued)
                )
        return spans, list(blocks)


class Pieces(NamedTuple):
    """Runs of positions `start … stop-1` with rows that lie in a row in one donor."""

    start: Positions
    stop: Positions


def _long_runs(free: Mask, cuts: Positions, shortest: int) -> Mask:
    """Runs of at least `shortest`; a run also ends at each of `cuts`."""
    edges = np.unique(np.concatenate((np.flatnonzero(np.diff(free)) + 1, cuts)))
    lengths = np.diff(edges, prepend=0, append=len(free))
    return free & np.repeat(lengths >= shortest, lengths)
