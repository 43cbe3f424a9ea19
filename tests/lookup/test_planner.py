"""The planner: which rows of which donor, and why none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.nominate import Nominator, Rank
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import PRESETS, ReusePolicy
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.index import NamespaceIndex
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vector_matrix import VectorMatrix
from kvshare_store.nodes.vectors import Vector, Vectors, lexical_vector
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.contexts import Context, contexts_of
from kvshare_store.plan.spans import Span
from kvshare_store.save.staging import contexts_of_rows, reuse_of
from tests.support.block_names import block, text_of

ROW_BYTES = 64
LAX = ReusePolicy("aggressive", min_run=2, max_generation=4)


def text(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 30_000, length)]


class Shelf:
    """Nodes by hand, with a planner over them."""

    def __init__(self, **settings: Any) -> None:
        self.config = StoreConfig(
            **{"block_tokens": 8, "min_prompt_tokens": 8, "min_saving_ms": 0.0} | settings
        )
        self.tree, self.cost = DeltaTree(), CostModel()
        self.index = NamespaceIndex(self.config.block_tokens)
        self.planner = Planner(self.config, lambda: Effort(seconds=math.inf))

    def add(
        self,
        tokens: list[int],
        *,
        generation: int = 0,
        exact_rows: int | None = None,
        semantic: np.ndarray | None = None,
        sources: int = 0,
        policy: str = "aggressive",
        contexts: tuple[Context, ...] = (),
    ) -> Node:
        """One block per 8 tokens; `sources` shifts where the edited rows were computed."""
        array = np.asarray(tokens, np.int32)
        exact = len(tokens) if exact_rows is None else exact_rows
        name = f"{len(self.tree)}"
        segments = []
        for start in range(0, len(tokens), 8):
            stop = min(start + 8, len(tokens))
            for low, high in ((start, min(stop, max(start, exact))), (max(start, exact), stop)):
                if low < high:
                    source = low if high <= exact else low + sources
                    segments.append(Span(low, high - low, source, start // 8, low - start))
        node = Node(
            id=name,
            namespace="n",
            token_bytes=array.tobytes(),
            segments=tuple(segments),
            blocks=tuple(block(f"{name}/{at}") for at in range(-(-len(tokens) // 8))),
            exact_rows=exact,
            generation=generation,
            policy=policy if generation else "",
            contexts=contexts or ((Context(exact, b"edited"),) if generation else ()),
        )
        self.tree.add(node)
        self.index.add(node, Vectors(lexical_vector(array), semantic))
        return node

    def plan(
        self,
        request: list[int],
        policy: ReusePolicy = LAX,
        tier_of: Callable[[str], str | None] = lambda name: "host",
        delimiters: tuple[int, ...] = (),
        rank: Rank | None = None,
    ) -> ReusePlan:
        plan = self.planner.plan(
            np.asarray(request, np.int32),
            Nominator(self.tree, self.index, rank=rank),
            policy,
            self.cost,
            tier_of=tier_of,
            row_bytes=ROW_BYTES,
            delimiters=delimiters,
        ).plan
        self.check(request, plan)
        return plan

    def check(self, request: list[int], plan: ReusePlan) -> None:
        """What holds of every plan: the rows are those of the same tokens in the donor."""
        at = 0
        for span in plan.spans:
            assert span.start >= at
            assert span.length > 0
            at = span.stop
            node, start = text_of(plan.block_names[span.block]).split("/")
            donor = self.tree.get(node)
            assert donor is not None
            assert node in plan.donors
            first = 8 * int(start) + span.row
            assert span.row + span.length <= 8
            there = donor.tokens[first : first + span.length].tolist()
            assert there == request[span.start : span.stop]
            root = {s.start + i: s.source + i for s in donor.segments for i in range(s.length)}
            assert span.source == root[first]
            assert not span.exact or (first == span.start == span.source)
            assert not span.exact or first + span.length <= donor.exact_rows
        assert not plan.spans or at < len(request)
        exact = [i for span in plan.spans if span.exact for i in range(span.start, span.stop)]
        assert exact == list(range(plan.exact))
        assert bool(plan.spans) != bool(plan.declined)


# --- the exact prefix ---------------------------------------------------------------------------


def test_an_identical_prompt_is_all_exact_but_for_its_last_token() -> None:
    shelf = Shelf()
    shelf.add(text(1, 40))
    plan = shelf.plan(text(1, 40))
    assert (plan.exact, plan.reused, plan.generation) == (39, 39, 0)


@pytest.mark.parametrize("policy", ["exact", "faithful", "balanced", "aggressive"])
def test_a_longer_and_a_shorter_prompt(policy: str) -> None:
    shelf = Shelf()
    shelf.add(text(1, 40))
    longer = shelf.plan([*text(1, 40), *text(2, 20)], PRESETS[policy])
    assert (longer.exact, longer.reused) == (40, 40)
    shorter = shelf.plan(text(1, 40)[:21], PRESETS[policy])
    assert (shorter.exact, shorter.reused) == (20, 20)


def test_the_longest_prefix_wins() -> None:
    shelf = Shelf()
    request = text(1, 64)
    shelf.add(request[:20] + text(2, 20))
    best = shelf.add(request[:50] + text(3, 20))
    shelf.add(request[:30] + text(4, 20))
    plan = shelf.plan(request, PRESETS["exact"])
    assert (plan.exact, plan.donors) == (50, (best.id,))


def test_an_exact_prefix_ends_where_the_donor_was_edited() -> None:
    shelf = Shelf()
    request = text(1, 40)
    shelf.add(request, generation=1, exact_rows=21, sources=5)
    plan = shelf.plan(request, PRESETS["exact"])
    assert (plan.exact, plan.reused, plan.generation) == (21, 21, 0)
    more = shelf.plan(request)
    assert (more.exact, more.continued, more.reused, more.generation) == (21, 39, 39, 1)
    assert all(span.source == span.start + 5 for span in more.spans if not span.exact)


def test_exact_rows_are_preferred_to_edited_ones() -> None:
    """The edited prompt is continued behind the exact prefix of another."""
    shelf = Shelf()
    request = text(1, 40)
    shelf.add(request[:24] + text(2, 16))
    edited = Context(3, b"some edited rows")
    shelf.add(request, generation=1, exact_rows=0, contexts=(edited,))
    plan = shelf.plan(request)
    assert (plan.exact, plan.continued, plan.generation) == (24, 39, 1)
    assert plan.contexts == contexts_of([edited], (), (), 24, 39)
    assert [context.start for context in plan.contexts] == [24]


def test_rows_behind_fewer_continued_ones_are_in_another_context() -> None:
    """Behind an exact prefix that the continued prompt lacks, row 35 is not the same if it was
    continued as if it was computed."""
    shelf = Shelf()
    request = text(1, 40)
    shelf.add(request[:24] + text(2, 16))
    shelf.add(request, generation=1, exact_rows=0, contexts=(Context(3, b"some edited rows", 10),))
    longer, shorter = shelf.plan(request), shelf.plan(request[:36])
    assert (longer.continued, shorter.continued) == (39, 35)
    made = [contexts_of_rows(reuse_of(plan), plan.tokens) for plan in (longer, shorter)]
    assert [context.start for contexts in made for context in contexts] == [24, 24]
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("most", "least", "rank", "taken"),
    [
        (7, 3, None, 3),
        (3, 0, None, 3),
        (7, 6, None, 6),
        (7, 0, lambda node: 7 - node.generation, 7),
    ],
)
def test_rows_that_are_nearly_used_up_count_as_less(
    most: int, least: int, rank: Rank | None, taken: int
) -> None:
    """They may be moved eight times. The other prompt has 93 % of the text: that is more only than
    rows of the last generations are, and never more than those of a better rank."""
    shelf = Shelf()
    body = text(1, 3_000)
    for length, generation in ((3_000, most), (2_790, least)):
        exact = 0 if generation else None
        shelf.add(body[:length], generation=generation, exact_rows=exact, policy="balanced")
    request = [*text(4, 5), *body[5:], *text(5, 5)]
    donor = shelf.tree.get(shelf.plan(request, PRESETS["balanced"], rank=rank).donors[0])
    assert donor is not None
    assert donor.generation == taken


# --- continued prompts --------------------------------------------------------------------------


def test_a_continuation_is_no_new_generation() -> None:
    shelf = Shelf()
    last_turn = text(1, 60)
    edited = Context(16, b"some edited rows")
    node = shelf.add(last_turn, generation=4, exact_rows=16, contexts=(edited,))
    plan = shelf.plan(last_turn + text(2, 30))
    assert (plan.exact, plan.continued, plan.reused) == (16, 60, 60)
    assert (plan.generation, plan.contexts, plan.donors) == (4, (edited,), (node.id,))
    assert [(s.exact, s.continued) for s in plan.spans if s.start >= 16] == [(False, True)] * 6


def test_contexts_behind_what_is_continued_are_not_inherited() -> None:
    shelf = Shelf()
    last_turn = text(1, 60)
    contexts = Context(8, b"first"), Context(40, b"second")
    shelf.add(last_turn, generation=2, exact_rows=8, contexts=contexts)
    assert shelf.plan(last_turn[:40] + text(2, 30)).contexts == contexts[:1]


@pytest.mark.parametrize(
    ("policy", "made_under", "continued"),
    [
        ("aggressive", "aggressive", 39),
        ("aggressive", "faithful", 39),
        ("balanced", "aggressive", 0),
        ("balanced", "", 0),
        ("faithful", "faithful", 39),
        ("exact", "faithful", 0),
    ],
)
def test_only_what_is_as_strict_is_continued(policy: str, made_under: str, continued: int) -> None:
    shelf = Shelf()
    request = text(1, 40)
    shelf.add(request, generation=1, exact_rows=8, policy=made_under)
    assert shelf.plan(request, PRESETS[policy]).continued == continued


def test_of_what_may_not_be_built_on_the_exact_rows_are() -> None:
    shelf = Shelf()
    donor = text(1, 80)
    shelf.add(donor, generation=4, exact_rows=60)
    plan = shelf.plan([3, *donor[:70], 4])
    assert (plan.reused, plan.generation) == (60, 1)


def test_an_edit_behind_a_continuation_counts_its_own_donors() -> None:
    shelf = Shelf()
    first, second = text(1, 40), text(2, 80)
    shelf.add(first, generation=1, exact_rows=0)
    shelf.add(text(3, 5) + second)
    plan = shelf.plan(first + second)
    assert (plan.continued, plan.generation) == (40, 1)
    assert plan.reused == 40 + 79


def test_an_edit_that_gains_too_little_for_its_price_is_not_made() -> None:
    shelf = Shelf(approximation_price=0.5)
    donor = text(1, 80)
    shelf.add(donor)
    assert shelf.plan(donor[:60] + text(2, 60) + donor[60:]).reused == 60
    assert shelf.plan(donor[:60] + text(2, 5) + donor[60:]).reused == 79


def test_much_text_is_not_computed_behind_rows_of_the_last_generation() -> None:
    donor = text(1, 80)

    def planned(generation: int, fresh: int) -> ReusePlan:
        shelf = Shelf(approximation_price=0.5)
        shelf.add(donor, generation=generation, exact_rows=30)
        return shelf.plan(donor + text(2, fresh))

    much, little = planned(4, 600), planned(4, 400)
    assert (much.reused, much.continued, much.generation) == (30, 0, 0)
    assert (little.reused, little.continued, little.generation) == (80, 80, 4)
    assert planned(3, 600).continued == 80, "others may build on that"


def test_rows_that_move_for_the_last_time_must_save_more() -> None:
    """Nobody may build on what is computed behind them, so that is computed again with the next
    edit."""
    donor, other = text(1, 80), text(3, 40)

    def planned(generation: int, fresh: int) -> ReusePlan:
        shelf = Shelf(approximation_price=0.25)
        shelf.add(donor, generation=generation, exact_rows=30)
        shelf.add([9, *other])
        return shelf.plan([5, *donor, *text(2, fresh), *other])

    assert (planned(3, 40).reused, planned(3, 40).generation) == (80 + 39, 4)
    much = planned(3, 60)
    assert (much.reused, much.generation) == (30 + 39, 1), "exact rows may move again"
    assert (planned(2, 60).reused, planned(2, 60).generation) == (80 + 39, 3)


def test_behind_rows_of_the_last_generation_nothing_is_spoilt_any_more() -> None:
    shelf = Shelf(approximation_price=0.25)
    told, donor = text(1, 80), text(3, 40)
    shelf.add(told, generation=4, exact_rows=30)
    shelf.add([9, *donor], generation=3, exact_rows=0)
    plan = shelf.plan([*told, *text(2, 100), *donor])
    assert (plan.continued, plan.reused, plan.generation) == (80, 80 + 39, 4)


# --- edited rows --------------------------------------------------------------------------------


def test_an_edit_in_the_middle() -> None:
    shelf = Shelf()
    donor = text(1, 80)
    shelf.add(donor)
    request = donor[:30] + text(2, 5) + donor[33:]
    plan = shelf.plan(request)
    assert (plan.exact, plan.generation) == (30, 1)
    assert [at for s in plan.spans for at in range(s.start, s.stop)] == [
        *range(30),
        *range(35, 81),
    ]


def test_a_window_follows_the_edit() -> None:
    shelf = Shelf()
    donor = text(1, 120)
    shelf.add(donor)
    policy = ReusePolicy("balanced", edit_window=16, tail=16, max_generation=2)
    plan = shelf.plan([*donor[:30], 7, *donor[31:]], policy)
    covered = [at for s in plan.spans for at in range(s.start, s.stop)]
    assert covered == [*range(30), *range(31 + 16, 120 - 16)]


def test_text_that_moved_is_found_where_it_went() -> None:
    shelf = Shelf()
    first, second, third = text(1, 60), text(2, 60), text(3, 60)
    shelf.add(first + second + third)
    plan = shelf.plan(first + third + second)
    assert plan.reused == 179
    assert {span.source - span.start for span in plan.spans} == {0, 60, -60}


def test_several_donors_cover_what_one_does_not() -> None:
    shelf = Shelf()
    parts = [text(seed, 60) for seed in range(4)]
    for at, part in enumerate(parts):
        shelf.add(text(100 + at, 10) + part + text(200 + at, 10))
    request = [token for part in parts for token in [*part, 1]]
    plan = shelf.plan(request)
    assert set(plan.donors) == {"0", "1", "2", "3"}
    assert plan.reused == 240
    two = Shelf(max_donors=2)
    for at, part in enumerate(parts):
        two.add(text(100 + at, 10) + part + text(200 + at, 10))
    assert len(two.plan(request).donors) == 2


def test_donors_are_named_by_how_much_they_give() -> None:
    shelf = Shelf()
    small = shelf.add(text(1, 50) + text(8, 8))
    large = shelf.add(text(9, 8) + text(2, 90))
    plan = shelf.plan(text(1, 50) + text(2, 90) + [5])
    assert plan.donors == (large.id, small.id)


# --- generations --------------------------------------------------------------------------------


@pytest.mark.parametrize(("cap", "generation"), [(0, None), (1, None), (2, 2), (3, 3), (9999, 3)])
def test_generations_are_capped(cap: int, generation: int | None) -> None:
    shelf = Shelf()
    donor = text(1, 80)
    shelf.add(donor, generation=2, exact_rows=0)
    policy = msgspec.structs.replace(LAX, max_generation=cap)
    plan = shelf.plan([*donor[:40], 3, *donor[41:]], policy)
    if generation is None:
        assert plan.declined == "no_donor"
    else:
        assert plan.generation == generation


def test_without_generations_only_exact_rows_are_served() -> None:
    shelf = Shelf()
    donor = text(1, 80)
    shelf.add(donor)
    policy = msgspec.structs.replace(LAX, max_generation=0)
    plan = shelf.plan([*donor[:40], 3, *donor[41:]], policy)
    assert (plan.exact, plan.reused, plan.generation) == (40, 40, 0)


def test_the_highest_generation_of_the_edited_donors_counts() -> None:
    shelf = Shelf()
    first, second = text(1, 60), text(2, 60)
    shelf.add(text(7, 9) + first, generation=1, exact_rows=0)
    shelf.add(text(8, 9) + second, generation=3, exact_rows=0)
    assert shelf.plan(first + second + [1]).generation == 4
    assert shelf.plan([5, *first, 1]).generation == 2


# --- reasons to decline -------------------------------------------------------------------------


def test_policy_off() -> None:
    shelf = Shelf()
    shelf.add(text(1, 40))
    assert shelf.plan(text(1, 40), PRESETS["off"]).declined == "policy_off"


@pytest.mark.parametrize("length", [0, 1, 7])
def test_short_prompt(length: int) -> None:
    shelf = Shelf()
    shelf.add(text(1, 40))
    assert shelf.plan(text(1, 40)[:length]).declined == "short_prompt"


def test_a_single_token_is_short_whatever_was_configured() -> None:
    shelf = Shelf(min_prompt_tokens=0)
    shelf.add(text(1, 40))
    assert shelf.plan(text(1, 1)).declined == "short_prompt"


def test_empty_store() -> None:
    assert Shelf().plan(text(1, 40)).declined == "empty_store"


@pytest.mark.parametrize("policy", ["exact", "balanced"])
def test_no_donor(policy: str) -> None:
    shelf = Shelf()
    shelf.add(text(1, 40))
    assert shelf.plan(text(2, 40), PRESETS[policy]).declined == "no_donor"


def test_a_second_look_compares_no_vectors_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And names whom it would have named otherwise."""
    shelf, nearest, asked = Shelf(candidates=2), VectorMatrix.nearest, list[int]()
    for seed in range(12):
        shelf.add([*text(seed, 40), *text(100, 20)])
    query = lexical_vector(np.asarray([*text(50, 40), *text(100, 20)], np.int32))
    few, many = (Nominator(shelf.tree, shelf.index).by_words(query, count) for count in (2, 8))

    def counted(self: VectorMatrix, vector: Vector, count: int) -> list[tuple[str, float]]:
        asked.append(count)
        return nearest(self, vector, count)

    monkeypatch.setattr(VectorMatrix, "nearest", counted)
    nominator = Nominator(shelf.tree, shelf.index)
    assert nominator.by_words(query, 2, 8) == few == many[:2]
    assert nominator.by_words(query, 8) == many
    assert asked == [8]
    assert len(nominator.by_words(query, 9)) == 9
    assert nominator.by_words(query.copy(), 2) == few
    assert asked == [8, 9, 2]
    asked.clear()
    assert shelf.plan(text(60, 40)).declined == "no_donor"
    assert asked == [8]


def test_nothing_kept() -> None:
    shelf = Shelf()
    shelf.add(text(1, 20) + text(2, 20))
    request = text(3, 20) + text(1, 20)
    assert shelf.plan(request, PRESETS["faithful"]).declined == "nothing_kept"
    assert shelf.plan(request).reused == 19


def test_blocks_gone() -> None:
    shelf = Shelf()
    shelf.add(text(1, 40))
    assert shelf.plan(text(1, 40), tier_of=lambda name: None).declined == "blocks_gone"


def test_no_saving() -> None:
    shelf = Shelf(min_saving_ms=5.0)
    shelf.add(text(1, 40))
    shelf.cost.prefill.value = 39 / 0.006
    plan = shelf.plan(text(1, 40))
    assert plan.saving_ms == pytest.approx(6.0, abs=0.1)
    shelf.cost.load["disk"].value = 39 * ROW_BYTES / 0.002
    assert shelf.plan(text(1, 40), tier_of=lambda name: "disk").declined == "no_saving"
    shelf.cost.prefill.value = 39 / 0.004
    assert shelf.plan(text(1, 40)).declined == "no_saving"


# --- everything at once -------------------------------------------------------------------------


@st.composite
def shelves(draw: st.DrawFn) -> tuple[Shelf, list[int], ReusePolicy]:
    """Some prompts made of shared paragraphs, and a request made of the same."""
    paragraphs = [text(seed, 24) for seed in range(5)]

    def prompt() -> list[int]:
        tokens: list[int] = []
        for which in draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)):
            tokens += paragraphs[which][draw(st.integers(0, 4)) : draw(st.integers(18, 24))]
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(tokens)))
            tokens[at : at + draw(st.integers(0, 3))] = draw(
                st.lists(st.integers(40_000, 50_000), max_size=3)
            )
        return tokens

    shelf = Shelf()
    for _ in range(draw(st.integers(1, 5))):
        tokens = prompt()
        generation = draw(st.integers(0, 3))
        exact_rows = draw(st.integers(0, len(tokens))) if generation else len(tokens)
        shelf.add(tokens, generation=generation, exact_rows=exact_rows, sources=generation)
    policy = msgspec.structs.replace(
        PRESETS[draw(st.sampled_from(["exact", "faithful", "balanced", "aggressive"]))],
        edit_window=draw(st.integers(0, 6)),
        min_run=draw(st.integers(0, 6)),
        tail=draw(st.integers(0, 6)),
    )
    return shelf, prompt(), policy


@given(shelves())
def test_every_plan_is_sound(case: tuple[Shelf, list[int], ReusePolicy]) -> None:
    """`Shelf.check` compares rows with the donor; here: caps, and that planning is pure."""
    shelf, request, policy = case
    before = [node.id for node in shelf.tree]
    plan = shelf.plan(request, policy)
    assert [node.id for node in shelf.tree] == before
    assert shelf.plan(request, policy) == plan
    assert plan.generation <= policy.max_generation
    assert len(plan.donors) <= shelf.config.max_donors
    best = 0
    for node in shelf.tree:
        same = 0
        limit = min(node.exact_rows, len(request) - 1)
        while same < limit and node.tokens[same] == request[same]:
            same += 1
        best = max(best, same)
    assert plan.exact <= best
    if not plan.declined:
        assert plan.exact >= best // 8 * 8 or len(shelf.tree) > 8


def test_text_that_moved_far_is_found() -> None:
    # replacing all of it in place is a shorter script than moving a part of it
    shelf = Shelf()
    donor = text(1, 96)
    shelf.add(donor)
    plan = shelf.plan(text(2, 60) + donor[:36])
    assert [(s.start, s.stop, s.source) for s in plan.spans] == [
        (60 + at, min(68 + at, 95), at) for at in range(0, 36, 8)
    ]
