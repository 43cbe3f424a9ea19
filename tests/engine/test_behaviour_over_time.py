"""What happens to an engine while it serves: new weights, sleep, pauses, aborts; and what each
answer reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine.harness import BLOCK, SHARED, Engine, Fresh, half
from tests.engine.test_behaviour import NEW

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SETTINGS = SHARED
LENGTH = 150
LITTLE = 24
"""A step's token budget, which the placeholders here exceed."""


def core(engine: Engine) -> Any:
    """vLLM's engine core, which pauses and sleeps."""
    return engine.core.engine_core.engine_core


def park(engine: Engine, prompt: list[int]) -> str:
    """A request that waits for its placeholders."""
    name = engine.add(prompt)
    for _ in range(50):
        engine.step()
        if engine.planning.runs.parked:
            return name
    raise AssertionError("it was never parked")


# --- new weights ----------------------------------------------------------------------------------


@contextmanager
def other_weights(engine: Engine) -> Iterator[None]:
    """The model with changed weights, as after further training; the old ones come back at the
    end."""

    def scale(by: float) -> Any:
        def change(model: Any) -> None:
            # not in every layer: with a model that far off, rounding errors would grow
            for layer in model.model.layers[::8]:
                layer.input_layernorm.weight.data.mul_(by)

        return change

    engine.llm.apply_model(scale(0.5))
    try:
        yield
    finally:
        engine.llm.apply_model(scale(2.0))
        assert engine.llm.reset_prefix_cache(reset_connector=True)


def test_rows_of_old_weights_are_not_served_after_a_reset(
    engine: Engine, prompt: list[int]
) -> None:
    before = engine.store(prompt)
    engine.run_out()
    with other_weights(engine):
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        full = engine.ask(prompt, policy="off")
        assert full.difference(before) > 0.01
        engine.forget()
        with engine.counted() as gained:
            assert engine.store(prompt).agrees(full)
        assert gained["hits_exact"] == gained["hits_edited"] == 0
        engine.forget()
        with engine.counted() as gained:  # rows of the new weights are
            assert engine.ask(prompt).agrees(full)
        assert gained["hits_exact"] == 1
        engine.run_out()
    engine.run_out()
    with engine.counted() as gained:
        assert engine.ask(prompt).agrees(before)
    assert gained["hits_exact"] == 0


@pytest.mark.parametrize("level", [1, 2])
def test_after_sleep_nothing_from_before_is_served(
    engine: Engine, prompt: list[int], level: int
) -> None:
    """vLLM may have other weights when it wakes up, and does not tell."""
    full = engine.store(prompt)
    engine.run_out()
    engine.llm.sleep(level=level)
    assert engine.llm.wake_up()
    with engine.counted() as gained:
        assert engine.ask(prompt).agrees(full)
    assert gained["hits_exact"] == 0


# --- pause ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", [False, True], ids=["keeping caches", "clearing caches"])
def test_requests_survive_a_pause(
    engine: Engine, prompt: list[int], fresh: Fresh, clear: bool
) -> None:
    """One request decodes, one is parked, one is new; nothing is computed meanwhile."""
    other, late = fresh(60), fresh(70)
    alone = engine.ask(other, policy="off", max_tokens=40)
    alone_late = engine.ask(late, policy="off")
    full = engine.ask(prompt, policy="off")
    engine.clear()
    engine.store(prompt)
    engine.forget()
    with engine.keeping(half), engine.budget(tokens=LITTLE):
        decoding = engine.add(other, policy="off", max_tokens=40)
        for _ in range(4):
            engine.step()
        parked = park(engine, prompt)
        core(engine).pause_scheduler(mode="keep", clear_cache=clear)
        new = engine.add(late)
        engine.steps.clear()
        for _ in range(3):
            engine.step()
        assert not any(step.tokens for step in engine.steps)
        core(engine).resume_scheduler()
        answers = engine.drain()
    assert answers[decoding][0].agrees(alone)
    assert answers[parked][0].agrees(full)
    assert answers[new][0].agrees(alone_late)


def test_a_pause_that_aborts_leaves_nothing_behind(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    """One request waits, one is parked, one decodes. The `engine` fixture checks what is left."""
    engine.store(prompt)
    engine.forget()
    with engine.keeping(half), engine.budget(tokens=LITTLE):
        names = [engine.add(fresh(40), policy="off", max_tokens=60)]
        engine.step()
        engine.step()
        names.append(park(engine, prompt))
        names.append(engine.add(fresh(40)))
        core(engine).pause_scheduler(mode="abort", clear_cache=False)
        for _ in range(3):
            engine.step()
    for name in names:  # in a single process nothing else tells vLLM's front end
        engine.abort(name)
    core(engine).pause_scheduler(mode="abort", clear_cache=True)
    core(engine).resume_scheduler()
    assert not engine.core.has_unfinished_requests()


# --- several answers to one prompt ----------------------------------------------------------------


def test_three_answers_to_an_edited_prompt(engine: Engine, prompt: list[int]) -> None:
    """Both children plan; their edited blocks have the same private hashes, which no other request
    has."""
    follower = [*prompt[:50], *NEW, *prompt[53:]]
    engine.store(prompt)
    engine.forget()
    hashes = []
    finished = engine.planning.finished

    def watched(request: Any, block_ids: Any = ()) -> Any:
        hashes.append(list(request.block_hashes))
        return finished(request, block_ids)

    engine.planning.finished = watched  # type: ignore[method-assign]
    try:
        with engine.counted() as gained:
            name = engine.add(follower, n=3, seed=5, temperature=1.0)
            assert len(engine.drain()[name]) == 3
        plain = engine.ask(follower, policy="off")
    finally:
        engine.planning.finished = finished  # type: ignore[method-assign]
    assert gained["hits_edited"] == 3
    *children, exact = hashes
    shared = 50 // BLOCK
    assert children[0] == children[1] == children[2]
    assert children[0][:shared] == exact[:shared]
    assert not set(children[0][shared:]) & set(exact)
    engine.forget()
    assert engine.ask(follower, policy="off").agrees(plain)


# --- answers and metrics --------------------------------------------------------------------------


def test_only_reused_rows_count_as_cached(engine: Engine, prompt: list[int]) -> None:
    """In the API's usage and in vLLM's metrics; placeholders count as computed."""

    def hits() -> float:
        names = ("vllm:external_prefix_cache_hits", "vllm:external_prefix_cache_queries")
        found = {m.name: m.value for m in engine.llm.get_metrics() if m.name in names}
        return float(found[names[0]])

    follower = [*prompt[:50], *NEW, *prompt[53:]]
    engine.store(prompt)
    for budget in (None, LITTLE):
        engine.forget()
        before = hits()
        with engine.counted() as gained, engine.budget(tokens=budget):
            answer = engine.ask(follower)
        reused = gained["tokens_reused_exact"] + gained["tokens_reused_edited"]
        assert gained["hits_edited"] == 1
        assert answer.cached == reused == answer.said["reused"]
        assert hits() - before == reused
        engine.clear()
        engine.store(prompt)


def test_an_answer_says_what_was_reused_and_why_not(engine: Engine, prompt: list[int]) -> None:
    follower = [*prompt[:50], *NEW, *prompt[53:]]
    first = engine.store(prompt).said
    assert (first["reused"], first["recomputed"], first["policy"]) == (0, LENGTH, "aggressive")
    assert first["reason"]
    engine.forget()
    edited = engine.store(follower).said
    assert edited["exact"] == 50
    assert edited["edited"] > 0
    assert edited["reason"] == ""
    parts = ("exact", "edited", "recomputed", "prefix_cached")
    assert sum(edited[part] for part in parts) == len(follower)
    cached = engine.ask(prompt, policy="exact").said
    assert cached["prefix_cached"] == 50 // BLOCK * BLOCK
    assert cached["policy"] == "exact"
    assert engine.ask(prompt, policy="off").said["reason"] == "policy_off"


# --- aborts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("edited", [False, True], ids=["exact", "edited"])
def test_abort_while_loading(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, edited: bool
) -> None:
    engine.store(prompt)
    engine.forget()
    load, names = engine.worker.load_one, []

    def aborted(spec: Any) -> Any:
        engine.abort(names.pop())
        return load(spec)

    monkeypatch.setattr(engine.worker, "load_one", aborted)
    with engine.keeping(half if edited else lambda length: [(0, length)]):
        names.append(engine.add(prompt))
        engine.drain()
    assert not names


def test_abort_while_the_rows_are_saved(engine: Engine, prompt: list[int]) -> None:
    """They are right, whatever happened to the request."""
    full = engine.ask(prompt, policy="off")
    engine.forget()
    with engine.counted() as gained:
        name = engine.add(prompt, max_tokens=50)
        engine.step()
        engine.abort(name)
    assert gained["nodes"] == 1
    engine.forget()
    with engine.counted() as gained:
        assert engine.ask(prompt).agrees(full)
    assert gained["hits_exact"] == 1
