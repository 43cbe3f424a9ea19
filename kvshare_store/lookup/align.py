"""Token-by-token alignment of a request with a donor (paper §4.2, "semantic alignment").

Work is bounded by an `Effort`: what it does not allow is not found.
"""

from __future__ import annotations

import codecs
import sys
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.ma  # else `np.unique` imports it with the first prompt: 50 ms and more
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.grams import Hashes, gram_hashes, occur_in
from kvshare_store.lookup.policy import edges_of
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.plan import Run

_MAX_CELLS = 1 << 24
"""Above this many cells (2 MiB of bits each way, 3 to 7 ms) prompts are cut at anchors first."""
_ANCHOR = 16
"""Tokens of an anchor: long enough that a chance repeat is not unique on both sides."""
_LOOKED_AT = 2048
"""About so many grams of a long prompt may become anchors."""
_ANCHORS = 512
"""Anchors of one alignment, the longest: choosing among them takes time by the square."""
_HASHED, _CHOSEN, _CALL = 32, 1 << 14, 1 << 15
"""Cells that hashing a token, choosing an anchor, and aligning a piece of any size cost."""
_FEW = 31
"""So few edits are found many times as fast, by looking along the diagonal only."""
_PLACES = 8
"""Places in a donor that are tried for a passage that occurs in it more often."""
_FIRST_LOOK = 256
_LARGEST_CHARACTER = 0x10FFFF
_CHARACTERS = codecs.lookup(f"utf-32-{sys.byteorder[0]}e").name
"""Looked up here, or the first prompt would wait for the import of the codec."""


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
    if not effort.spend(_HASHED * (len(request) + len(donor))):
        return []
    ours, theirs = gram_hashes(request, shortest), gram_hashes(donor, shortest)
    wanted = np.zeros(len(ours), np.bool_)
    for gap in gaps:
        wanted[gap.start : max(gap.start, gap.stop - shortest + 1)] = True
    starts = np.flatnonzero(wanted)
    starts = starts[occur_in(ours[starts], theirs)]
    places_of = _Places(theirs, ours[starts])
    stops = [gap.stop for gap in gaps]
    matches: list[Match] = []
    next_free = 0
    for at in starts.tolist():
        if at < next_free:
            continue
        if not effort.spend(shortest):
            break
        piece = request[at : stops[bisect_right(stops, at)]]
        places = places_of(ours[at])
        lengths = [common_prefix(piece, donor[place:]) for place in places]
        longest = max(lengths, default=0)
        if longest >= shortest:
            matches.append(Match(at, places[lengths.index(longest)], longest))
            next_free = at + longest
    return matches


class _Places:
    """Where a donor has the grams that were asked about."""

    def __init__(self, grams: Hashes, asked: Hashes) -> None:
        at = np.flatnonzero(occur_in(grams, asked))
        order = np.argsort(grams[at], kind="stable")
        self._places, self._grams = at[order], grams[at][order]

    def __call__(self, gram: np.uint64) -> list[int]:
        """The first `_PLACES` of them, ascending."""
        first = int(np.searchsorted(self._grams, gram))
        few = slice(first, first + _PLACES)
        return list(self._places[few][self._grams[few] == gram].tolist())


def _align_middle(request: Tokens, donor: Tokens, effort: Effort) -> list[Match]:
    cells = len(request) * len(donor)
    if not cells:
        return []
    if cells <= _MAX_CELLS:
        return _levenshtein(request, donor) if effort.spend(cells + _CALL) else []
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


def _anchors(request: Tokens, donor: Tokens, effort: Effort) -> list[Match]:
    """Equal runs that begin with `_ANCHOR` tokens which are unique on both sides: of those that
    ascend on both sides the chain with the most tokens."""
    if not effort.spend(_HASHED * (len(request) + len(donor))):
        return []
    length = min(_ANCHOR, len(request), len(donor))
    one_of = 1 << (max(len(request), len(donor)) // _LOOKED_AT).bit_length()
    ours, theirs = (_unique_grams(tokens, length, one_of) for tokens in (request, donor))
    _, first, second = np.intersect1d(ours[0], theirs[0], True, return_indices=True)
    starts, sources = ours[1][first], theirs[1][second]
    order = np.argsort(starts)
    runs: list[Match] = []
    for start, source in zip(starts[order].tolist(), sources[order].tolist(), strict=True):
        last = runs[-1] if runs else Match(0, 0, 0)
        if start - source == last.start - last.source and start < last.start + last.length:
            continue
        same = common_prefix(request[start:], donor[source:]) if effort.spend(0) else 0
        if same:
            runs.append(Match(start, source, same))
    effort.spend(_CHOSEN * min(len(runs), _ANCHORS))  # what was found is used in any case
    return _heaviest_chain(runs)


def _unique_grams(tokens: Tokens, length: int, one_of: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes of the grams that occur once, sorted, and where. Only about every `one_of`th distinct
    gram is looked at: which, its hash decides, so that both sides look at the same."""
    hashes = gram_hashes(tokens, length)
    at = np.flatnonzero(hashes & np.uint64(one_of - 1) == 0)
    distinct, first, counts = np.unique(hashes[at], return_index=True, return_counts=True)
    return distinct[counts == 1], at[first[counts == 1]]


def _heaviest_chain(runs: list[Match]) -> list[Match]:
    """Of the longest runs those that ascend in the donor as well and have the most tokens."""
    runs = sorted(sorted(runs, key=lambda run: -run.length)[:_ANCHORS])
    sources = np.asarray([run.source for run in runs])
    weights = np.zeros(len(runs), np.int64)
    before = np.full(len(runs), -1)
    for at, run in enumerate(runs):
        weights[at] = run.length
        ahead = np.where(sources[:at] < run.source, weights[:at], 0)
        if at and ahead[best := int(ahead.argmax())]:
            weights[at] += ahead[best]
            before[at] = best
    heaviest: list[Match] = []
    at = int(weights.argmax()) if len(runs) else -1
    while at >= 0:
        heaviest.append(runs[at])
        at = int(before[at])
    return _apart(heaviest[::-1])


def _apart(runs: list[Match]) -> list[Match]:
    """Two runs may overlap by some tokens where text between them was removed; the first has
    them."""
    chain: list[Match] = []
    for start, source, length in runs:
        last = chain[-1] if chain else Match(0, 0, 0)
        over = max(0, last.start + last.length - start, last.source + last.length - source)
        if over < length:
            chain.append(Match(start + over, source + over, length - over))
    return chain


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
