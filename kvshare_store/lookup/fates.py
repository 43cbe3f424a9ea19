"""What becomes of each token of a request: how it is reused, or which rule recomputes it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.explanation import Part
from kvshare_store.lookup.policy import Mask, ReusePolicy, kept_positions, usable_length
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.node import Node

KINDS = ("exact", "continued", "edited")
EDIT, WINDOW, TAIL, MIN_RUN, DELIMITERS = "edit", "window", "tail", "min_run", "delimiters"
GENERATION, COST, POLICY, SOURCE = "generation", "cost", "policy", "source"


Shared = Iterable[tuple[Node, list[Match]]]
"""Candidates, each with what it shares with the request."""


class Watch(NamedTuple):
    """What was seen of the planner at work. Without a cover it found nothing to reuse."""

    cover: Cover | None
    keep: Mask
    """Positions that the policy does not recompute."""
    capped: Mask
    """Positions that come from behind too much of another source's text."""


class Fates(NamedTuple):
    """Of each position the kind of reuse, or the rule that recomputes it."""

    kinds: npt.NDArray[np.str_]
    """`exact`, `continued`, `edited` or `recomputed`."""
    reasons: npt.NDArray[np.str_]
    """Empty where nothing is recomputed."""


def fates_of(
    request: Tokens,
    policy: ReusePolicy,
    watch: Watch,
    shared: Shared,
    declined: str,
    delimiters: Collection[int],
) -> Fates:
    """`declined`: why the plan reuses nothing, empty if it does."""
    length, cover = len(request), watch.cover
    kinds = np.full(length, "recomputed", "<U10")
    reasons = np.full(length, EDIT if policy.edited else POLICY, "<U16")
    if cover is None:
        if declined != "no_donor":
            reasons[:] = declined
        return Fates(kinds, reasons)
    for reason, dropped in _dropped(request, policy, cover, watch.keep, delimiters):
        reasons[dropped] = reason
    reasons[watch.capped] = SOURCE
    free = cover.donor_of < 0
    for node, matches in shared if policy.edited else ():
        usable = usable_length(policy, node)
        for start, source, count in matches:
            barred = slice(start + max(0, usable - source), start + count)
            reasons[barred][free[barred]] = GENERATION
    reasons[length - 1] = TAIL  # an engine computes it in any case
    if declined:
        reasons[watch.keep] = COST if declined == "no_saving" else declined
        return Fates(kinds, reasons)
    positions = np.arange(length)
    bounds = [positions < cover.exact, positions < cover.in_place]
    kinds[watch.keep] = np.select(bounds, KINDS[:2], KINDS[2])[watch.keep]
    reasons[watch.keep] = ""
    return Fates(kinds, reasons)


def _dropped(
    request: Tokens, policy: ReusePolicy, cover: Cover, keep: Mask, delimiters: Collection[int]
) -> Iterator[tuple[str, Mask]]:
    """The rules of the policy one after another, and what each recomputes that those before it did
    not."""
    none: Collection[int] = ()
    bare = msgspec.structs.replace(
        policy, edit_window=0, edit_growth=0.0, tail=1, min_run=1, delimiters=False
    )
    window = msgspec.structs.replace(
        bare, edit_window=policy.edit_window, edit_growth=policy.edit_growth
    )
    tail = msgspec.structs.replace(window, tail=policy.tail)
    runs = msgspec.structs.replace(tail, min_run=policy.min_run)
    before = cover.donor_of >= 0
    for reason, rules, ids in (
        (TAIL, bare, none), (WINDOW, window, none), (TAIL, tail, none), (MIN_RUN, runs, none),
        (DELIMITERS, policy, delimiters),
    ):  # fmt: skip
        kept = kept_positions(rules, request, cover.donor_of, cover.source_of, cover.in_place, ids)
        yield reason, before & ~kept
        before = kept
    yield COST, before & ~keep


def parts_of(fates: Fates, cover: Cover | None) -> Iterator[Part]:
    """The request in runs of tokens of one fate."""
    kinds, reasons = fates
    length = len(kinds)
    donor_of = np.full(length, -1) if cover is None else cover.donor_of
    source_of = np.full(length, -1) if cover is None else cover.source_of
    reused = kinds != "recomputed"
    same = (kinds[1:] == kinds[:-1]) & (reasons[1:] == reasons[:-1])
    follows = (donor_of[1:] == donor_of[:-1]) & (source_of[1:] == source_of[:-1] + 1)
    cuts = np.flatnonzero(~(same & (follows | ~reused[1:]))) + 1
    starts = [0, *cuts.tolist()] if length else []
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        kind, reason = str(kinds[start]), str(reasons[start])
        if cover is None or not reused[start]:
            yield Part(start, stop, kind, reason)
            continue
        donor = cover.donors[int(donor_of[start])].id
        yield Part(start, stop, kind, reason, donor, int(source_of[start]))


def counted(values: npt.NDArray[np.str_]) -> dict[str, int]:
    """How many positions have each kind, or each reason; those without one are left out."""
    names, counts = np.unique(values[values != ""], return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}
