"""Token-by-token alignment of a request with a donor (paper §4.2, "semantic alignment")."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.ma  # else `np.unique` imports it with the first prompt: 50 ms and more
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from kvshare_store.tree.edits import Match, Tokens

_MAX_CELLS = 1 << 27
"""Above this many cells (16 MiB of bits each way) the prompts are cut at anchors first."""
_ANCHOR = 16
"""Tokens of an anchor: long enough that a chance repeat is not unique on both sides."""

_PLACES = 8
"""Places in a donor that are tried for a passage that occurs in it more often."""

_MIX = np.uint64(0x9E3779B97F4A7C15)


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if different.size else shorter


GRAM = 8
"""Tokens of a gram: text that shares none has no run worth a seam in common."""


def gram_hashes(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """A hash of the `GRAM` tokens from each position on; empty for shorter prompts."""
    count = len(tokens) - GRAM + 1
    hashed = np.zeros(max(count, 0), np.uint64)
    for offset in range(GRAM if count > 0 else 0):
        hashed = (hashed ^ tokens[offset : offset + count].astype(np.uint64)) * _MIX
        hashed ^= hashed >> np.uint64(29)
    return hashed


def occur_in(
    grams: npt.NDArray[np.uint64], others: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Which of `grams` are among `others`; np.isin takes several times longer for a few hundred."""
    if not len(others):
        return np.zeros(len(grams), np.bool_)
    ordered = np.sort(others)
    places = np.searchsorted(ordered, grams)
    found: npt.NDArray[np.bool_] = ordered[np.minimum(places, len(ordered) - 1)] == grams
    return found


def align(request: Tokens, donor: Tokens) -> list[Match]:
    """Equal runs in ascending order on both sides, of a script with the fewest edits.

    Exact up to `_MAX_CELLS`; longer middles are cut at runs of 16 tokens that occur once on both
    sides, so that memory stays bounded.
    """
    head = common_prefix(request, donor)
    tail = common_prefix(request[head:][::-1], donor[head:][::-1])
    middle = _align_middle(request[head : len(request) - tail], donor[head : len(donor) - tail])
    matches = [Match(head + m.start, head + m.source, m.length) for m in middle]
    return _join(
        [
            Match(0, 0, head),
            *matches,
            Match(len(request) - tail, len(donor) - tail, tail),
        ]
    )


def passages(piece: Tokens, donor: Tokens, shortest: int) -> list[Match]:
    """Runs of `piece` that occur in `donor`, the longest first found from left to right.

    An edit script would miss them: it would rather replace what stands in the same place.
    """
    ours, theirs = gram_hashes(piece), gram_hashes(donor)
    matches = []
    at = 0
    while at + shortest <= len(piece):
        places = np.flatnonzero(theirs == ours[at])[:_PLACES]
        lengths = [common_prefix(piece[at:], donor[place:]) for place in places]
        longest = max(lengths, default=0)
        if longest >= shortest:
            matches.append(Match(at, int(places[lengths.index(longest)]), longest))
        at += max(longest - GRAM + 1, 1) if longest < shortest else longest
    return matches


def _align_middle(request: Tokens, donor: Tokens) -> list[Match]:
    if not len(request) or not len(donor):
        return []
    if len(request) * len(donor) <= _MAX_CELLS:
        return _levenshtein(request, donor)
    matches = []
    at = source = 0
    for anchor in (*_anchors(request, donor), Match(len(request), len(donor), 0)):
        piece = request[at : anchor.start], donor[source : anchor.source]
        if 0 < len(piece[0]) * len(piece[1]) <= _MAX_CELLS:
            matches += [Match(at + m.start, source + m.source, m.length) for m in align(*piece)]
        matches.append(anchor)
        at, source = anchor.start + anchor.length, anchor.source + anchor.length
    return matches


def _levenshtein(request: Tokens, donor: Tokens) -> list[Match]:
    script = Levenshtein.opcodes(donor.tolist(), request.tolist())
    return [
        Match(op.dest_start, op.src_start, op.src_end - op.src_start)
        for op in script
        if op.tag == "equal"
    ]


def _anchors(request: Tokens, donor: Tokens) -> list[Match]:
    """Runs of `_ANCHOR` tokens unique on both sides, the longest chain ascending on both."""
    ours, theirs = _unique_grams(request), _unique_grams(donor)
    pairs = sorted((at, theirs[gram]) for gram, at in ours.items() if gram in theirs)
    chain: list[Match] = []
    for at, source in _longest_ascending(pairs):
        last = chain[-1] if chain else Match(0, 0, 0)
        if at < last.start + last.length or source < last.source + last.length:
            continue
        chain.append(Match(at, source, common_prefix(request[at:], donor[source:])))
    return [match for match in chain if match.length]


def _unique_grams(tokens: Tokens) -> dict[bytes, int]:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, min(_ANCHOR, len(tokens)))
    _, first, counts = np.unique(windows, axis=0, return_index=True, return_counts=True)
    return {windows[at].tobytes(): int(at) for at in first[counts == 1]}


def _longest_ascending(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Longest subsequence whose second members ascend (patience sorting)."""
    tops: list[int] = []
    top_index: list[int] = []
    before: list[int] = []
    for index, (_, source) in enumerate(pairs):
        pile = bisect_left(tops, source)
        before.append(top_index[pile - 1] if pile else -1)
        tops[pile : pile + 1] = [source]
        top_index[pile : pile + 1] = [index]
    chain = []
    at = top_index[-1] if top_index else -1
    while at >= 0:
        chain.append(pairs[at])
        at = before[at]
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
