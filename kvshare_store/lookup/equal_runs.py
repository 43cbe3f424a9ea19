"""Equal runs of a request and a donor, wherever they stand: seeds, and what grows around them.

Work is bounded by an `Effort`: what it does not allow is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvshare_store.lookup.effort import CALL, HASHED, MATCH, Effort
from kvshare_store.lookup.places import Places, Positions, Sought
from kvshare_store.lookup.policy import Mask
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.grams import GRAM
from kvshare_store.plan.spans import Run

_PER_SEED = 16
"""A passage has a seed for so many of its tokens, or more, if one of each gram is looked at."""
_AHEAD = (16, 64)
"""Tokens by which many runs are made longer at once, first and then."""
_FEW_RUNS = 4
"""So few are made longer one by one, which takes fewer steps than all at once."""
_FEW_SEEDS = 4
_CLOSE = 128
"""Seeds that are no further apart may belong to one run."""
_BITS = 31
_MOST = 1 << _BITS
"""No prompt has so many tokens."""
_SEED, _COMPARED, _RUN = 64, 32, 1 << 10
"""Cells that looking at a seed costs, comparing a token of a stretch, and making a run longer."""
_FIRST_LOOK = 256
_MOST_STRETCHES = 1 << 12
"""The longest that are looked at: text that repeats one token has as many as it has places."""


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


def passages(
    request: Tokens,
    donor: Tokens,
    gaps: Sequence[Run],
    shortest: int,
    effort: Effort | None = None,
    *,
    ours: Sought | None = None,
    theirs: Callable[[], Places] | None = None,
) -> list[Match]:
    """Runs of at least `shortest` tokens inside the `gaps` of the request that occur anywhere in
    the donor; from left to right, each as long as it can be.

    An edit script would miss them: it would rather replace what stands in the same place.
    """
    effort = effort or Effort()
    if not effort.spend(HASHED * sum(gap.length for gap in gaps)):
        return []
    if not theirs and not effort.spend(HASHED * len(donor)):
        return []
    places = theirs() if theirs else Places(donor)
    seeds = seeds_of(ours or Sought(request), places, gaps, Run(0, len(donor)))
    least_seeds = 1 + (shortest - GRAM) // (_PER_SEED * places.one_of)
    return runs_around(request, donor, seeds, gaps, shortest, effort, least_seeds)


def seeds_of(ours: Sought, theirs: Places, gaps: Sequence[Run], across: Run) -> Positions:
    """Where runs may be: int64 [2, n], positions of the request inside `gaps`, ascending, and of
    the donor inside `across` where the same gram seems to be."""
    starts, hashes = ours.inside(gaps, theirs.one_of)
    sources = theirs.find(hashes) - across.start  # of those without a place it is below zero
    found = (sources.view(np.uint32) <= across.length - GRAM).nonzero()[0]
    return np.stack((starts[found], sources[found] + across.start))


def runs_around(
    request: Tokens,
    donor: Tokens,
    seeds: Positions,
    gaps: Sequence[Run],
    shortest: int,
    effort: Effort,
    least_seeds: int = 1,
) -> list[Match]:
    """Equal runs of at least `shortest` tokens around the seeds, from left to right, each as long
    as it can be inside its gap. Where two overlap the longer has what they share.

    Fewer than `least_seeds` close to one another with one shift are ignored.
    """
    if seeds.shape[1] < least_seeds or not effort.spend(_SEED * seeds.shape[1]):
        return []
    starts, sources, lengths = _stretches(seeds, least_seeds)
    if not len(starts):
        return []
    if len(starts) > _MOST_STRETCHES:
        longest = np.sort(np.argsort(-lengths, kind="stable")[:_MOST_STRETCHES])
        starts, sources, lengths = starts[longest], sources[longest], lengths[longest]
    if not effort.spend(_COMPARED * int(lengths.sum())):
        return []
    starts, sources, lengths = _equal(request, donor, starts, sources, lengths, shortest)
    if not effort.spend(_RUN * len(starts)):
        return []
    found = _grown(request, donor, starts, sources, lengths, gaps, effort)
    found = found[found[:, 2] >= shortest]
    effort.count(MATCH * len(found))
    found = found[found[:, 0].argsort(kind="stable")]
    stops = found[:, 0] + found[:, 2]
    outside = np.ones(len(found), np.bool_)  # of a run before it
    outside[1:] = stops[1:] > np.maximum.accumulate(stops)[:-1]
    runs: list[Match] = []
    for run in found[outside].tolist():
        _put(runs, Match(*run), shortest)
    return runs


def _stretches(seeds: Positions, least: int) -> tuple[Positions, Positions, Positions]:
    """Starts, sources and lengths of the stretches in which at least so many seeds follow closely
    on one another with one shift."""
    order = ((seeds[1] - seeds[0] + _MOST) << _BITS) + seeds[0]
    order.sort(kind="stable")  # the fastest for what is mostly sorted
    starts = order & (_MOST - 1)
    edges = np.ones(len(order) + 1, np.bool_)
    edges[1:-1] = order[1:] - order[:-1] > _CLOSE  # also where the shift is another one
    at = edges.nonzero()[0]
    begin, count = at[:-1], at[1:] - at[:-1]
    lengths = starts[at[1:] - 1] + GRAM - starts[begin]
    kept = (count >= least) & ~_phrases(starts[begin], lengths, count)
    begin = begin[kept]
    return starts[begin], starts[begin] + (order[begin] >> _BITS) - _MOST, lengths[kept]


def _phrases(starts: Positions, lengths: Positions, seeds: Positions) -> Mask:
    """Which stretches have few seeds and lie in one that has more: phrases that also stand
    elsewhere in the donor."""
    few = seeds < _FEW_SEEDS
    by_start = np.flatnonzero(~few)[starts[~few].argsort(kind="stable")]
    stops = np.append(0, np.maximum.accumulate(starts[by_start] + lengths[by_start]))
    inside: Mask = starts + lengths <= stops[starts[by_start].searchsorted(starts, "right")]
    return few & inside


def _equal(
    request: Tokens,
    donor: Tokens,
    starts: Positions,
    sources: Positions,
    lengths: Positions,
    shortest: int,
) -> tuple[Positions, Positions, Positions]:
    """The maximal parts of some stretches in which the tokens are equal: those of at least
    `shortest` tokens, and those at an end of their stretch, which may go on."""
    ends = lengths.cumsum()
    at = np.arange(ends[-1]) + (starts - ends + lengths).repeat(lengths)
    equal = request[at] == donor[at + (sources - starts).repeat(lengths)]
    cut = np.ones(len(equal) + 1, np.bool_)  # between two tokens, and at both ends
    cut[1:-1] = equal[1:] != equal[:-1]
    cut[ends] = True
    begin, end = (equal & cut[:-1]).nonzero()[0], (equal & cut[1:]).nonzero()[0] + 1
    whose = ends.searchsorted(begin, "right")
    first = begin - (ends - lengths)[whose]
    at_an_end = (first == 0) | (first + end - begin == lengths[whose])
    kept = at_an_end | (end - begin >= shortest)
    found = (first + starts[whose])[kept]
    return found, found + (sources - starts)[whose[kept]], (end - begin)[kept]


def _grown(
    request: Tokens,
    donor: Tokens,
    starts: Positions,
    sources: Positions,
    lengths: Positions,
    gaps: Sequence[Run],
    effort: Effort,
) -> Positions:
    """The runs that some equal parts, sorted by shift, are of: int64 [n, 3] as in `Match`, each as
    long as it can be inside its gap."""
    bounds = np.asarray([(gap.start, gap.stop) for gap in gaps])
    begin, end = bounds[bounds[:, 1].searchsorted(starts, "right")].T
    shifts, stops = sources - starts, starts + lengths
    # a stretch may reach beyond its gap, but is not made longer there
    room = np.maximum(np.minimum(end, len(donor) - shifts) - stops, 0)
    ahead = np.full(len(starts), _MOST)  # a part that reaches the next one is of the same run
    ahead[:-1] = np.where(shifts[1:] == shifts[:-1], starts[1:] - stops[:-1], _MOST)
    more = _extents(request, donor, stops, stops + shifts, np.minimum(room, ahead), effort)
    edges = np.ones(len(starts) + 1, np.bool_)
    edges[1:-1] = (more < ahead)[:-1]
    at = edges.nonzero()[0]
    first, stops = at[:-1], (stops + more)[at[1:] - 1]
    starts, sources = starts[first], sources[first]
    room = np.maximum(np.minimum(starts - begin[first], sources), 0)
    before = _extents(request, donor, starts - 1, sources - 1, room, effort, -1)
    return np.stack((starts - before, sources - before, stops - starts + before), 1)


def _extents(
    request: Tokens,
    donor: Tokens,
    starts: Positions,
    sources: Positions,
    room: Positions,
    effort: Effort,
    step: int = 1,
) -> Positions:
    """How many tokens are equal from each pair of places on, or back from there if `step` is -1; at
    most as many as there is room, or as the effort allows to look at."""
    counts = np.zeros_like(starts)
    going_on = np.arange(len(starts))
    for ahead in _AHEAD if len(starts) > _FEW_RUNS else ():
        done, left = counts[going_on], room[going_on]
        along = step * (done[:, None] + np.arange(ahead))  # what is clipped has no room
        ours = request.take(starts[going_on, None] + along, mode="clip")
        same = ours == donor.take(sources[going_on, None] + along, mode="clip")
        equal = same.all(1)
        counts[going_on] = np.minimum(done + np.where(equal, ahead, same.argmin(1)), left)
        going_on = going_on[equal & (done + ahead < left)]
    for at in going_on.tolist():
        if not effort.spend(CALL):
            break
        done, left = int(counts[at]), int(room[at] - counts[at])
        more = common_prefix(
            _along(request, int(starts[at]) + step * done, left, step),
            _along(donor, int(sources[at]) + step * done, left, step),
        )
        effort.count(more)
        counts[at] += more
    return counts


def _along(tokens: Tokens, first: int, count: int, step: int) -> Tokens:
    """So many tokens from `first` on, or back from there."""
    return tokens[first:][:count] if step > 0 else tokens[: first + 1][::-1][:count]


def _put(runs: list[Match], new: Match, shortest: int) -> None:
    """Append a run that goes on behind all others. Of two that overlap the longer stays whole, and
    the other if enough of it is left."""
    start, source, length = new
    while runs and (over := runs[-1].start + runs[-1].length - start) > 0:
        last = runs[-1]
        if last.length >= length:
            start, source, length = start + over, source + over, length - over
            break
        runs.pop()
        if last.length - over >= shortest:
            runs.append(last._replace(length=last.length - over))
            break
    if length >= shortest:
        runs.append(Match(start, source, length))
