"""What the alignment of a crafted prompt costs, in counted work: no clock decides here."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.lookup import align as align_module
from kvshare_store.lookup import equal_runs
from kvshare_store.lookup.align import align
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.equal_runs import common_prefix, passages
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import PRESETS
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.index import NamespaceIndex
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Run, Span
from tests.support.block_names import block, text_of

LONG = 131_072
CELLS = 1 << 26
"""Pairs of tokens that may be compared for one plan, whatever the prompt: `Effort`'s own number."""
CALLS = 20_000
"""Comparisons of two runs, each a few microseconds."""
MATCH, CALL = 1 << 12, 1 << 15
"""Pairs that are compared in the time that an equal run takes, and in that of such a comparison."""


class Clock:
    """Stands still unless a test moves it: then only counted work ends an alignment."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Counts what the alignment does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.cells = self.calls = self.matches = 0
        opcodes, prefix = align_module.Levenshtein.opcodes, equal_runs.common_prefix

        def counted_opcodes(a: Sequence[int], b: Sequence[int], **hint: int | None) -> object:
            script = opcodes(a, b, **hint)
            self.cells += len(a) * len(b)
            self.matches += len(script.as_matching_blocks())
            return script

        def counted_prefix(a: Tokens, b: Tokens) -> int:
            self.calls += 1
            return prefix(a, b)

        patch.setattr(align_module, "Levenshtein", SimpleNamespace(
            opcodes=counted_opcodes, distance=align_module.Levenshtein.distance
        ))  # fmt: skip
        for module in (align_module, equal_runs):
            patch.setattr(module, "common_prefix", counted_prefix)

    @property
    def cost(self) -> int:
        """All of it, in pairs that are compared."""
        return self.cells + MATCH * self.matches + CALL * self.calls


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def noise(seed: int, length: int, low: int = 0, high: int = 30_000) -> Tokens:
    return np.random.default_rng(seed).integers(low, high, length).astype(np.int32)


def repeated(length: int, period: int) -> Tokens:
    return np.resize(np.arange(period, dtype=np.int32), length)


def every_gram(seed: int, length: int) -> Tokens:
    """Every 8-gram of two values, each with a token of its own after it."""
    count = np.arange(length // 9 + 1) + seed
    grams = [100 + (count >> bit & 1) for bit in range(8)] + [200 + count * 9 % 5000]
    return np.stack(grams, 1).ravel()[:length].astype(np.int32)


def shuffled(tokens: Tokens, piece: int) -> Tokens:
    pieces = tokens[: len(tokens) // piece * piece].reshape(-1, piece)
    return pieces[np.random.default_rng(5).permutation(len(pieces))].ravel()


def changed(tokens: Tokens, every: int) -> Tokens:
    copy = tokens.copy()
    copy[::every] = 30_001
    return copy


def between_passages(tokens: Tokens, run: int, passage: int = 40) -> Tokens:
    """Passages of the text, and behind each a run of the tokens."""
    inside = np.arange(LONG) % (run + passage) < run
    return np.where(inside, tokens, TEXT).astype(np.int32)


def two_values(seed: int) -> Tokens:
    return noise(seed, LONG, 100, 102)


TEXT = noise(0, LONG)
CRAFTED: dict[str, Callable[[], tuple[Tokens, list[Tokens]]]] = {
    "one token": lambda: (
        np.full(LONG, 7, np.int32),
        [
            np.concatenate(([9], np.full(LONG - at, 7, np.int32))).astype(np.int32)
            for at in range(8)
        ],
    ),
    "periods": lambda: (repeated(LONG, 7), [repeated(LONG, 8 + at) for at in range(8)]),
    "every gram, no passage": lambda: (
        np.concatenate((TEXT[: LONG // 2], noise(1, LONG // 2, 100, 102))),
        [TEXT, *(every_gram(at, LONG) for at in range(7))],
    ),
    "every second token": lambda: (changed(TEXT, 2), [TEXT]),
    "every 24th token": lambda: (changed(TEXT, 24), [TEXT, changed(TEXT, 23)]),
    "moved pieces": lambda: (shuffled(TEXT, 32), [TEXT, shuffled(TEXT, 48), shuffled(TEXT, 8)]),
    "two tokens at random": lambda: (two_values(1), [two_values(2 + at) for at in range(8)]),
    "two tokens at random between passages": lambda: (
        between_passages(two_values(1), 180),
        [between_passages(two_values(2), 180)],
    ),
    "every second token between passages": lambda: (
        between_passages(changed(TEXT, 2), 40, 24),
        [TEXT, changed(TEXT, 24)],
    ),
    "large ids": lambda: (changed(TEXT + (1 << 30), 24), [TEXT + (1 << 30)]),
}


def plan(request: Tokens, donors: Sequence[Tokens], policy: str) -> ReusePlan:
    tree, index = DeltaTree(), NamespaceIndex(64)
    for number, tokens in enumerate(donors):
        starts = range(0, len(tokens), 64)
        node = Node(
            id=str(number),
            namespace="n",
            token_bytes=tokens.astype(np.int32).tobytes(),
            segments=tuple(Span(at, min(64, len(tokens) - at), at, at // 64, 0) for at in starts),
            blocks=tuple(block(f"{number}/{at}") for at in starts),
            exact_rows=len(tokens),
        )
        tree.add(node)
        index.add(node, Vectors(lexical_vector(node.tokens), None))
    planner = Planner(StoreConfig(home="none", min_saving_ms=-1e9), lambda: Effort(clock=Clock()))
    return planner.plan(
        request,
        Nominator(tree, index),
        PRESETS[policy],
        CostModel(),
        tier_of=lambda name: "host",
        row_bytes=1,
    ).plan


@pytest.mark.parametrize("policy", ["balanced", "aggressive"])
@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_prompt_costs_bounded_work(work: Work, name: str, policy: str) -> None:
    request, donors = CRAFTED[name]()
    found = plan(request, donors, policy)
    assert work.cells <= CELLS
    assert work.calls <= CALLS
    assert work.cost <= CELLS
    for span in found.spans:  # what was found so far is right
        number, start = text_of(found.block_names[span.block]).split("/")
        at = int(start) + span.row
        there = donors[int(number)][at : at + span.length]
        assert there.tolist() == request[span.start : span.stop].tolist()


def test_a_long_prompt_with_ordinary_edits_is_aligned_in_full(work: Work) -> None:
    request = TEXT.copy()
    for at in range(500, LONG, 1_000):
        request[at : at + 5] = 30_001
    request = np.concatenate((request[:40_000], noise(9, 300), request[40_700:]))
    found = plan(request, [TEXT, noise(2, LONG)], "aggressive")
    assert found.reused >= LONG - 700 - 5 * 132


def test_work_ends_when_the_time_is_over() -> None:
    clock = Clock()
    effort = Effort(clock=clock)
    clock.now = 1.0
    request = changed(TEXT, 24)
    found = align(request, TEXT, effort)
    assert sum(match.length for match in found) <= 24, "only common ends, which cost nothing"
    assert passages(request, TEXT, [Run(0, LONG)], 16, effort) == []
    short = changed(TEXT[:1_000], 24)
    assert sum(match.length for match in align(short, TEXT[:1_000], effort)) > 900, "a short prompt"


def test_some_effort_is_kept_for_the_gaps() -> None:
    effort = Effort(cells=1 << 20, clock=Clock())
    effort.reserve = 0.5
    assert not effort.spend(1 << 19)
    effort.reserve = 0.0
    assert effort.spend(1 << 19)
    assert not effort.spend(1 << 19)


# --- passages -----------------------------------------------------------------------------------


def test_a_run_whose_grams_also_stand_elsewhere_is_made_longer_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table knows the first place of each gram, so a long run falls into parts."""
    copied = [noise(50 + at, 200) for at in range(20)]
    own = [noise(80 + at, 200) for at in range(20)]
    text = np.concatenate([part for pair in zip(own, copied, strict=True) for part in pair])
    donor = np.concatenate((*copied, noise(100, 10), text))
    gaps, at, compared = [Run(0, len(text))], len(donor) - len(text), list[int]()

    def counted(a: Tokens, b: Tokens) -> int:
        compared.append(common_prefix(a, b))
        return compared[-1]

    monkeypatch.setattr(equal_runs, "common_prefix", counted)
    assert passages(text, donor, gaps, 96) == [Match(0, at, len(text))]
    assert 0 < sum(compared) < len(text), "each part up to the next one only"
    text[4_100] = 5
    halves = [Match(0, at, 4_100), Match(4_101, at + 4_101, len(text) - 4_101)]
    assert passages(text, donor, gaps, 96) == halves


def test_a_passage_is_found_wherever_it_moved() -> None:
    donor = noise(3, 600)
    request = np.concatenate((noise(4, 50), donor[400:500], noise(5, 30), donor[10:90]))
    gaps = [Run(0, len(request))]
    assert passages(request, donor, gaps, 40) == [Match(50, 400, 100), Match(180, 10, 80)]
    assert passages(request, donor, gaps, 90) == [Match(50, 400, 100)]
    assert passages(request, donor, [Run(60, 120), Run(185, 260)], 40) == [
        Match(60, 410, 60), Match(185, 15, 75),
    ]  # fmt: skip


def test_parts_that_are_too_short_for_a_passage_cost_nothing() -> None:
    """A stretch where every second token is another falls into thousands of them."""
    request = between_passages(changed(TEXT, 2), 40, 24)
    tracemalloc.start()
    found = passages(request, TEXT, [Run(0, LONG)], 16, Effort(clock=Clock()))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) > 1_000
    assert most < 8 << 20


def test_the_longest_of_several_places_is_taken() -> None:
    donor = np.concatenate((noise(6, 20), noise(7, 10), noise(6, 40)))
    assert passages(noise(6, 30), donor, [Run(0, 30)], 16) == [Match(0, 30, 30)]
