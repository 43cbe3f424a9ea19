"""The asynchronous scheduler: a step is scheduled before the output of the last one is there.

On a CPU vLLM switches this off; `Engine(ahead=True)` switches it on again, in vLLM's own runner and
engine. What a GPU adds, a forward pass that really runs meanwhile, is not tested here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
from kvshare_connectors.vllm import promises

from kvshare_store.errors import LeaseError
from tests.engine.harness import BLOCK, Answer, Engine, Fresh, random_runs
from tests.engine.soak import Traffic, related_prompts
from tests.engine.test_answers import ANSWER, begin, check_next_turn, serve_heir

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 150
LITTLE = 24
"""A step's token budget, which the placeholders here exceed."""
SETTINGS: dict[str, Any] = {
    "kvshare": {"policy": "aggressive"},
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 10,
}

half = partial(random_runs, seed=5)


class Served(NamedTuple):
    """An answer, and the placeholder runs computed for it: first position and length."""

    answer: Answer
    runs: list[tuple[int, int]]


@pytest.fixture(scope="module")
def told(fresh: Fresh) -> list[int]:
    """The prompt that both kinds of engine are given."""
    return fresh(LENGTH)


@pytest.fixture(scope="module")
def in_step(tmp_path_factory: pytest.TempPathFactory, told: list[int]) -> list[dict[str, Served]]:
    """What engines answer that wait for the output of each step, with either scheduler. vLLM also
    waits with an asynchronous scheduler if something forbids it to run ahead."""
    found = []
    for scheduler in ("KVShareScheduler", "KVShareAsyncScheduler"):
        name = f"kvshare_connectors.vllm.{scheduler}"
        engine = Engine(tmp_path_factory.mktemp("home"), scheduler_cls=name, **SETTINGS)
        try:
            assert engine.core.engine_core.engine_core.batch_queue is None
            found.append(served(engine, told))
        finally:
            engine.close()
    return found


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory, in_step: list[dict[str, Served]]
) -> Iterator[Engine]:
    """An engine that schedules ahead, made after the others were closed: one at a time."""
    engine = Engine(tmp_path_factory.mktemp("home"), ahead=True, **SETTINGS)
    yield engine
    engine.close()


def served(engine: Engine, prompt: list[int]) -> dict[str, Served]:
    """One prompt, computed in full, from its own rows, and from some of them in one step or in
    many."""
    found = {"in full": Served(engine.store(prompt), [])}
    for name, edited, budget in (
        ("exact", False, None), ("same step", True, None), ("parked", True, LITTLE),
    ):  # fmt: skip
        engine.forget()
        engine.steps.clear()
        reuse = engine.keeping(half) if edited else nullcontext()
        with engine.counted() as gained, reuse, engine.budget(tokens=budget):
            answer = engine.ask(prompt, max_tokens=8)
        assert gained["hits_edited" if edited else "hits_exact"] == 1
        runs = [(start, length) for step in engine.steps for _, start, length in step.runs]
        found[name] = Served(answer, runs)
    return found


@contextmanager
def failing_loads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every load fails; the ids of the requests that tried."""
    tried: list[str] = []

    def fail(spec: Any) -> int:
        tried.append(spec.request_id)
        raise LeaseError("forced")

    with monkeypatch.context() as patch:
        patch.setattr(engine.worker, "load_one", fail)
        yield tried


# --- both kinds -----------------------------------------------------------------------------------


def test_it_runs_ahead(engine: Engine) -> None:
    core = engine.core.engine_core.engine_core
    assert type(engine.scheduler).__name__ == "KVShareAsyncScheduler"
    assert core.async_scheduling
    assert core.batch_queue_size == 2


def test_ahead_or_in_step_the_rows_and_answers_are_the_same(
    engine: Engine, told: list[int], in_step: list[dict[str, Served]]
) -> None:
    found = served(engine, told)
    for others in in_step:
        for name, other in others.items():
            assert found[name].runs == other.runs
            assert found[name].answer.agrees(other.answer)
    assert len(found["parked"].runs) >= len(found["same step"].runs) > 1


def test_others_decode_in_every_step_while_a_request_is_parked(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    """The tokens of a step in flight count: running requests come first, also with their newest
    token."""
    others = [fresh(40) for _ in range(3)]
    alone = [engine.ask(other, policy="off", max_tokens=16) for other in others]
    full = engine.ask(prompt, policy="off")
    engine.store(prompt)
    engine.forget()
    with engine.counted() as gained:
        names = [engine.add(other, policy="off", max_tokens=16) for other in others]
        for _ in range(2):
            engine.step()
        engine.steps.clear()
        with engine.keeping(half), engine.budget(tokens=LITTLE):
            parked = engine.add(prompt)
            answers = engine.drain()
    assert gained["hits_edited"] == 1
    shared = [step for step in engine.steps if step.runs]
    assert len(shared) >= 2
    assert all(step.rows == len(step.runs) + len(others) for step in shared)
    assert all(answers[name][0].agrees(other) for name, other in zip(names, alone, strict=True))
    assert answers[parked][0].agrees(full)


# --- failures that the scheduler hears of a step late ---------------------------------------------


@pytest.mark.parametrize("edited", [False, True], ids=["exact", "edited"])
@pytest.mark.parametrize("budget", [LITTLE, None], ids=["in chunks", "at once"])
def test_a_failed_load_is_a_miss(
    engine: Engine,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
    edited: bool,
    budget: int | None,
) -> None:
    full = engine.ask(prompt, policy="off")
    engine.store(prompt)
    engine.forget()
    reuse = engine.keeping(half) if edited else nullcontext()
    fails = failing_loads(engine, monkeypatch)
    with engine.counted() as gained, reuse, engine.budget(tokens=budget), fails as tried:
        assert engine.ask(prompt).agrees(full)
    assert len(tried) == gained["declined.load_lease"] == 1
    assert gained["hits_exact"] == gained["hits_edited"] == 0


def test_rows_of_the_step_ahead_of_a_failure_are_not_stored(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is complete in a step that was scheduled before its load was known to fail."""
    full = engine.ask(prompt, policy="off")
    engine.store(prompt[:70])
    engine.forget()
    fails = failing_loads(engine, monkeypatch)
    with engine.counted() as gained, engine.budget(tokens=48), fails as tried:
        assert engine.store(prompt, policy="exact").agrees(full)
    assert len(tried) == gained["nodes"] == 1
    engine.forget()
    with engine.counted() as gained:
        assert engine.ask(prompt, policy="exact").agrees(full)
    assert gained["tokens_reused_exact"] == LENGTH - 1
    assert engine.ask([*prompt, *prompt[:9]], policy="off").cached == LENGTH // BLOCK * BLOCK


def test_a_neighbour_that_came_in_the_step_ahead_of_a_failure_begins_again_too(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It found the failed request's blocks in the prefix cache, but they hold no rows."""
    longer = [*prompt, *prompt[:40]]
    full, full_longer = (engine.ask(text, policy="off") for text in (prompt, longer))
    engine.clear()
    engine.store(prompt)
    engine.forget()
    with failing_loads(engine, monkeypatch) as tried:
        first = engine.add(prompt, policy="exact")
        engine.step()
        assert not engine.scheduler.requests[tried[0]].num_preemptions  # not known yet
        second = engine.add(longer, policy="exact")
        monkeypatch.setattr(promises, "saves_enough", lambda plan, spans, least: False)
        answers = engine.drain()
    monkeypatch.undo()
    assert len(tried) == 1
    assert answers[first][0].agrees(full)
    assert answers[second][0].agrees(full_longer)
    engine.settle()
    engine.forget()
    for text, answer in ((prompt, full), (longer, full_longer)):
        assert engine.ask(text, policy="exact").agrees(answer)


def test_an_abort_before_a_failure_is_known_leaves_nothing_wrong_in_the_prefix_cache(
    engine: Engine, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step ahead filled one of its own blocks, based on rows that had not been loaded."""
    prompt, loaded, blocks = fresh(190), 70, 4 * BLOCK
    longer = [*prompt, *prompt[:20]]
    full = engine.ask(longer, policy="off")
    engine.clear()
    engine.store(prompt[:loaded])
    engine.forget()
    names, steps, done = [], [], engine.worker.after_forward

    def aborted(metadata: Any) -> None:
        done(metadata)
        steps.append(metadata)
        if len(steps) == 2:
            engine.abort(names.pop())

    monkeypatch.setattr(engine.worker, "after_forward", aborted)
    with failing_loads(engine, monkeypatch) as tried, engine.budget(tokens=blocks - loaded):
        names.append(engine.add(prompt, policy="exact"))
        engine.drain()
    assert len(tried) == 1
    assert not names
    for _ in range(3):  # a request that computes the blocks before it makes it reachable again
        assert engine.ask(longer, policy="off").agrees(full)


# --- answers --------------------------------------------------------------------------------------


def test_an_answer_is_stored_whose_blocks_another_request_waits_for(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    """One step is in flight when the request ends; it computes the last token."""
    answer, _ = serve_heir(engine, prompt, fresh(8 * BLOCK - 1))
    check_next_turn(engine, [*prompt, *answer], LENGTH + ANSWER - 1)


def test_an_answer_is_stored_that_is_aborted_with_a_step_in_flight(
    engine: Engine, prompt: list[int]
) -> None:
    name, request = begin(engine, prompt, 10)
    told = list(request.all_token_ids)
    assert request.num_in_flight_tokens
    engine.abort(name)
    engine.settle()
    check_next_turn(engine, told, LENGTH + 9)


# --- everything together --------------------------------------------------------------------------


def test_random_traffic(engine: Engine, fresh: Fresh) -> None:
    traffic = Traffic(engine, related_prompts(fresh(124)), seed=3)
    with engine.counted() as gained:
        for _ in range(4):
            traffic.batch()
    assert gained["hits_edited"]
