"""The quality policy against a spelled-out reference, and that requests can only tighten it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.config import StoreConfig, policy_names
from kvshare_store.errors import ConfigError
from kvshare_store.lookup.policy import (
    PRESETS,
    ReusePolicy,
    configured_policy,
    kept_positions,
    runs_of,
    stricter_policy,
)

policies = st.builds(
    ReusePolicy,
    name=st.sampled_from(["faithful", "balanced", "aggressive"]),
    edited=st.booleans(),
    edit_window=st.integers(0, 12),
    edit_growth=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    delimiters=st.booleans(),
    min_run=st.integers(0, 6),
    tail=st.integers(0, 6),
    max_generation=st.integers(0, 4),
)


class Covered(msgspec.Struct):
    """What the planner found: which donor's which position covers each position."""

    request: np.ndarray
    donor_of: np.ndarray
    source_of: np.ndarray
    exact: int


@st.composite
def covers(draw: st.DrawFn) -> Covered:
    """An exact prefix, then pieces of up to three donors and of none."""
    exact = draw(st.integers(0, 8))
    donors, sources = [0] * exact, list(range(exact))
    for _ in range(draw(st.integers(0, 6))):
        donor, length = draw(st.integers(-1, 2)), draw(st.integers(1, 12))
        start = draw(st.integers(0, 40))
        donors += [donor] * length
        sources += [-1] * length if donor < 0 else list(range(start, start + length))
    if len(donors) < 2:
        exact, donors, sources = 0, [-1, -1], [-1, -1]
    request = draw(st.lists(st.integers(0, 5), min_size=len(donors), max_size=len(donors)))
    return Covered(
        np.asarray(request, np.int32),
        np.asarray(donors, np.int64),
        np.asarray(sources, np.int64),
        min(exact, len(donors) - 1),
    )


def reference(policy: ReusePolicy, cover: Covered, delimiters: Collection[int]) -> list[bool]:
    """The rules of the policy, one position at a time."""
    length = len(cover.request)
    donor, source = cover.donor_of.tolist(), cover.source_of.tolist()

    def covered(at: int) -> bool:
        return donor[at] >= 0 and (policy.edited or at < cover.exact)

    def seam(at: int) -> bool:
        if at == 0:
            return source[0] != 0
        return not (donor[at - 1] == donor[at] and source[at - 1] + 1 == source[at])

    def window(edge: int) -> int:
        """Tokens recomputed from a seam on."""
        before = next((at for at in range(edge - 1, -1, -1) if covered(at)), -1)
        if before >= 0 and donor[before] != donor[edge]:
            return policy.edit_window
        expected = source[before] + 1 if before >= 0 else 0
        size = max(edge - before - 1, abs(source[edge] - expected))
        grown = max(8, math.ceil(policy.edit_growth * size))
        return min(policy.edit_window, grown) if policy.edit_growth else policy.edit_window

    keep = [covered(at) for at in range(length)]
    for edge in range(length):
        if covered(edge) and seam(edge):
            for at in range(edge, min(length, edge + window(edge))):
                keep[at] = False
    for at in range(length):
        if at >= length - policy.tail:
            keep[at] = False
    for at in range(length):
        if keep[at] and (at == 0 or not keep[at - 1]):
            stop = next((end for end in range(at, length) if not keep[end]), length)
            if stop - at < policy.min_run:
                keep[at:stop] = [False] * (stop - at)
    for at in range(cover.exact, length):
        if policy.delimiters and cover.request[at] in delimiters:
            keep[at] = False
    return [(at < cover.exact or keep[at]) and at < length - 1 for at in range(length)]


def kept(policy: ReusePolicy, cover: Covered, delimiters: Collection[int] = ()) -> list[bool]:
    arrays = cover.donor_of.copy(), cover.source_of.copy()
    mask = kept_positions(policy, cover.request, *arrays, cover.exact, delimiters)
    assert (arrays[0] == cover.donor_of).all()
    return [bool(value) for value in mask]


@given(policies, covers(), st.frozensets(st.integers(0, 5)))
def test_against_the_reference(
    policy: ReusePolicy, cover: Covered, delimiters: frozenset[int]
) -> None:
    assert kept(policy, cover, delimiters) == reference(policy, cover, delimiters)


@given(policies, covers())
def test_the_exact_prefix_is_kept_and_the_last_position_is_not(
    policy: ReusePolicy, cover: Covered
) -> None:
    found = kept(policy, cover, {0, 1, 2})
    assert all(found[: cover.exact])
    assert not found[-1]
    assert all(donor >= 0 for donor, keep in zip(cover.donor_of, found, strict=True) if keep)


def line(*pieces: tuple[int, int, int]) -> Covered:
    """Pieces of (donor, source, length); a leading (0, 0, n) is the exact prefix."""
    donors = [d for d, _, length in pieces for _ in range(length)]
    sources = [s + i if d >= 0 else -1 for d, s, length in pieces for i in range(length)]
    exact = pieces[0][2] if pieces[0][:2] == (0, 0) else 0
    return Covered(
        np.arange(len(donors), dtype=np.int32), np.asarray(donors), np.asarray(sources), exact
    )


def runs(policy: ReusePolicy, cover: Covered) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in runs_of(np.asarray(kept(policy, cover)))]


@pytest.mark.parametrize(
    ("cover", "expected"),
    [
        (line((0, 0, 10), (-1, -1, 2), (0, 12, 20)), [(0, 10), (16, 31)]),  # replaced
        (line((0, 0, 10), (0, 15, 20)), [(0, 10), (14, 29)]),  # deleted
        (line((0, 0, 10), (-1, -1, 3), (0, 10, 20)), [(0, 10), (17, 32)]),  # inserted
        (line((0, 0, 10), (1, 10, 20)), [(0, 10), (14, 29)]),  # another donor
        (
            line(
                (0, 5, 20),
            ),
            [(4, 19)],
        ),  # starts in the middle
    ],
    ids=["replaced", "deleted", "inserted", "another donor", "middle"],
)
def test_a_window_follows_every_kind_of_edit(
    cover: Covered, expected: list[tuple[int, int]]
) -> None:
    assert runs(ReusePolicy("balanced", edit_window=4), cover) == expected


def test_short_runs_and_the_tail_are_recomputed() -> None:
    cover = line((0, 0, 10), (-1, -1, 2), (0, 12, 5), (-1, -1, 1), (0, 18, 30))
    policy = ReusePolicy("balanced", min_run=6, tail=8)
    assert runs(policy, cover) == [(0, 10), (18, 40)]
    assert runs(msgspec.structs.replace(policy, min_run=5), cover) == [(0, 10), (12, 17), (18, 40)]


def test_delimiters_are_refreshed_after_a_deletion_too() -> None:
    cover = line((0, 0, 10), (0, 15, 10), (-1, -1, 1), (0, 26, 10))
    policy = ReusePolicy("faithful", delimiters=True)
    found = kept(policy, cover, {3, 12, 25})
    assert [at for at, keep in enumerate(found) if not keep] == [12, 20, 25, 30]


def test_short_lines_are_no_short_runs() -> None:
    cover = line((0, 0, 10), (-1, -1, 2), (0, 12, 30))
    policy = ReusePolicy("faithful", delimiters=True, min_run=12)
    found = kept(policy, cover, {18, 24, 30, 36})
    assert [at for at, keep in enumerate(found) if not keep] == [10, 11, 18, 24, 30, 36, 41]


# --- who may ask for what -----------------------------------------------------------------------


@given(policies, st.sampled_from(policy_names()), covers(), st.frozensets(st.integers(0, 5)))
def test_a_request_is_never_served_more_than_was_configured(
    configured: ReusePolicy, asked: str, cover: Covered, delimiters: frozenset[int]
) -> None:
    given_ = stricter_policy(configured, asked)
    assert given_.max_generation <= configured.max_generation
    for more, allowed in zip(
        kept(given_, cover, delimiters), kept(configured, cover, delimiters), strict=True
    ):
        assert allowed or not more


@given(policies, st.sampled_from(policy_names()))
def test_laxer_is_ignored_and_stricter_is_granted(configured: ReusePolicy, asked: str) -> None:
    names = policy_names()
    given_ = stricter_policy(configured, asked)
    if names.index(asked) >= names.index(configured.name):
        assert given_ == configured
    else:
        assert given_.name == asked
        assert not given_.edited or PRESETS[asked].edited
        assert given_.edit_window >= PRESETS[asked].edit_window
        assert given_.min_run >= PRESETS[asked].min_run
        assert given_.tail >= PRESETS[asked].tail
        assert given_.max_generation <= PRESETS[asked].max_generation


def test_nobody_asked() -> None:
    configured = PRESETS["balanced"]
    assert stricter_policy(configured, None) is configured


@pytest.mark.parametrize("asked", ["", "reckless", "EXACT"])
def test_an_unknown_policy_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match="is not one of off, exact, faithful"):
        stricter_policy(PRESETS["balanced"], asked)


def test_presets_get_laxer_in_order() -> None:
    assert tuple(PRESETS) == policy_names()
    ordered = [PRESETS[name] for name in policy_names()]
    for strict, lax in itertools.pairwise(ordered):
        assert strict.edited <= lax.edited
    edited = ordered[2:]
    for strict, lax in itertools.pairwise(edited):
        assert strict.edit_window >= lax.edit_window
        assert strict.min_run >= lax.min_run
        assert strict.tail >= lax.tail
        assert strict.max_generation <= lax.max_generation


def test_settings_override_the_preset() -> None:
    config = StoreConfig(policy="balanced", edit_window=3, delimiters=True, max_generation=0)
    policy = configured_policy(config)
    assert (policy.edit_window, policy.delimiters, policy.max_generation) == (3, True, 0)
    assert (policy.min_run, policy.tail) == (PRESETS["balanced"].min_run, PRESETS["balanced"].tail)
