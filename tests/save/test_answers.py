"""Answers: rows behind those of a stored prompt, and what happens to that prompt's node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest

from kvshare_store.daemon import protocol, questions
from kvshare_store.daemon.describe import found_node, show_node
from kvshare_store.errors import NodeError, PlanError
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.plan.contexts import Context, contexts_of
from kvshare_store.plan.spans import Span, clip_spans
from kvshare_store.save.staging import Buffer, Reuse, Staged, packed
from tests.support.oracle import Driver, RowBook, pick, positions_of, prompt

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


EXACT = Reuse()


def stage(
    engine: Driver,
    told: Sequence[int],
    answer: Sequence[int],
    reuse: Reuse = EXACT,
    source: bytes = b"",
) -> Staged:
    return engine.store.stage(
        [*told, *answer], engine.namespace, reuse, extends=len(told), source=source
    )


def save(
    engine: Driver,
    told: Sequence[int],
    answer: Sequence[int],
    reuse: Reuse = EXACT,
    source: bytes = b"",
) -> str | None:
    """Save an answer to a prompt. Returns the node's id, or None if it is not wanted."""
    staged = stage(engine, told, answer, reuse, source)
    if staged.known:
        return None
    tokens, fresh = [*told, *answer], positions_of(staged.fresh)
    assert fresh == list(range(len(told), len(tokens)))
    exact = reuse.contexts[0].start if reuse.contexts else len(tokens)
    rows = engine.book.computed(tokens, exact, "answer")
    engine.book.write(tokens, rows, fresh, exact)
    cast(RowBook, engine.book).answered(len(told), tokens, rows)
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


def test_a_node_says_where_its_answer_begins(driver: Open) -> None:
    engine = driver()
    engine.save(PROMPT)
    save(engine, PROMPT, ANSWER)
    (grown,) = engine.store.tree
    assert (grown.prompt_tokens, grown.answer_tokens) == (len(PROMPT), len(ANSWER))
    assert show_node(engine.store, grown.id)["answer_tokens"] == len(ANSWER)
    asked = protocol.Explain(node=grown.id)
    assert questions.explain(engine.store, asked)["explanation"]["answer_tokens"] == len(ANSWER)
    engine.save(OTHER * 4)
    engine.store.close()
    again = driver()
    assert sorted(node.prompt_tokens for node in again.store.tree) == [0, len(PROMPT)]
    assert sorted(node.answer_tokens for node in again.store.tree) == [0, len(ANSWER)]


def test_a_settled_answer_is_still_one(engine: Driver) -> None:
    engine.save(PROMPT)
    told = changed(PROMPT)
    engine.save(told, engine.serve(told))
    edited = node(engine, told, exact=False)
    assert edited is not None
    assert save(engine, told, ANSWER, Reuse(generation=1, contexts=edited.contexts))
    engine.save([*told, *ANSWER])
    settled = node(engine, [*told, *ANSWER])
    assert settled is not None
    assert settled.prompt_tokens == len(told)


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
    """The first answer replaces the prompt's node; the others begin with the same rows."""
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
    engine.save(follower, plan)
    before, parent = node(engine, follower, exact=False), node(engine, PROMPT)
    assert before is not None
    assert parent is not None
    reuse = Reuse(generation=1, contexts=before.contexts)
    assert save(engine, follower, ANSWER, reuse)
    grown = node(engine, [*follower, *ANSWER], exact=False)
    assert grown is not None
    assert node(engine, follower, exact=False) is None
    for field in ("generation", "exact_rows", "contexts", "policy"):
        assert getattr(grown, field) == getattr(before, field)
    assert (grown.generation, grown.policy, grown.parent) == (1, "aggressive", parent.id)
    assert save(engine, follower, OTHER, reuse), "its sibling"
    turn = engine.serve([*follower, *ANSWER, 7])
    assert (turn.generation, turn.continued) == (1, len(follower) + len(ANSWER))


def test_an_answer_to_other_rows_of_the_same_tokens_is_not_stored(engine: Driver) -> None:
    engine.save(PROMPT)
    follower = changed(PROMPT)
    engine.save(follower, engine.serve(follower))
    before = node(engine, follower, exact=False)
    assert before is not None
    (context,) = before.contexts
    for generation, contexts in (
        (0, ()), (1, ()), (2, (context,)), (1, (Context(context.start, bytes(16)),)),
        (1, (Context(context.start + 1, context.digest),)), (1, (context, context)),
    ):  # fmt: skip
        assert stage(
            engine, follower, ANSWER, Reuse(generation=generation, contexts=contexts)
        ).known
    assert stage(engine, follower, ANSWER, Reuse(generation=1, contexts=(context,))).id


def test_contexts_do_not_depend_on_where_spans_are_cut() -> None:
    """An engine loads what its own cache lacks; sibling requests find each other's blocks there."""
    spans, names = (Span(10, 20, 40, 1, 8), Span(30, 9, 60, 1, 29)), ("a", "b")
    whole = contexts_of((), spans, names, 10)
    for at in (11, 16, 29, 30, 35):
        cut = (*clip_spans(spans, 0, at), *clip_spans(spans, at, 50))
        assert contexts_of((), cut, names, 10) == whole
    assert contexts_of((), clip_spans(spans, 0, 35), names, 10) != whole
    assert contexts_of((), (Span(10, 20, 40, 1, 8), Span(30, 9, 60, 1, 28)), names, 10) != whole


def test_a_prompt_may_be_the_beginning_of_another_node(engine: Driver) -> None:
    """The prompt was not saved again, since a plan covers it. The donors tell which node it is
    from."""
    told = prompt(5, 150)
    engine.save([*told, *OTHER])
    for _ in range(9):
        engine.save([*told, *prompt(6 + _, 9)])
    plan = engine.serve(told)
    reuse = Reuse(donors=plan.donors)
    assert save(engine, told[:-1], [told[-1], *ANSWER], reuse)
    assert engine.serve([*told, *ANSWER, 7]).exact == 160


def test_whoever_was_planned_the_prompt_can_still_build_on_it(engine: Driver) -> None:
    """Its plan ends when the rows are loaded; then the answer replaces the prompt."""
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
    assert engine.store.stats()["staged"] == 0


@pytest.mark.parametrize(
    "reuse",
    [
        Reuse((Span(0, 30, 0, 0, 0, True),), ("ab" * 32,), ("n",)),
        Reuse(generation=-1),
        Reuse(generation=1 << 20),
        Reuse(generation=1, contexts=(Context(60, bytes(16)),)),
        Reuse(donors=("n",) * 99),
    ],
    ids=["rows", "no generation", "too many generations", "contexts behind it", "donors"],
)
def test_an_answer_is_checked_as_a_prompt_is(engine: Driver, reuse: Reuse) -> None:
    engine.save(PROMPT)
    with pytest.raises(PlanError):
        engine.store.stage([*PROMPT, *ANSWER], engine.namespace, reuse, extends=40)


def test_donors_of_others_are_no_prompts_of_mine(engine: Driver) -> None:
    """A donor of another tenant, or with other tokens, is not accepted."""
    theirs = engine.namespace.for_tenant("other")
    one = Driver(engine.store, theirs, engine.book)
    names = (one.save(PROMPT), engine.save([1, *PROMPT]))
    reuse = Reuse(donors=(*map(str, names), "nobody"), stamps=(7,), blocks=("ab" * 32,))
    assert stage(engine, PROMPT, ANSWER, reuse).known


def test_an_answer_that_is_too_much_for_the_quota_does_not_take_its_prompt_along(
    driver: Open,
) -> None:
    row = driver().namespace.layout.row_bytes
    engine = driver(namespace_bytes=45 * row)
    engine.save(PROMPT)
    assert save(engine, PROMPT, ANSWER) is None
    assert node(engine, PROMPT) is not None


# --- by its id ------------------------------------------------------------------------------------


def test_a_prompt_is_found_by_the_id_that_it_had_before_its_answer(driver: Open) -> None:
    """That is the donor which the answer to a request names, sent right after the first one."""
    engine = driver(log_prompts=True)
    store = engine.store
    before = engine.save(PROMPT)
    assert before is not None
    assert engine.serve(PROMPT).donors == (before,)
    after = save(engine, PROMPT, ANSWER)
    for asked in (before, before[:8]):
        assert show_node(store, asked)["id"] == after
        assert questions.diff(store, asked, asked)["first"]["id"] == after
    (logged,) = questions.answer(store, protocol.ListRequests())
    assert logged["donors"] == (after,)
    again = questions.answer(store, protocol.Explain(request="1"))
    assert again["differs"] == ""
    assert {part["donor"] for part in again["explanation"]["parts"]} == {after, ""}


def test_after_a_restart_an_id_that_was_replaced_is_still_shown(driver: Open) -> None:
    """What removes or pins nodes takes the ids of those that are there."""
    engine, told = driver(), changed(PROMPT)
    other = engine.save(OTHER * 4)
    replaced = [engine.save(PROMPT)]
    replaced.append(engine.save(told, engine.serve(told)))
    edited = node(engine, told, exact=False)
    assert edited is not None
    reuse = Reuse(generation=1, contexts=edited.contexts)
    replaced.append(save(engine, told, ANSWER, reuse))
    engine.save([*told, *ANSWER])  # settled
    settled = node(engine, [*told, *ANSWER])
    first = save(engine, PROMPT, ANSWER)
    assert settled
    assert save(engine, PROMPT, OTHER)
    assert [name for name in replaced if name in engine.store.tree] == []
    engine.store.close()
    store = driver().store
    for name, by in zip(replaced, (first, settled.id, settled.id), strict=True):
        assert name
        assert show_node(store, name[:12])["id"] == by, "of two answers the first"
        asked = questions.explain(store, protocol.Explain(node=str(other), only=name))
        assert asked["explanation"]["candidates"][0]["node"] == by
        with pytest.raises(NodeError, match="0 nodes begin with"):
            found_node(store, name)
    with pytest.raises(NodeError, match="0 nodes begin with"):
        show_node(store, "f" * 32)
    with pytest.raises(NodeError, match="nodes begin with ''"):
        show_node(store, "")


@pytest.mark.parametrize("lineage", [False, True])
def test_a_purge_leaves_nothing_of_an_id_that_was_replaced(engine: Driver, lineage: bool) -> None:
    store = engine.store
    before = engine.save(PROMPT)
    after = save(engine, PROMPT, ANSWER)
    assert before is not None
    assert after is not None
    if lineage:
        store.purge_lineage(after)
    else:
        store.purge(engine.namespace.digest)
    assert engine.save([*PROMPT, *ANSWER]) == after
    with pytest.raises(NodeError, match="0 nodes begin with"):
        show_node(store, before)
