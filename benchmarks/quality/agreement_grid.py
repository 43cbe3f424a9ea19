"""The methods and parameters whose frontier is drawn."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from benchmarks.methods.base import Method
from benchmarks.methods.cacheblend import blended, cacheblend, dhd
from benchmarks.methods.epic import Epic
from benchmarks.methods.kvshare import KVShare, kvshare, prefix
from kvshare_store.lookup.policy import PRESETS, ReusePolicy

Lineup = Literal["presets", "short", "frontier", "wide"]
"""Which methods a run compares: the shipped ones, some, those that are reported, or the grid that
the presets were chosen from."""


def windowed(
    window: int,
    *,
    growth: float = 0.0,
    tail: int = 1,
    min_run: int = 2,
    delimiters: bool = False,
) -> ReusePolicy:
    """The paper's policy with other parameters."""
    return msgspec.structs.replace(
        PRESETS["aggressive"],
        edit_window=window,
        edit_growth=growth,
        tail=tail,
        min_run=min_run,
        delimiters=delimiters,
    )


def spelled(policy: ReusePolicy) -> str:
    """A policy's parameters in a few letters: window, growth, tail, min_run, delimiters."""
    parts = [f"window {policy.edit_window}"]
    if policy.edit_growth:
        parts = [f"window {policy.edit_growth:g} x edit to {policy.edit_window}"]
    if policy.tail > 1:
        parts.append(f"tail {policy.tail}")
    if policy.min_run > 2:
        parts.append(f"min_run {policy.min_run}")
    return ", ".join([*parts, *(["delimiters"] if policy.delimiters else [])])


def presets(delimiters: Collection[int]) -> list[Method]:
    """The policies as they are shipped; the first reuses prefixes only."""
    named = ("aggressive", "balanced", "faithful")
    return [prefix(), *(kvshare(name, delimiters) for name in named)]


def published(*, wide: bool) -> list[Method]:
    """Selection rules that others published."""
    blends = [cacheblend(share) for share in (0.05, 0.15, 0.30)]
    if not wide:
        return [*blends, Epic(16), dhd(0.15)]
    epics = [Epic(k) for k in (8, 16, 32)]
    deviations = [dhd(share) for share in (0.05, 0.15, 0.30)]
    return [*blends, cacheblend(0.15, "v"), *epics, *deviations]


def windows(delimiters: Collection[int], *, wide: bool) -> list[Method]:
    """Our own knobs; `wide` is the grid that the presets were chosen from."""
    policies = [windowed(window) for window in (8, 16, 24, 32, 64)]
    policies += [windowed(64, growth=growth, min_run=8) for growth in (2, 8)]
    policies += [windowed(8, delimiters=True)]
    if wide:
        policies += [windowed(64, tail=32, min_run=64)]
        policies += [windowed(64, growth=growth, min_run=8) for growth in (1, 3, 4, 6)]
        policies += [windowed(most, growth=4, min_run=8) for most in (48, 96)]
        policies += [windowed(64, growth=4, min_run=min_run) for min_run in (2, 16)]
        policies += [windowed(64, growth=4, min_run=8, tail=4)]
        policies += [windowed(16, min_run=32), windowed(32, tail=32), windowed(96, tail=32)]
        policies += [windowed(4), windowed(48), windowed(8, min_run=16), windowed(16, min_run=16)]
        policies += [windowed(8, tail=8), windowed(8, tail=8, delimiters=True)]
        policies += [windowed(16, tail=8, delimiters=True), windowed(16, tail=16)]
        policies += [windowed(16, delimiters=True), windowed(32, min_run=32)]
        policies += [windowed(16, tail=16, min_run=32), windowed(32, tail=16, min_run=32)]
        policies += [windowed(32, tail=32, delimiters=True), windowed(48, tail=32, min_run=48)]
        policies += [windowed(64, tail=32, delimiters=True)]
    return [KVShare(spelled(policy), policy, delimiters) for policy in policies]


def combined(delimiters: Collection[int], *, wide: bool) -> list[Method]:
    """Windows after edits, and HKVD among what they leave."""
    pairs = [(windowed(8), 0.05)]
    if wide:
        pairs += [(windowed(4), 0.05), (windowed(4), 0.1), (windowed(16, min_run=32), 0.05)]
        pairs += [(windowed(8, delimiters=True), 0.05), (windowed(8), 0.15)]
    return [blended(policy, spelled(policy), share, delimiters) for policy, share in pairs]


def grid(delimiters: Collection[int], lineup: Lineup = "frontier") -> list[Method]:
    """All methods of a run."""
    if lineup == "presets":
        return presets(delimiters)
    if lineup == "short":
        return [*presets(delimiters), cacheblend(0.15), Epic(16), dhd(0.15)]
    wide = lineup == "wide"
    return [
        *presets(delimiters),
        *published(wide=wide),
        *windows(delimiters, wide=wide),
        *combined(delimiters, wide=wide),
    ]
