"""Answers are stored: the rows of generated tokens, however a request ends."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvshare_store.daemon import protocol
from kvshare_store.errors import LeaseError
from tests.engine.harness import BLOCK, SHARED, Engine, Fresh

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 112
"""Tokens of a prompt here: three and a half paged blocks, less than two blocks of the store."""
ANSWER = 24
"""Tokens of most answers: they fill a paged block and begin another."""
SETTINGS = SHARED
NEXT = [11111, 22222, 33333, 44444, 12345]
"""Tokens that the next turn adds; rare ones."""


def nodes(engine: Engine) -> dict[int, dict[str, Any]]:
    """The stored prompts, by length."""
    engine.settle()
    return {node["tokens"]: node for node in engine.client.call(protocol.ListNodes())}


def check_next_turn(engine: Engine, told: list[int], stored: int) -> None:
    """A request that continues `told` reuses `stored` rows and gets full compute's answer."""
    turn = [*told, *NEXT]
    engine.forget()
    full = engine.ask(turn, policy="off")
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(turn, policy="exact")
    assert gained["tokens_reused_exact"] == stored
    assert answer.agrees(full)


def begin(engine: Engine, prompt: list[int], tokens: int, **options: Any) -> tuple[str, Any]:
    """A request that has generated so many tokens and is still running: its id, and vLLM's
    request."""
    name = engine.add(prompt, max_tokens=500, **options)
    engine.step()
    (request,) = engine.scheduler.requests.values()
    while request.num_output_tokens < tokens:
        engine.step()
    return name, request


# --- ends of a request ----------------------------------------------------------------------------


def test_the_next_turn_has_the_rows_of_prompt_and_answer(engine: Engine, prompt: list[int]) -> None:
    with engine.counted() as gained:
        answer = engine.store(prompt, max_tokens=ANSWER)
    assert (gained["answers_stored"], gained["tokens_answers_stored"]) == (1, ANSWER - 1)
    assert list(nodes(engine)) == [LENGTH + ANSWER - 1]
    check_next_turn(engine, [*prompt, *answer.tokens], LENGTH + ANSWER - 1)


def test_each_of_several_answers_is_stored(engine: Engine, prompt: list[int]) -> None:
    name = engine.add(prompt, n=2, seed=5, temperature=1.0, max_tokens=ANSWER)
    answers = engine.drain()[name]
    engine.settle()
    assert answers[0].tokens != answers[1].tokens
    for answer in answers:
        check_next_turn(engine, [*prompt, *answer.tokens], LENGTH + ANSWER - 1)


def test_an_answer_is_of_the_source_that_asked_for_it(engine: Engine, prompt: list[int]) -> None:
    """Two have sent the prompt: each is given an answer of its own, and nobody confirms it."""
    for seed, source in enumerate(("ann", "bob")):
        asked = {"kvshare.source": source}
        engine.store(prompt, params=asked, seed=seed, temperature=1.0, max_tokens=ANSWER - seed)
    assert {length: one["sources"] for length, one in nodes(engine).items()} == {
        LENGTH + ANSWER - 1: 1,
        LENGTH + ANSWER - 2: 1,
    }


def test_an_answer_that_ends_at_a_stop_string(engine: Engine, prompt: list[int]) -> None:
    """vLLM's front end finds the stop string and aborts the request."""
    whole = engine.ask(prompt, policy="off", max_tokens=ANSWER).tokens
    tokenizer = engine.llm.get_tokenizer()
    text = tokenizer.decode(whole)
    stop = tokenizer.decode(whole[12:15])
    assert text.index(stop) > 0
    engine.clear()
    answer = engine.store(prompt, max_tokens=ANSWER, stop=[stop])
    assert 1 < len(answer.tokens) < ANSWER
    assert answer.tokens == whole[: len(answer.tokens)]
    check_next_turn(engine, [*prompt, *answer.tokens], LENGTH + len(answer.tokens) - 1)


def test_an_answer_that_was_aborted(engine: Engine, prompt: list[int]) -> None:
    name, request = begin(engine, prompt, 10)
    told = list(request.all_token_ids)
    engine.abort(name)
    engine.settle()
    check_next_turn(engine, told, LENGTH + 9)


def test_an_answer_of_one_token_has_no_rows(engine: Engine, prompt: list[int]) -> None:
    with engine.counted() as gained:
        engine.store(prompt, max_tokens=1)
    assert gained["answers_stored"] == 0
    assert list(nodes(engine)) == [LENGTH]


def test_a_request_that_is_aborted_before_its_prompt_is_computed(
    engine: Engine, prompt: list[int]
) -> None:
    with engine.budget(tokens=50):
        name = engine.add(prompt)
        engine.step()
        engine.abort(name)
    assert nodes(engine) == {}


# --- blocks that are given away -------------------------------------------------------------------


def serve_heir(engine: Engine, prompt: list[int], heir: list[int]) -> tuple[list[int], int]:
    """A request whose blocks another request waits for. Returns its answer, and how many tokens the
    step computes that stores it."""
    manager, save, tokens = engine.scheduler.kv_cache_manager, engine.worker.save_answers, []
    blocks: list[int] = []

    def watched(step: Any) -> None:
        if step.answers and not tokens:
            tokens.append(engine.steps[-1].tokens)
        save(step)

    engine.worker.save_answers = watched  # type: ignore[method-assign]
    try:
        with engine.room(-(-len(heir) // BLOCK)):
            first = engine.add(prompt, max_tokens=ANSWER)
            engine.step()
            (request,) = engine.scheduler.requests.values()
            engine.add(heir, max_tokens=2)
            while not request.is_finished():
                (blocks,) = manager.get_block_ids(request.request_id)
                engine.step()
            (late,) = engine.scheduler.requests.values()
            while not late.num_computed_tokens:
                engine.step()
            assert set(blocks) <= set(manager.get_block_ids(late.request_id)[0])
            answers = engine.drain()
        engine.settle()
    finally:
        engine.worker.save_answers = save  # type: ignore[method-assign]
    return answers[first][0].tokens, tokens[0]


def test_the_next_owner_of_its_blocks_does_not_spoil_an_answer(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    """The next owner computes its prompt in the same step that copies the blocks."""
    heir = fresh(8 * BLOCK - 1)
    answer, tokens = serve_heir(engine, prompt, heir)
    assert tokens == len(heir)
    check_next_turn(engine, [*prompt, *answer], LENGTH + ANSWER - 1)


def test_an_idle_engine_stores_the_last_answer(engine: Engine, prompt: list[int]) -> None:
    """vLLM's own loop continues while finished requests are still to be reported to the worker."""
    engine.ask(prompt, max_tokens=ANSWER)
    while engine.scheduler.has_requests():
        engine.step()
    engine.worker.saver.wait()
    stored = engine.client.call(protocol.ListNodes())
    assert [node["tokens"] for node in stored] == [LENGTH + ANSWER - 1]


def test_after_a_reset_the_answer_before_it_is_not_stored(
    engine: Engine, prompt: list[int]
) -> None:
    """The rows in its blocks may belong to other weights, or be gone."""
    with engine.counted() as gained:
        engine.ask(prompt, max_tokens=ANSWER)
        name, _ = begin(engine, NEXT * 10, 5)
        assert engine.scheduler.reset_connector_cache()
        engine.abort(name)
    assert gained["answers_stored"] == 1, "the first went with the first step of the second"
    with engine.counted() as gained:
        engine.ask(prompt, max_tokens=ANSWER)
        assert engine.scheduler.reset_connector_cache()
    assert gained["nodes"] == 1
    assert gained["answers_stored"] == 0


# --- what is not sure -----------------------------------------------------------------------------


def test_an_answer_of_a_preempted_request_is_not_stored(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    other = fresh(LENGTH)
    with engine.room(9):
        names = [engine.add(text, max_tokens=ANSWER) for text in (prompt, other)]
        engine.step()
        requests = list(engine.scheduler.requests.values())
        answers = engine.drain()
    preempted = [request.num_preemptions > 0 for request in requests]
    assert sorted(preempted) == [False, True]
    told = [answers[name][0].tokens for name in names]
    stored = nodes(engine)
    assert sorted(stored) == [LENGTH, LENGTH + ANSWER - 1]
    kept = preempted.index(False)
    check_next_turn(engine, [*(prompt, other)[kept], *told[kept]], LENGTH + ANSWER - 1)


def test_an_answer_after_a_failed_load_is_of_rows_computed_in_full(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spec: Any) -> int:
        raise LeaseError("forced")

    engine.store(prompt[:70], max_tokens=1)
    engine.forget()
    with monkeypatch.context() as patch, engine.counted() as gained:
        patch.setattr(engine.worker, "load_one", fail)
        answer = engine.store(prompt, policy="exact", max_tokens=ANSWER)
    assert gained["declined.load_lease"] == gained["answers_stored"] == 1
    check_next_turn(engine, [*prompt, *answer.tokens], LENGTH + ANSWER - 1)


def test_answers_may_be_left_alone(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = engine.planning.orders
    without = msgspec.structs.replace(orders.config, store_answers=False)
    monkeypatch.setattr(orders, "config", without)
    engine.store(prompt, max_tokens=ANSWER)
    assert list(nodes(engine)) == [LENGTH]


def test_what_is_not_stored_has_no_answer_either(engine: Engine, prompt: list[int]) -> None:
    engine.store(prompt, policy="off")
    engine.store(prompt[:20])
    assert nodes(engine) == {}


# --- beside other prompts -------------------------------------------------------------------------


def test_the_answer_to_a_prompt_that_is_stored(engine: Engine, prompt: list[int]) -> None:
    """The prompt is the beginning of another node, and is not saved again."""
    first = engine.store(prompt, max_tokens=ANSWER)
    engine.forget()
    second = engine.store(prompt, max_tokens=ANSWER, temperature=1.0, seed=5)
    assert first.tokens != second.tokens
    for answer in (first, second):
        check_next_turn(engine, [*prompt, *answer.tokens], LENGTH + ANSWER - 1)


def test_answers_to_an_edited_prompt_are_of_its_generation(
    engine: Engine, prompt: list[int]
) -> None:
    follower = [*prompt[:44], *NEXT, *prompt[47:]]
    engine.store(prompt, max_tokens=1)
    engine.forget()
    with engine.counted() as gained:
        name = engine.add(follower, n=2, seed=5, temperature=1.0, max_tokens=ANSWER)
        answers = engine.drain()[name]
    assert gained["hits_edited"] == gained["answers_stored"] == 2
    assert answers[0].tokens != answers[1].tokens
    grown = [node for node in engine.client.call(protocol.ListNodes()) if node["generation"]]
    assert [node["tokens"] for node in grown] == [len(follower) + ANSWER - 1] * 2
    assert {node["generation"] for node in grown} == {1}
    assert all(44 <= node["exact_rows"] < len(follower) for node in grown)


def test_the_answer_to_another_edit_of_a_stored_prompt_is_not_stored(
    engine: Engine, prompt: list[int]
) -> None:
    """The stored rows of that prompt are not those that the answer was computed from."""
    follower = [*prompt[:44], *NEXT, *prompt[47:]]
    engine.store(prompt, max_tokens=1)
    stored = []
    for keep in ([(0, 44), (60, 100)], [(0, 44), (70, 100)]):
        engine.forget()
        with engine.keeping(keep), engine.counted() as gained:
            engine.store(follower, max_tokens=ANSWER, seed=5, temperature=1.0)
        assert gained["hits_edited"] == 1
        stored.append(gained["answers_stored"])
    assert stored == [1, 0]
