"""Answers: rows behind those of a prompt that is stored, and what becomes of that prompt's node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kvshare_store.errors import PlanError
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.plan import Span
from kvshare_store.save.staging import Buffer, Reuse, Staged, packed, reuse_of
from tests.support.oracle import Driver, pick, positions_of, prompt

Open = Callable[..., Driver]

PROMPT = prompt(1, 40)
ANSWER = prompt(2, 10)
OTHER = prompt(3, 12)


def changed(tokens: list[int]) -> list[int]:
    """An edit in the middle."""
    return [*tokens[:20], 5, 6, *tokens[21:]]


@pytest.fixture
def engine(driver: Open) -> Driver:
    return driver()


def stage(
    engine: Driver, told: Sequence[int], answer: Sequence[int], generation: int = 0
) -> Staged:
    return engine.store.stage(
        [*told, *answer],
        engine.namespace,
        Reuse(generation=generation),
        extends=len(told),
    )


def save(
    engine: Driver, told: Sequence[int], answer: Sequence[int], generation: int = 0, exact: int = -1
) -> str | None:
    """Save an answer to a prompt; the node's id, or None if it is not wanted."""
    staged = stage(engine, told, answer, generation)
    if staged.known:
        return None
    tokens, fresh = [*told, *answer], positions_of(staged.fresh)
    assert fresh == list(range(len(told), len(tokens)))
    exact = len(tokens) if exact < 0 else exact
    rows = engine.book.computed(tokens, exact, "answer")
    engine.book.write(tokens, rows, fresh, exact)
    blocks = packed(pick(rows, fresh), staged.sizes, engine.namespace.layout)
    return engine.store.commit(staged.id, Buffer(blocks))


def node(engine: Driver, tokens: Sequence[int], exact: bool = True) -> Node | None:
    name = node_id(engine.namespace.digest, np.asarray(tokens, np.int32), exact)
    return engine.store.tree.get(name)


# --- rows -----------------------------------------------------------------------------------------


def test_an_answer_grows_the_node_of_its_prompt(engine: Driver) -> None:
    engine.save(PROMPT)
    before = engine.store.stats()
    assert save(engine, PROMPT, ANSWER)
    after = engine.store.stats()
    assert [len(node.tokens) for node in engine.store.tree] == [50]
    assert engine.serve([*PROMPT, *ANSWER, *OTHER]).exact == 50
    assert engine.serve([*PROMPT, *OTHER]).exact == 40
    row = engine.namespace.layout.row_bytes
    assert after["bytes_stored"] - before["bytes_stored"] == 10 * row
    assert (after["answers_stored"], after["tokens_answers_stored"]) == (1, 10)
    assert (before["answers_stored"], before["tokens_answers_stored"]) == (0, 0)


def test_the_next_turn_builds_on_it_and_grows_in_its_turn(engine: Driver) -> None:
    engine.save(PROMPT)
    save(engine, PROMPT, ANSWER)
    turn = [*PROMPT, *ANSWER, *OTHER]
    engine.serve_and_save(turn)
    save(engine, turn, prompt(4, 9))
    whole = [*turn, *prompt(4, 9)]
    first, last = node(engine, [*PROMPT, *ANSWER]), node(engine, whole)
    assert first is not None
    assert last is not None
    assert (len(engine.store.tree), last.parent, first.parent) == (2, first.id, None)
    assert engine.serve([*whole, 5]).exact == len(whole)


def test_every_answer_to_one_prompt_is_stored(engine: Driver) -> None:
    """The first takes the place of the prompt's node; the others begin with the same rows."""
    engine.save(PROMPT)
    answers = [ANSWER, OTHER, prompt(4, 20)]
    assert all(save(engine, PROMPT, answer) for answer in answers)
    assert len(engine.store.tree) == 3
    for answer in answers:
        told = [*PROMPT, *answer]
        assert engine.serve([*told, 7]).exact == len(told)
    row, stats = engine.namespace.layout.row_bytes, engine.store.stats()
    assert stats["bytes_stored"] == (40 + 10 + 12 + 20) * row


def test_after_a_restart_the_chain_finds_the_prompt_in_another_answer(driver: Open) -> None:
    engine, told = driver(), prompt(5, 150)
    engine.save(told)
    save(engine, told, ANSWER)
    again = driver()
    assert save(again, told, OTHER)
    assert again.serve([*told, *OTHER, 7]).exact == len(told) + len(OTHER)


def test_a_prompt_that_another_answer_holds_is_known(engine: Driver) -> None:
    engine.save(PROMPT)
    save(engine, PROMPT, ANSWER)
    assert engine.stage(PROMPT).known


def test_without_the_prompt_nothing_is_stored(engine: Driver) -> None:
    assert stage(engine, PROMPT, ANSWER).known
    engine.save(OTHER + PROMPT)
    assert stage(engine, PROMPT, ANSWER).known
    assert engine.store.stats()["answers_stored"] == 0


def test_the_answer_to_an_edited_prompt_has_its_provenance(engine: Driver) -> None:
    engine.save(PROMPT)
    follower = changed(PROMPT)
    plan = engine.serve(follower)
    assert plan.generation == 1
    engine.save(follower, plan)
    before = node(engine, follower, exact=False)
    assert before is not None
    assert stage(engine, follower, ANSWER).known, "none is exact"
    assert stage(engine, follower, ANSWER, 2).known, "none is of that generation"
    assert save(engine, follower, ANSWER, 1, exact=before.exact_rows)
    grown = node(engine, [*follower, *ANSWER], exact=False)
    assert grown is not None
    assert node(engine, follower, exact=False) is None
    assert (grown.generation, grown.exact_rows) == (1, before.exact_rows)
    parent = node(engine, PROMPT)
    assert parent is not None
    assert grown.parent == parent.id
    assert save(engine, follower, OTHER, 1, exact=before.exact_rows), "its sibling"


def test_an_answer_whose_prompt_a_plan_covers_names_its_rows(engine: Driver) -> None:
    """The prompt was stored, as the beginning of another, and was not saved again."""
    engine.save([*PROMPT, *OTHER])
    plan = engine.serve(PROMPT)
    assert plan.exact == 39
    tokens = [*PROMPT, *ANSWER]
    staged = engine.store.stage(tokens, engine.namespace, reuse_of(plan), extends=40)
    fresh = positions_of(staged.fresh)
    assert fresh == list(range(39, 50))
    rows = engine.book.computed(tokens, 50, "")
    blocks = packed(pick(rows, fresh), staged.sizes, engine.namespace.layout)
    engine.book.write(tokens, rows, fresh, 50)
    assert engine.store.commit(staged.id, Buffer(blocks))
    assert engine.serve([*tokens, 7]).exact == 50
    assert engine.store.stats()["tokens_answers_stored"] == 10
    assert len(engine.store.tree) == 2


def test_whoever_was_planned_the_prompt_can_still_build_on_it(engine: Driver) -> None:
    """Its plan ends when the rows are loaded; then the answer takes the prompt's place."""
    engine.save(PROMPT)
    follower = changed(PROMPT)
    plan = engine.serve(follower)
    save(engine, PROMPT, ANSWER)
    saved = engine.save(follower, plan)
    assert saved
    grown = node(engine, [*PROMPT, *ANSWER])
    child = engine.store.tree.get(saved)
    assert grown is not None
    assert child is not None
    assert child.parent == grown.id
    assert engine.serve(follower).reused >= plan.reused


# --- what is not replaced -------------------------------------------------------------------------


def test_a_pinned_prompt_stays(engine: Driver) -> None:
    name = engine.save(PROMPT)
    assert name
    engine.store.flush()
    assert engine.store.pin(name)
    assert save(engine, PROMPT, ANSWER)
    kept, grown = node(engine, PROMPT), node(engine, [*PROMPT, *ANSWER])
    assert kept is not None
    assert grown is not None
    assert (kept.pinned, grown.pinned, grown.parent) == (True, False, kept.id)


def test_a_prompt_that_others_descend_from_stays(engine: Driver) -> None:
    engine.save(PROMPT)
    engine.serve_and_save(changed(PROMPT))
    assert save(engine, PROMPT, ANSWER)
    kept, grown = node(engine, PROMPT), node(engine, [*PROMPT, *ANSWER])
    assert kept is not None
    assert grown is not None
    assert grown.parent == kept.id


def test_a_longer_answer_replaces_a_shorter_one_and_not_the_reverse(engine: Driver) -> None:
    engine.save(PROMPT)
    save(engine, PROMPT, ANSWER)
    assert save(engine, PROMPT, [*ANSWER, *OTHER])
    assert [len(node.tokens) for node in engine.store.tree] == [62]
    assert stage(engine, PROMPT, ANSWER).known


def test_a_quota_that_the_answer_breaks_leaves_the_prompt(driver: Open) -> None:
    engine = driver(namespace_bytes=64 * 45)
    engine.save(PROMPT)
    save(engine, PROMPT, ANSWER)
    assert node(engine, [*PROMPT, *ANSWER]) is None
    assert engine.store.tree.bytes_of(engine.namespace.digest) <= 64 * 45


# --- what clients may send ------------------------------------------------------------------------


@pytest.mark.parametrize("extends", [-1, 50, 51, 1 << 40])
def test_an_answer_is_longer_than_its_prompt(engine: Driver, extends: int) -> None:
    engine.save(PROMPT)
    with pytest.raises(PlanError):
        engine.store.stage([*PROMPT, *ANSWER], engine.namespace, extends=extends)
    assert not len(engine.store._saving)


@pytest.mark.parametrize(
    "reuse",
    [
        Reuse((Span(0, 90, 0, 0, 0, True),), ("ab" * 32,), ("n",)),
        Reuse((Span(0, 30, 4, 0, 0, True),), ("ab" * 32,), ("n",)),
        Reuse(generation=-1),
        Reuse(generation=1 << 20),
    ],
    ids=["too long", "moved and exact", "no generation", "too many generations"],
)
def test_an_answer_is_checked_as_a_prompt_is(engine: Driver, reuse: Reuse) -> None:
    engine.save(PROMPT)
    with pytest.raises(PlanError):
        engine.store.stage([*PROMPT, *ANSWER], engine.namespace, reuse, extends=40)


def test_rows_that_nobody_vouches_for_are_not_wanted(engine: Driver) -> None:
    engine.save(PROMPT)
    reuse = Reuse((Span(0, 30, 0, 0, 0, True),), ("ab" * 32,), ("n",))
    assert engine.store.stage([*PROMPT, *ANSWER], engine.namespace, reuse, extends=40).known


def test_names_and_donors_without_rows_change_nothing(engine: Driver) -> None:
    """Where the rows of a prompt are is never what a client says of it."""
    engine.save(PROMPT)
    engine.save(OTHER + PROMPT)
    lie = Reuse(blocks=("ab" * 32,), donors=("n",), stamps=(7,))
    staged = engine.store.stage([*PROMPT, *ANSWER], engine.namespace, lie, extends=40)
    assert positions_of(staged.fresh) == list(range(40, 50))
    engine.store.abandon(staged.id)
