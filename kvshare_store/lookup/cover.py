"""Cover: which donor's which position covers each position of a request, and the spans of that."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple, cast

import numpy as np
import numpy.ma  # else `np.unique` imports it with the first prompt: 50 ms and more

from kvshare_store.lookup.places import Positions, Sought
from kvshare_store.lookup.policy import Mask, runs_of
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.packed import NAME, Names
from kvshare_store.nodes.vectors import Vector, lexical_vector
from kvshare_store.plan.contexts import Context, contexts_of, cut_contexts
from kvshare_store.plan.spans import Run, Span


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
        self._waiting: list[tuple[Node, Sequence[Match]]] = []

    @property
    def covered(self) -> int:
        """Positions that some donor covers."""
        return self.in_place + int(np.count_nonzero(self.donor_of[self.in_place :] >= 0))

    @cached_property
    def sought(self) -> Sought:
        """The grams behind what stays in place when they are first asked for."""
        return Sought(self.request, self.in_place)

    @cached_property
    def words(self) -> Vector:
        """The vector of the request's words."""
        return lexical_vector(self.request)

    def gaps(self, shortest: int) -> list[Run]:
        """Runs of at least `shortest` positions that nobody covers."""
        start = self.in_place  # all before it is covered
        found = runs_of(self.donor_of[start:] < 0, shortest)
        return [Run(start + gap.start, start + gap.stop) for gap in found]

    def add(self, node: Node, matches: Sequence[Match], shortest: int = 1) -> None:
        """Let `node` cover what is still uncovered, in runs of at least `shortest`. `matches`
        ascend in the request and do not overlap there."""
        if not matches:
            return
        numbers = np.fromiter(chain.from_iterable(matches), np.int64, 3 * len(matches))
        start, source, length = numbers.reshape(-1, 3).T
        position = np.arange(length.sum()) + np.repeat(start - np.cumsum(length) + length, length)
        free = self.donor_of[position] < 0
        if shortest > 1:
            free = _long_runs(free, np.cumsum(length)[:-1], shortest)
        position = position[free]
        self.donor_of[position] = self._index(node)
        self.source_of[position] = position + np.repeat(source - start, length)[free]

    def add_later(self, node: Node, matches: Sequence[Match]) -> None:
        """As `add`, but what else is added meanwhile goes first."""
        self._waiting.append((node, matches))

    def add_what_waits(self) -> None:
        """All of `add_later`."""
        while self._waiting:
            self.add(*self._waiting.pop(0))

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
        inherited = cut_contexts(self.continues.contexts, self.in_place)
        return contexts_of(inherited, (), (), self.exact, self.in_place)

    def matches(self, donor: Node, shortest: int) -> list[Match]:
        """Runs of at least `shortest` that the donor covers, ascending on both sides: one that
        stands before an earlier one in the donor is left out."""
        at = np.flatnonzero(self.donor_of == self._index(donor))
        source = self.source_of[at]
        first = np.flatnonzero(np.diff(at, prepend=-2) - 1 | np.diff(source, prepend=-2) - 1)
        runs = np.stack((at[first], source[first], np.diff(first, append=len(at))), 1)
        found: list[Match] = []
        for match in map(Match._make, runs.tolist()):
            after = found[-1].source + found[-1].length if found else 0
            if match.length >= shortest and match.source >= after:
                found.append(match)
        return found

    def _add_prefix(self, node: Node, start: int, stop: int) -> None:
        self.donor_of[start:stop] = self._index(node)
        self.source_of[start:stop] = np.arange(start, stop)

    def _index(self, node: Node) -> int:
        for index, donor in enumerate(self.donors):
            if donor.id == node.id:
                return index
        self.donors.append(node)
        return len(self.donors) - 1

    def pieces(self, keep: Mask) -> list[Piece]:
        """The kept positions, cut where the donor or the order in it changes and where a kind of
        reuse ends."""
        cut = np.ones(len(keep) + 1, np.bool_)  # between two positions, and at both ends
        cut[1:-1] = (
            (keep[1:] != keep[:-1])
            | (self.donor_of[1:] != self.donor_of[:-1])
            | (self.source_of[1:] - self.source_of[:-1] != 1)
        )
        cut[[self.exact, self.in_place]] = True
        begin, stops = (keep & cut[:-1]).nonzero()[0], (keep & cut[1:]).nonzero()[0] + 1
        columns = begin, stops, self.donor_of[begin], self.source_of[begin]
        return list(map(Piece._make, zip(*(each.tolist() for each in columns), strict=True)))

    def spans(self, pieces: Sequence[Piece]) -> tuple[list[Span], list[str]]:
        """Spans of the pieces, and the blocks they index."""
        spans: list[Span] = []
        blocks: dict[str, int] = {}
        donors = [_unpacked(node) for node in self.donors]
        for start, stop, donor, source in pieces:
            names, segments, starts = donors[donor]
            shift, end = start - source, source + stop - start
            exact, continued = start < self.exact, self.exact <= start < self.in_place
            for part in segments[bisect_right(starts, source) - 1 : bisect_left(starts, end)]:
                first, length = part.start, part.length
                skip = source - first if first < source else 0
                if first + length > end:
                    length = end - first
                name = names[NAME * part.block : NAME * (part.block + 1)]
                block = blocks.setdefault(name, len(blocks))
                at, origin, row = first + skip + shift, part.source + skip, part.row + skip
                spans.append(Span(at, length - skip, origin, block, row, exact, continued))
        return spans, list(blocks)


class Piece(NamedTuple):
    """Positions `start … stop-1`, whose rows lie in a row in one donor, from `source` on."""

    start: int
    stop: int
    donor: int
    """Index into the cover's donors."""
    source: int


def placeholder_runs(pieces: Sequence[Piece]) -> int:
    """How many runs before the end of the last piece no piece has."""
    at = runs = 0
    for piece in pieces:
        runs += piece.start > at
        at = piece.stop
    return runs


def _unpacked(node: Node) -> tuple[str, Sequence[Span], list[int]]:
    """The text of the names of its blocks, of which few may be used; its segments, and where these
    start: looked at many times."""
    segments = tuple(node.segments)
    return cast(Names, node.blocks).text, segments, [segment.start for segment in segments]


def _long_runs(free: Mask, cuts: Positions, shortest: int) -> Mask:
    """Runs of at least `shortest`; a run also ends at each of `cuts`."""
    edges = np.unique(np.concatenate((np.flatnonzero(np.diff(free)) + 1, cuts)))
    lengths = np.diff(edges, prepend=0, append=len(free))
    return free & np.repeat(lengths >= shortest, lengths)
