"""Histories that a framework rewrote are recognised as what they are, however long they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.lookup import align, search
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.places import KnownPlaces
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import PRESETS
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.index import LONG, NamespaceIndex
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Run, Span
from kvshare_store.simulate.planned_reuse import PlannedReuse
from kvshare_store.simulate.prompts import Prompt
from tests.support.block_names import block, text_of

LENGTHS = {3_000: 40, 50_000: 40, 100_000: 8}
"""How many histories of each length are stored."""
MIDDLE = 50_000
SPENT = 0.7
"""Share of what the alignments of a plan may cost that none of these takes: nothing is left out."""
SYSTEM, MESSAGE, THOUGHT, NEW = 600, 250, 80, 300
TURNS = 1
WORDS = np.cumsum(1 / np.arange(1, 5_001))


def text(seed: int, length: int) -> Tokens:
    """Words as often as in a language: whoever wrote it, long prompts have much the same ones."""
    draws = np.random.default_rng(seed).random(length) * WORDS[-1]
    return WORDS.searchsorted(draws).astype(np.int32)


@cache
def messages(seed: int, length: int) -> tuple[tuple[Tokens, Tokens], ...]:
    """Thoughts and what was said; a phrase that every message begins with."""
    phrase = text(0, 12)
    return tuple(
        (text(1_000 * seed + 2 * at + 7, THOUGHT),
         np.concatenate((phrase, text(1_000 * seed + 2 * at + 8, MESSAGE))))
        for at in range((length - SYSTEM) // (MESSAGE + THOUGHT))
    )  # fmt: skip


def history(seed: int, length: int, turns: int | None = None) -> list[Tokens]:
    return [text(1, SYSTEM), *(part for both in messages(seed, length)[:turns] for part in both)]


def appended(length: int) -> Iterator[Tokens]:
    yield from history(0, length)


def compacted(length: int) -> Iterator[Tokens]:
    system, *said = history(0, length)
    yield system
    yield text(2, NEW)
    yield from said[len(said) // 4 * 2 :]


def replaced(length: int) -> Iterator[Tokens]:
    parts = history(0, length)
    parts[len(parts) // 4 * 2] = text(3, NEW)
    yield from parts


def without_thoughts(length: int) -> Iterator[Tokens]:
    yield text(1, SYSTEM)
    yield from (said for _, said in messages(0, length))


def other_thoughts(length: int) -> Iterator[Tokens]:
    yield text(1, SYSTEM)
    for at, (_, said) in enumerate(messages(0, length)):
        yield text(50_000 + at, THOUGHT)
        yield said


def reordered(length: int) -> Iterator[Tokens]:
    said = messages(0, length)
    yield text(1, SYSTEM)
    for at in np.random.default_rng(4).permutation(len(said)).tolist():
        yield np.concatenate(said[at])


def other_agent(length: int) -> Iterator[Tokens]:
    yield text(5, SYSTEM)
    yield from history(0, length)[1:]


def dated(length: int) -> Iterator[Tokens]:
    system, *said = history(0, length)
    yield np.concatenate((system[:20], text(6, 5), system[25:]))
    yield from said


KINDS: dict[str, tuple[Callable[[int], Iterator[Tokens]], float]] = {
    "appended": (appended, 0.99),
    "front deleted": (compacted, 0.93),
    "one message replaced": (replaced, 0.93),
    "thoughts stripped": (without_thoughts, 0.6),
    "other thoughts": (other_thoughts, 0.5),
    "re-ordered": (reordered, 0.6),
    "another agent's prompt": (other_agent, 0.93),
    "a date": (dated, 0.93),
}
"""How each is made, and the share of all but the system prompt and what is new that a plan must
reuse: a window of 48 tokens is computed after each place where text was taken out or moved."""


class Shelf:
    """Stored histories, each at its last turns."""

    def __init__(self, length: int) -> None:
        self.tree, self.index = DeltaTree(), NamespaceIndex(64)
        self.effort = Effort()
        self.planner = Planner(StoreConfig(home="none", min_saving_ms=-1e9), self.new_effort)
        count = len(messages(0, length))
        for seed in range(LENGTHS[length]):
            for turns in range(count - TURNS + 1, count + 1):
                self.add(np.concatenate(history(seed, length, turns)), f"{seed}/{turns}")

    def new_effort(self) -> Effort:
        """As much work as any plan may cost, whatever the clock says."""
        self.effort = Effort(seconds=math.inf)
        return self.effort

    def add(self, tokens: Tokens, name: str) -> None:
        node = Node(
            id=name,
            namespace="n",
            token_bytes=tokens.tobytes(),
            segments=(Span(0, len(tokens), 0, 0, 0),),
            blocks=(block(name),),
            exact_rows=len(tokens),
        )
        self.tree.add(node)
        self.index.add(node, Vectors(lexical_vector(tokens), None))

    def plan(self, request: Tokens) -> ReusePlan:
        return self.planner.plan(
            request,
            Nominator(self.tree, self.index),
            PRESETS["balanced"],
            CostModel(),
            tier_of=lambda name: "host",
            row_bytes=1,
        ).plan


shelf = cache(Shelf)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rewritten_history_is_found(kind: str, length: int) -> None:
    make, share = KINDS[kind]
    parts = [*make(length), text(9, 100)]
    request = np.concatenate(parts).astype(np.int32)
    plan = shelf(length).plan(request)
    assert shelf(length).effort.left >= (1 - SPENT) * Effort().left
    for span in plan.spans:
        node = shelf(length).tree.get(text_of(plan.block_names[span.block]))
        assert node is not None
        there = node.tokens[span.row : span.row + span.length]
        assert there.tolist() == request[span.start : span.stop].tolist()
    reused = sum(max(0, span.stop - max(span.start, SYSTEM)) for span in plan.spans)
    assert reused >= share * (len(request) - SYSTEM - NEW - 100)


def test_what_is_in_another_order_is_not_aligned_with_what_stood_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Passages cover it."""
    between, lengths = align.between, list[int]()

    def noted(request: Tokens, donor: Tokens, ours: Run, *others: Any) -> list[Match]:
        lengths.append(ours.length)
        return between(request, donor, ours, *others)

    for module in (align, search):
        monkeypatch.setattr(module, "between", noted)
    request = np.concatenate((*reordered(MIDDLE), text(9, 100)))
    assert shelf(MIDDLE).plan(request).reused >= 0.85 * len(request)
    assert max(lengths, default=0) < MESSAGE


def test_words_that_are_said_again_are_found_between_changed_text() -> None:
    """A table knows their first place alone, and they are too short for a passage. A phrase says
    that the changed text is worth a look."""
    again, phrase = text(80, 80), text(81, 10)
    said, changed = (
        [
            np.concatenate((again, text(seed + at, 70), phrase, text(seed + at + 50, 70)))
            for at in range(4)
        ]
        for seed in (200, 300)
    )
    own = Shelf(3_000)
    own.add(np.concatenate((history(70, LONG)[1], *history(71, LONG), *said)), "before")
    request = np.concatenate((text(82, 5), *history(71, LONG), *changed, text(83, 100)))
    plan = own.plan(request)
    copies = range(len(request) - 100 - sum(map(len, changed)), len(request) - 100, len(changed[0]))
    for start in copies:
        whole = (span for span in plan.spans if span.stop == start + len(again))
        assert any(span.length >= len(again) - 48 for span in whole)


def test_what_is_new_in_a_long_history_is_looked_for_elsewhere() -> None:
    """A result that another conversation has got too."""
    length = MIDDLE
    known = messages(5, length)[20][1]
    request = np.concatenate((*history(0, length), known, text(9, 100))).astype(np.int32)
    plan = shelf(length).plan(request)
    assert plan.reused >= len(request) - 100 - 50 - 12
    assert {text_of(plan.block_names[span.block])[0] for span in plan.spans} == {"0", "5"}


def test_the_turn_before_one_that_has_just_become_long_is_found() -> None:
    """Beside prompts that are long already and have less of it."""
    own = Shelf(3_000)
    before = np.concatenate(history(90, LONG))[: LONG - 100]
    own.add(before, "before")
    own.add(np.concatenate((before[: 2 * SYSTEM], text(92, LONG))), "another")
    request = np.concatenate((text(93, 5), before[5:], text(91, 200)))
    plan = own.plan(request)
    assert plan.donors[0] == "before"
    assert plan.reused >= len(before) - 100


def test_of_the_turns_of_a_conversation_the_longest_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has all that the others have."""
    own, looked_at = Shelf(3_000), list[str]()
    for turns in range(3, 8):
        own.add(np.concatenate(history(70, 3_000, turns)), f"turn {turns}")
    places = KnownPlaces.of
    monkeypatch.setattr(
        KnownPlaces, "of", lambda self, node: looked_at.append(node.id) or places(self, node)
    )
    said = (said for _, said in messages(70, 3_000)[:7])
    plan = own.plan(np.concatenate((text(1, SYSTEM), *said, text(9, 100))))
    assert plan.donors[0] == "turn 7"
    assert not {f"turn {turns}" for turns in range(3, 7)} & {*looked_at}


def test_side_by_side_each_conversation_goes_on_from_its_own_turns() -> None:
    """All begin with one system prompt, whose date is another in each request. If each went on from
    what the others made of it, rows would be used up after so many requests as may build on one
    another; they last for so many turns."""
    arm = PlannedReuse(StoreConfig(home="none", min_saving_ms=-1e9), 4)
    turns, side, new = 6, 3, 40
    assert PRESETS["balanced"].max_generation in range(turns, turns * side)
    for at in range(turns * side):
        turn, speaker = divmod(at, side)
        said = [text(100 + 10 * speaker + each, new) for each in range(turn + 1)]
        system = text(1, 1_500)
        system[20:25] = text(500 + at, 5)
        prompt = np.concatenate((system, *said))
        reused = arm.serve(Prompt(prompt, np.zeros(0, np.int32), float(at), "", ""))
        assert len(prompt) - reused.tokens <= new + 100 or not at
