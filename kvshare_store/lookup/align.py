"""Token-by-token alignment of a request with a donor (paper §4.2, "semantic alignment").

Work is bounded by an `Effort`: what it does not allow is not found.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.grams import Hashes, gram_hashes, occur_in
from kvshare_store.plan import Run
from kvshare_store.tree.edits import Match, Tokens

_MAX_CELLS = 1 << 24
"""Above this many cells (2 MiB of bits each way, 3 to 7 ms) prompts are cut at anchors first."""
_ANCHOR = 16
"""Tokens of an anchor: long enough that a chance repeat is not unique on both sides."""
_ANCHORS = 1024
"""Anchors of one alignment, the longest: choosing among them takes time by the square."""
_SORTED = 64
"""Cells that hashing and sorting a token costs."""
_PLACES = 8
"""Places in a donor that are tried for a passage that occurs in it more often."""
_FIRST_LOOK = 256
_LARGEST_CHARACTER = 0x10FFFF
_CHARACTERS = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix; costs as much as that prefix is long."""
    shorter = min(len(a), len(b))
    at, step = 0, _FIRST_LOOK
    while at < shorter:
        different = a[at : min(at + step, shorter)] != b[at : min(at + step, shorter)]
        first = int(different.argmax())
        if different[first]:
            return at + first
        at, step = at + step, 4 * step
    return shorter


def align(request: Tokens, donor: Tokens, effort: Effort | None = None) -> list[Match]:
    """Equal runs in ascending order on both sides, of a script with the fewest edits.

    Exact up to `_MAX_CELLS`; longer middles are cut at runs of 16 tokens that occur once on both
    sides. What `effort` does not allow stays unmatched.
    """
    effort = effort or Effort()
    head = common_prefix(request, donor)
    tail = common_prefix(request[head:][::-1], donor[head:][::-1])
    rest = slice(head, len(request) - tail), slice(head, len(donor) - tail)
    middle = _align_middle(request[rest[0]], donor[rest[1]], effort)
    return _join(
        [
            Match(0, 0, head),
            *(Match(head + start, head + source, length) for start, source, length in middle),
            Match(len(request) - tail, len(donor) - tail, tail),
        ]
    )


def passages(
    request: Tokens, donor: Tokens, gaps: Sequence[Run], shortest: int, effort: Effort | None = None
) -> list[Match]:
    """Runs of at least `shortest` tokens inside the `gaps` of the request that occur anywhere in
    the donor; from left to right, each as long as it can be.

    An edit script would miss them: it would rather replace what stands in the same place.
    """
    effort = effort or Effort()
    if not effort.spend(_SORTED * (len(request) + len(donor))):
        return []
    ours, theirs = gram_hashes(request, shortest), gram_hashes(donor, shortest)
    wanted = np.zeros(len(ours), np.bool_)
    for gap in gaps:
        wanted[gap.start : max(gap.start, gap.stop - shortest + 1)] = True
    starts = np.flatnonzero(wanted)
    starts = starts[occur_in(ours[starts], theirs)]
    stops = [gap.stop for gap in gaps]
    matches: list[Match] = []
    next_free = 0
    for at in starts.tolist():
        if at < next_free:
            continue
        if not effort.spend(len(donor)):
            break
        piece = request[at : stops[bisect_right(stops, at)]]
        places = np.flatnonzero(theirs == ours[at])[:_PLACES].tolist()
        lengths = [common_prefix(piece, donor[place:]) for place in places]
        longest = max(lengths, default=0)
        if longest >= shortest:
            matches.append(Match(at, places[lengths.index(longest)], longest))
            next_free = at + longest
    return matches


def _align_middle(request: Tokens, donor: Tokens, effort: Effort) -> list[Match]:
    cells = len(request) * len(donor)
    if not cells:
        return []
    if cells <= _MAX_CELLS:
        return _levenshtein(request, donor) if effort.spend(cells) else []
    anchors = _anchors(request, donor, effort)
    matches = []
    at = source = 0
    for anchor in (*anchors, Match(len(request), len(donor), 0)) if anchors else ():
        piece = request[at : anchor.start], donor[source : anchor.source]
        if len(piece[0]) and len(piece[1]):
            matches += [
                Match(at + m.start, source + m.source, m.length) for m in align(*piece, effort)
            ]
        matches.append(anchor)
        at, source = anchor.start + anchor.length, anchor.source + anchor.length
    return matches


def _levenshtein(request: Tokens, donor: Tokens) -> list[Match]:
    script = Levenshtein.opcodes(_sequence(donor), _sequence(request))
    return [Match(start, source, length) for source, start, length in script.as_matching_blocks()]


def _sequence(tokens: Tokens) -> str | list[int]:
    """Tokens as the characters of a string, which rapidfuzz compares without making objects; a
    list where an id is too large for that, such as the hash of an image."""
    if int(tokens.max()) > _LARGEST_CHARACTER:
        return list(tokens.tolist())
    return tokens.tobytes().decode(_CHARACTERS, "surrogatepass")


class _Chain(NamedTuple):
    """Anchors by where they begin in the request: int64 [anchors] each."""

    start: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]


def _anchors(request: Tokens, donor: Tokens, effort: Effort) -> list[Match]:
    """Runs of `_ANCHOR` tokens or more that are unique on both sides: of those that ascend on both
    sides the chain with the most tokens."""
    if not effort.spend(_SORTED * (len(request) + len(donor))):
        return []
    length = min(_ANCHOR, len(request), len(donor))
    runs = _unique_runs(request, donor, length)
    if not effort.spend(_SORTED * len(runs.start) ** 2 // 16):
        return []
    chain: list[Match] = []
    for start, source, length in _heaviest_ascending(runs):
        last = chain[-1] if chain else Match(0, 0, 0)
        # two runs may overlap by some tokens where text between them was removed
        overlap = max(0, last.start + last.length - start, last.source + last.length - source)
        same = common_prefix(request[start + overlap : start + length], donor[source + overlap :])
        if same:
            chain.append(Match(start + overlap, source + overlap, same))
    return chain


def _unique_runs(request: Tokens, donor: Tokens, length: int) -> _Chain:
    ours, theirs = _unique_grams(request, length), _unique_grams(donor, length)
    _, first, second = np.intersect1d(ours[0], theirs[0], True, return_indices=True)
    start, source = ours[1][first], theirs[1][second]
    order = np.argsort(start)
    start, source = start[order], source[order]
    breaks = (np.diff(start, prepend=-2) != 1) | (np.diff(source, prepend=-2) != 1)
    begin = np.flatnonzero(breaks)
    lengths = np.diff(begin, append=len(start)) + length - 1
    longest = np.sort(np.argsort(-lengths, kind="stable")[:_ANCHORS])
    return _Chain(start[begin][longest], source[begin][longest], lengths[longest])


def _unique_grams(tokens: Tokens, length: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes of the grams that occur once, sorted, and where."""
    hashes, first, counts = np.unique(
        gram_hashes(tokens, length), return_index=True, return_counts=True
    )
    return hashes[counts == 1], first[counts == 1]


def _heaviest_ascending(runs: _Chain) -> list[tuple[int, int, int]]:
    """Of runs in the order of their starts, those that begin and end after one another in the
    donor as well and have the most tokens together."""
    start, source, length = runs
    weight = np.zeros(len(start), np.int64)
    before = np.full(len(start), -1)
    for at in range(len(start)):
        fits = (source[:at] < source[at]) & (
            (source + length)[:at] < source[at] + length[at]
        ) & ((start + length)[:at] < start[at] + length[at])  # fmt: skip
        ahead = np.where(fits, weight[:at], 0)
        best = int(ahead.argmax()) if at else -1
        weight[at] = length[at] + (ahead[best] if at else 0)
        before[at] = best if at and fits[best] else -1
    chain = []
    at = int(weight.argmax()) if len(weight) else -1
    while at >= 0:
        chain.append((int(start[at]), int(source[at]), int(length[at])))
        at = int(before[at])
    return chain[::-1]


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
