"""The choices of what to recompute that `learned` compares, and the windows beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from benchmarks.methods.base import Method
from benchmarks.methods.chosen import (
    Chosen,
    Positions,
    dependants,
    highest,
    of_donor,
    passage_starts,
    until,
)
from benchmarks.methods.dependence import Dependence, Weights
from benchmarks.methods.kvshare import KVShare, kvshare
from benchmarks.quality.agreement_grid import spelled, windowed
from kvshare_store.lookup.policy import PRESETS, Mask

Lineup = Literal["short", "report", "pairs", "tune"]
By = Literal["attended", "deviation"]
Base = Literal["no window", "window 8", "2 x edit", "balanced"]
_BASES = {
    "no window": PRESETS["aggressive"],
    "window 8": windowed(8, min_run=8),
    "2 x edit": windowed(64, growth=2, min_run=8),
    "balanced": PRESETS["balanced"],
}


class Known(NamedTuple):
    """What a choice may look at."""

    prompt: Sequence[int]
    donor: Sequence[int]
    newline: int
    own: Dependence
    """From full compute of this prompt, by its positions: what no store knows beforehand."""
    learned: Dependence | None
    """From the family's earlier prompts, by position of the donor; None if there are none."""


def methods(known: Known, lineup: Lineup) -> list[Method]:
    """All methods of a run."""
    return [*windows(), *_CHOICES[lineup](known)]


def windows() -> list[Method]:
    """Windows alone, from the most reuse to the least: the frontier to beat."""
    policies = [windowed(8), windowed(16), windowed(24), windowed(64, growth=2, min_run=8)]
    return [
        kvshare("aggressive"),
        *(KVShare(spelled(policy), policy) for policy in policies),
        kvshare("balanced"),
        kvshare("faithful"),
    ]


# --- the ideas -----------------------------------------------------------------------------------


def by_share(
    known: Known, base: Base, by: By, share: float, block: int = 1, *, oracle: bool = False
) -> Method:
    """A share of what the base leaves, the positions that depended most."""
    pick = partial(highest, share=share, block=block)
    return _picked(known, base, f"{by} {share:.0%}{_blocks(block)}", by, pick, oracle)


def by_rest(
    known: Known, base: Base, by: By, rest: float, block: int = 1, *, oracle: bool = False
) -> Method:
    """As many as leave no more than `rest`: many positions of one family and few of another."""
    pick = partial(until, rest=rest, block=block)
    return _picked(known, base, f"{by} to {rest:g}{_blocks(block)}", by, pick, oracle)


def _blocks(size: int) -> str:
    return f", blocks of {size}" if size > 1 else ""


def _picked(
    known: Known,
    base: Base,
    name: str,
    by: By,
    pick: Callable[[Weights, Mask], Mask],
    oracle: bool,
) -> Method:
    label = f"{'oracle' if oracle else 'learned'} {name} + {base}"
    if known.learned is None and not oracle:
        return KVShare(label, PRESETS["balanced"])

    def choice(source: Positions, kept: Mask) -> Mask:
        if oracle or known.learned is None:
            return pick(getattr(known.own, by), kept)
        return pick(of_donor(getattr(known.learned, by), source), kept)

    return Chosen(label, _BASES[base], choice)


def lexical(known: Known, base: Base, window: int) -> Chosen:
    """A window at later recurrences of rare tokens of the edits and their windows."""

    def choice(source: Positions, kept: Mask) -> Mask:
        return dependants(known.prompt, known.donor, source, kept, window)

    return Chosen(f"lexical {window} + {base}", _BASES[base], choice)


def starts(known: Known, base: Base, k: int) -> Chosen:
    """The first tokens of each passage."""

    def choice(source: Positions, kept: Mask) -> Mask:
        return passage_starts(known.prompt, known.newline, source, kept, k)

    return Chosen(f"starts {k} + {base}", _BASES[base], choice)


# --- which of them -------------------------------------------------------------------------------


def _short(known: Known) -> list[Method]:
    return [by_share(known, "balanced", "attended", 0.1), lexical(known, "balanced", 8)]


def _report(known: Known) -> list[Method]:
    return [
        by_share(known, "window 8", "attended", 0.1),
        by_share(known, "window 8", "attended", 0.1, block=4),
        by_share(known, "window 8", "deviation", 0.1),
        by_share(known, "balanced", "attended", 0.1),
        by_rest(known, "window 8", "attended", 0.1),
        by_rest(known, "window 8", "attended", 0.3),
        lexical(known, "2 x edit", 4),
        starts(known, "2 x edit", 8),
    ]


def _pairs(known: Known) -> list[Method]:
    return [
        by_share(known, "window 8", "attended", 0.1),
        by_rest(known, "window 8", "attended", 0.1),
        by_rest(known, "window 8", "attended", 0.3),
        by_share(known, "window 8", "attended", 0.1, oracle=True),
        by_rest(known, "window 8", "attended", 0.1, oracle=True),
        lexical(known, "2 x edit", 4),
        lexical(known, "2 x edit", 16),
        starts(known, "2 x edit", 8),
    ]


def _tune(known: Known) -> list[Method]:
    found: list[Method] = [
        by_share(known, "no window", "attended", 0.2),
        by_share(known, "no window", "attended", 0.3),
        by_share(known, "window 8", "attended", 0.1),
        by_share(known, "window 8", "attended", 0.2),
        by_share(known, "balanced", "attended", 0.1),
        by_rest(known, "no window", "attended", 0.1),
        by_rest(known, "no window", "attended", 0.3),
        by_rest(known, "no window", "attended", 1.0),
        by_rest(known, "window 8", "attended", 0.1),
        by_rest(known, "window 8", "attended", 0.3),
        by_rest(known, "no window", "attended", 0.3, oracle=True),
        lexical(known, "window 8", 8),
        lexical(known, "2 x edit", 4),
        lexical(known, "2 x edit", 16),
        starts(known, "no window", 16),
        starts(known, "window 8", 16),
        starts(known, "2 x edit", 8),
    ]
    bases: tuple[tuple[Base, float], ...] = (("no window", 0.2), ("window 8", 0.1))
    for base, share in bases:
        found += [
            by_share(known, base, "deviation", share),
            by_share(known, base, "attended", share, block=8),
            by_share(known, base, "attended", share, oracle=True),
            by_share(known, base, "deviation", share, oracle=True),
        ]
    return found


_CHOICES: dict[Lineup, Callable[[Known], list[Method]]] = {
    "short": _short,
    "report": _report,
    "pairs": _pairs,
    "tune": _tune,
}
