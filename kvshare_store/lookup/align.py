"""Token-by-token alignment of a request with a donor (paper §4.2, "semantic alignment").

Work is bounded by an `Effort`: what it does not allow is not found.
"""

from __future__ import annotations

import codecs
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from kvshare_store.lookup.effort import CALL, HASHED, MATCH, Effort
from kvshare_store.lookup.equal_runs import common_prefix, runs_around, seeds_of
from kvshare_store.lookup.places import Places, Positions, Sought
from kvshare_store.lookup.policy import edges_of
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.grams import GRAM
from kvshare_store.plan.spans import Run

_MAX_CELLS = 1 << 24
"""Above this many pairs of tokens (2 MiB of bits each way, 3 to 7 ms) prompts are cut at equal runs
first;"""
_MAX_CELLS_FOR_GRAMS = 1 << 20
"""above this many (0.3 ms) where runs without a gram are of no use: equal runs have all others."""
_SMALL = 1 << 14
"""So few are aligned (in 20 µs) without asking whether they have a gram in common."""
_FEW = 31
"""So few edits are found many times as fast, by looking along the diagonal only."""
_LARGEST_CHARACTER = 0x10FFFF
_CHARACTERS = codecs.lookup(f"utf-32-{sys.byteorder[0]}e").name
"""Looked up here, or the first prompt would wait for the import of the codec."""


def common_suffix(a: Tokens, b: Tokens) -> int:
    """Length of the longest common suffix."""
    return common_prefix(a[::-1], b[::-1])


class Outline(NamedTuple):
    """Equal runs of a request and a donor, where wide pieces between them are not aligned yet."""

    matches: list[Match]
    """In ascending order on both sides."""
    moved: Sequence[Match] = ()
    """Runs that would not be in order, ascending in the request."""
    pieces: Sequence[tuple[Run, Run]] = ()
    """Of both, between matches: they may have more in common."""


def align(
    request: Tokens, donor: Tokens, effort: Effort | None = None, *, least: int = 1
) -> list[Match]:
    """Equal runs in ascending order on both sides, of a script with the fewest edits.

    Exact up to `_MAX_CELLS`, or less where runs of fewer than `least` tokens are of no use. Longer
    middles are cut at their longest equal runs, and what lies between these is aligned in turn
    where it can hold such a run. What `effort` does not allow stays unmatched.
    """
    return outline(request, donor, effort or Effort(), least=least).matches


def outline(
    request: Tokens,
    donor: Tokens,
    effort: Effort,
    *,
    least: int = 1,
    wide: int = sys.maxsize,
    ours: Sought | None = None,
    theirs: Callable[[], Places] | None = None,
) -> Outline:
    """As `align`, but of what lies between equal runs, pieces of `wide` tokens of the request and
    more are left for later. `ours`, `theirs`: the grams of both, where the caller has them."""
    head = common_prefix(request, donor)
    tail = common_suffix(request[head:], donor[head:])
    middle, across = Run(head, len(request) - tail), Run(head, len(donor) - tail)
    cells, found = middle.length * across.length, Outline([])
    if cells > (_MAX_CELLS if least < GRAM else _MAX_CELLS_FOR_GRAMS):
        if effort.spend(HASHED * (middle.length + across.length)):
            places = theirs() if theirs else Places(donor)
            seeds = seeds_of(ours or Sought(request), places, [middle], across)
            found = _cut(request, donor, middle, across, seeds, effort, least, wide)
    elif cells and effort.spend(cells + CALL):
        matches = _levenshtein(request[slice(*middle)], donor[slice(*across)])
        effort.count(MATCH * len(matches))
        found = Outline(_shifted(matches, head, head))
    ends = Match(0, 0, head), Match(middle.stop, across.stop, tail)
    return found._replace(matches=_join([ends[0], *found.matches, ends[1]]))


def between(
    request: Tokens, donor: Tokens, ours: Run, theirs: Run, effort: Effort, least: int
) -> list[Match]:
    """What `align` finds in a piece of each."""
    if not effort.spend(CALL):
        return []
    matches = align(request[slice(*ours)], donor[slice(*theirs)], effort, least=least)
    return _shifted(matches, ours.start, theirs.start)


def _cut(
    request: Tokens,
    donor: Tokens,
    middle: Run,
    across: Run,
    seeds: Positions,
    effort: Effort,
    least: int,
    wide: int,
) -> Outline:
    """The heaviest chain of equal runs, and what aligning the pieces between them finds."""
    start, source = middle.start, across.start
    ours, theirs, whole = request[slice(*middle)], donor[slice(*across)], [Run(0, middle.length)]
    inside = runs_around(ours, theirs, seeds - start, whole, 2 * GRAM, effort)
    runs = _shifted(inside, start, source)
    if not runs:
        return Outline([])
    chain = _heaviest_chain(runs)
    found: list[Match] = []
    later: list[tuple[Run, Run]] = []
    for run in (*chain, Match(middle.stop, across.stop, 0)):
        piece = Run(start, run.start), Run(source, run.source)
        wanted = min(each.length for each in piece) >= max(1, least)
        if wanted and (least < GRAM or _promising(*piece, seeds)):
            if piece[0].length >= wide:
                later.append(piece)
            else:
                found += between(request, donor, *piece, effort, least)
        found.append(run)
        start, source = run.start + run.length, run.source + run.length
    in_order = {run.start for run in chain}
    return Outline(found, [run for run in runs if run.start not in in_order], later)


def _shifted(matches: Sequence[Match], start: int, source: int) -> list[Match]:
    return [Match(start + at, source + there, length) for at, there, length in matches]


def _promising(ours: Run, theirs: Run, seeds: Positions) -> bool:
    """Whether two pieces may have a gram in common. Small ones are quicker aligned than asked."""
    if ours.length * theirs.length <= _SMALL:
        return True
    starts, sources = seeds
    inside = sources[slice(*starts.searchsorted((ours.start, ours.stop - GRAM + 1)))]
    return bool(((inside >= theirs.start) & (inside <= theirs.stop - GRAM)).any())


def _heaviest_chain(runs: list[Match]) -> list[Match]:
    """Of runs that ascend in the request those that ascend in the donor as well and have the most
    tokens."""
    sources: list[int] = []
    """Where the last runs of the best chains begin in the donor, ascending; so do their tokens."""
    chains: list[tuple[int, int]] = []
    """Tokens of each of these chains, and its last run."""
    before: list[int] = []
    for number, run in enumerate(runs):
        at = bisect_left(sources, run.source)
        tokens, last = chains[at - 1] if at else (0, -1)
        before.append(last)
        tokens += run.length
        stop = at
        while stop < len(chains) and chains[stop][0] <= tokens:
            stop += 1
        sources[at:stop], chains[at:stop] = [run.source], [(tokens, number)]
    number = chains[-1][1]
    heaviest: list[Match] = []
    while number >= 0:
        heaviest.append(runs[number])
        number = before[number]
    return _apart(heaviest[::-1])


def _apart(runs: list[Match]) -> list[Match]:
    """Two runs may overlap by some tokens of the donor where text between them was removed; the
    first has them."""
    chain: list[Match] = []
    for start, source, length in runs:
        last = chain[-1] if chain else Match(0, 0, 0)
        over = max(0, last.source + last.length - source)
        if over < length:
            chain.append(Match(start + over, source + over, length - over))
    return chain


# --- fewest edits --------------------------------------------------------------------------------


def _levenshtein(request: Tokens, donor: Tokens) -> list[Match]:
    ours, theirs = _sequence(request), _sequence(donor)
    distance = Levenshtein.distance(theirs, ours, score_cutoff=_FEW)
    hint = None if distance > _FEW else max(1, distance)
    if hint is not None and len(request) == len(donor):
        equal = request == donor
        if len(equal) - np.count_nonzero(equal) == distance:  # tokens were replaced, no more
            starts, stops = edges_of(equal)
            runs = zip(starts.tolist(), (stops - starts).tolist(), strict=True)
            return [Match(at, at, length) for at, length in runs]
    script = Levenshtein.opcodes(theirs, ours, score_hint=hint)
    return [Match(start, source, length) for source, start, length in script.as_matching_blocks()]


def _sequence(tokens: Tokens) -> str | list[int]:
    """Tokens as the characters of a string, which rapidfuzz compares without making objects; a
    list where an id is too large for that, such as the hash of an image."""
    if int(tokens.max()) > _LARGEST_CHARACTER:
        return list(tokens.tolist())
    return tokens.tobytes().decode(_CHARACTERS, "surrogatepass")


def _join(matches: list[Match]) -> list[Match]:
    """Drop empty matches and merge those that touch on both sides."""
    joined: list[Match] = []
    for match in matches:
        if not match.length:
            continue
        last = joined[-1] if joined else None
        if last and (match.start - last.start == match.source - last.source == last.length):
            joined[-1] = Match(last.start, last.source, last.length + match.length)
        else:
            joined.append(match)
    return joined
