"""The quality policy: which of the rows that could be reused are recomputed all the same.

Recomputing only what was edited is fast and lets the old value show through wherever unedited text
depends on it; a contiguous window after each edit and the end of the prompt repair most of that.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare_store.config import PolicyName, StoreConfig, policy_names
from kvshare_store.errors import ConfigError
from kvshare_store.lookup.places import Positions
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.plan.spans import Run

Mask = npt.NDArray[np.bool_]
LEAST_WINDOW = 8
"""Tokens recomputed after the smallest edit where windows grow with it."""


class ReusePolicy(msgspec.Struct, frozen=True):
    """What a plan recomputes beyond the edited tokens. Lengths in tokens."""

    name: PolicyName
    edited: bool = True
    """May rows be reused outside the exact prefix?"""
    edit_window: int = 0
    """Tokens recomputed after each edit, at most."""
    edit_growth: float = 0.0
    """The window grows with the edit: so many tokens for each that was inserted or removed, but no
    fewer than `LEAST_WINDOW`. 0: every window is as long as `edit_window`."""
    delimiters: bool = False
    """Recompute delimiter tokens after the first edit: models keep summaries there."""
    min_run: int = 1
    """Reused runs shorter than this are recomputed."""
    tail: int = 1
    """Tokens recomputed at the end of the prompt."""
    max_generation: int = 1
    """Highest generation of a node made with this policy (1: donors are exact)."""


PRESETS: dict[str, ReusePolicy] = {
    "off": ReusePolicy("off", edited=False),
    "exact": ReusePolicy("exact", edited=False),
    "faithful": ReusePolicy("faithful", edit_window=64, min_run=64, tail=32, max_generation=1),
    "balanced": ReusePolicy(
        "balanced", edit_window=48, edit_growth=4.0, min_run=8, max_generation=8
    ),
    "aggressive": ReusePolicy("aggressive", min_run=2, max_generation=8),
}
"""`aggressive` recomputes placeholders only: the paper as written. The other two come from the
frontier of tokens reused against KL (docs/design/policies.md)."""


def configured_policy(config: StoreConfig) -> ReusePolicy:
    """The preset that the configuration names, with the values it overrides."""
    names = ("edit_window", "edit_growth", "delimiters", "min_run", "tail", "max_generation")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return msgspec.structs.replace(PRESETS[config.policy], **given)


def stricter_policy(configured: ReusePolicy, asked: str | None) -> ReusePolicy:
    """What a request gets that asks for policy `asked`: never laxer than the configured one."""
    if asked is None:
        return configured
    names = policy_names()
    if asked not in names:
        raise ConfigError(f"policy {asked!r} is not one of {', '.join(names)}")
    if names.index(asked) >= names.index(configured.name):
        return configured
    preset = PRESETS[asked]
    return ReusePolicy(
        preset.name,
        edited=preset.edited and configured.edited,
        edit_window=max(preset.edit_window, configured.edit_window),
        edit_growth=_stricter_growth(preset.edit_growth, configured.edit_growth),
        delimiters=preset.delimiters or configured.delimiters,
        min_run=max(preset.min_run, configured.min_run),
        tail=max(preset.tail, configured.tail),
        max_generation=min(preset.max_generation, configured.max_generation),
    )


def _stricter_growth(one: float, other: float) -> float:
    """Windows that do not grow are the longest from the first token on."""
    return max(one, other) if one and other else 0.0


def as_strict(policy: PolicyName) -> tuple[str, ...]:
    """The policies that are at least as strict, the given one included."""
    names = policy_names()
    return names[: names.index(policy) + 1]


def continues(policy: ReusePolicy, node: Node) -> bool:
    """Whether a request may go on with the edited rows of `node`, in their own context: nothing
    becomes more approximate by that."""
    known = bool(node.policy and node.contexts)  # releases before did not write them
    allowed = policy.edited and known and node.policy in as_strict(policy.name)
    return allowed and node.generation <= policy.max_generation


def usable_length(policy: ReusePolicy, node: Node) -> int:
    """Of how many leading tokens of `node` the rows may be reused behind other text: of all, or of
    those that are exact."""
    if node.generation < policy.max_generation and (node.exact or continues(policy, node)):
        return node.length
    return node.exact_rows if policy.max_generation else 0


def usable_generation(policy: ReusePolicy, node: Node) -> int:
    """The generation of the rows of `node` that may be reused behind other text: 0 if only exact
    ones may."""
    return node.generation if usable_length(policy, node) > node.exact_rows else 0


def usable_tokens(policy: ReusePolicy, node: Node) -> Tokens:
    """The leading tokens of `node` whose rows may be reused behind other text."""
    return node.tokens[: usable_length(policy, node)]


def kept_positions(
    policy: ReusePolicy,
    request: Tokens,
    donor_of: Positions,
    source_of: Positions,
    in_place: int,
    delimiters: Collection[int] = (),
) -> Mask:
    """Which positions of the request are filled from stored rows.

    `donor_of[i]` is the donor that covers position i (-1: none) and `source_of[i]` its position
    there. Positions below `in_place` are always kept; the last position never is, because the
    engine must compute it to sample.
    """
    # so much of what stays in place decides what is kept behind it
    start = max(0, in_place - policy.min_run - 1)
    if not start:
        return _kept(policy, request, donor_of, source_of, in_place, delimiters)
    keep = np.ones(len(request), np.bool_)
    keep[start:] = _kept(
        policy,
        request[start:],
        donor_of[start:],
        source_of[start:] - source_of[start],
        in_place - start,
        delimiters,
    )
    return keep


def _kept(
    policy: ReusePolicy,
    request: Tokens,
    donor_of: Positions,
    source_of: Positions,
    in_place: int,
    delimiters: Collection[int],
) -> Mask:
    length = len(request)
    starts, stops = _in_order(donor_of, source_of, length if policy.edited else in_place)
    windows = _windows(policy, starts, stops, donor_of, source_of)
    starts = np.maximum.accumulate(starts + windows)  # a window may reach into the next runs
    stops = np.minimum(stops, max(0, length - policy.tail))
    keep = _mask(*_long_runs(starts, stops, policy.min_run), length)
    if policy.delimiters and len(delimiters):
        # after short runs have gone: the lines of code and lists are shorter than `min_run`. What
        # stays in place ends where the first edit is, also where that only removed text
        keep[in_place:] &= ~np.isin(request[in_place:], np.fromiter(delimiters, np.int64))
    keep[:in_place] = True
    keep[length - 1 :] = False
    return keep


def _in_order(
    donor_of: Positions, source_of: Positions, length: int
) -> tuple[Positions, Positions]:
    """Starts and stops of the runs of the first `length` positions that come in order from one
    donor, ascending."""
    donor_of, source_of = donor_of[:length], source_of[:length]
    covered = donor_of >= 0
    cut = np.ones(length + 1, np.bool_)  # between two positions, and at both ends
    cut[1:-1] = (donor_of[1:] != donor_of[:-1]) | (source_of[1:] - source_of[:-1] != 1)
    return (covered & cut[:-1]).nonzero()[0], (covered & cut[1:]).nonzero()[0] + 1


def _windows(
    policy: ReusePolicy,
    starts: Positions,
    stops: Positions,
    donor_of: Positions,
    source_of: Positions,
) -> Positions:
    """How many positions are recomputed from the start of each run on: text was inserted or removed
    before it, or it comes from another donor."""
    windows = np.full(len(starts), policy.edit_window)
    sources = source_of[starts]
    if policy.edit_growth:
        sizes = _edit_sizes(starts, stops, donor_of[starts], sources)
        grown = np.maximum(LEAST_WINDOW, np.ceil(policy.edit_growth * sizes))
        windows = np.minimum(windows, grown).astype(np.int64)
    if len(starts) and starts[0] == sources[0] == 0:
        windows[0] = 0  # where both begin nothing was changed
    return windows


def _edit_sizes(
    starts: Positions, stops: Positions, donors: Positions, sources: Positions
) -> npt.NDArray[np.float64]:
    """Tokens inserted or removed right before each run, whichever are more; a change of donors
    has no end."""
    sizes = np.maximum(starts, sources).astype(np.float64)  # of the first run
    inserted = starts[1:] - stops[:-1]
    removed = np.abs(sources[1:] - sources[:-1] - (stops - starts)[:-1])
    same = donors[1:] == donors[:-1]
    sizes[1:] = np.where(same, np.maximum(inserted, removed), np.inf)
    return sizes


def _long_runs(starts: Positions, stops: Positions, shortest: int) -> tuple[Positions, Positions]:
    """Of runs, some of them empty, those that are at least so long together with those they
    touch."""
    some = starts < stops
    starts, stops = starts[some], stops[some]
    if shortest > 1:
        apart = np.ones(len(starts) + 1, np.bool_)
        apart[1:-1] = starts[1:] != stops[:-1]
        starts, stops = starts[apart[:-1]], stops[apart[1:]]
        long = stops - starts >= shortest
        starts, stops = starts[long], stops[long]
    return starts, stops


def _mask(starts: Positions, stops: Positions, length: int) -> Mask:
    """Positions in one of the runs, which ascend and do not overlap; bool [length]."""
    edges = np.zeros(2 * len(starts) + 2, np.int64)
    edges[1:-1:2], edges[2:-1:2], edges[-1] = starts, stops, length
    return np.repeat(np.arange(len(edges) - 1) % 2 == 1, edges[1:] - edges[:-1])


def edges_of(mask: Mask) -> tuple[Positions, Positions]:
    """Where the maximal runs of True begin, and where each has just ended, ascending."""
    padded = np.zeros(len(mask) + 2, np.bool_)
    padded[1:-1] = mask
    edges = (padded[1:] != padded[:-1]).nonzero()[0]
    return edges[::2], edges[1::2]


def runs_of(mask: Mask, shortest: int = 1) -> list[Run]:
    """Maximal runs of at least `shortest` True, ascending."""
    starts, stops = edges_of(mask)
    long = stops - starts >= shortest
    return [Run(*run) for run in zip(starts[long].tolist(), stops[long].tolist(), strict=True)]
