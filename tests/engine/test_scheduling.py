"""Reuse among other requests: budgets, parking, batches, sampling, aborts, preemption.

vLLM's own prefix cache is off here, so that every row comes from the store or is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
from kvshare_connectors.vllm.metadata import KVShareMetadata

from kvshare_store.errors import DeadlineError, LeaseError
from tests.engine.harness import BLOCK, PATIENCE_S, Answer, Engine, Fresh, Keep, random_runs
from tests.engine.soak import Traffic, related_prompts
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 150
ROWS = 10
"""max_num_seqs: rows of a batch."""
LITTLE = 24
"""A step's token budget, which the placeholders here exceed."""

half = partial(random_runs, seed=5)
SETTINGS = {
    "kvshare": {"policy": "aggressive"},
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 512,
    "max_num_seqs": ROWS,
}


@pytest.fixture(autouse=True)
def counts_add_up(engine: Engine) -> Iterator[None]:
    yield
    stats = engine.stats()
    reused = sum(stats[f"tokens_reused_{kind}"] for kind in ("exact", "continued", "edited"))
    assert stats["tokens_requested"] == reused + stats["tokens_recomputed"]
    assert all(step.rows <= ROWS for step in engine.steps)
    assert all(step.tokens <= 512 for step in engine.steps)


def thirds(length: int) -> Keep:
    """Two runs of placeholders, three of rows: few enough for any batch here."""
    return [(0, length // 5), (length // 3, length // 2), (2 * length // 3, length - 4)]


def runs_by_step(engine: Engine) -> list[list[tuple[int, int]]]:
    """The placeholder runs of each step that had any."""
    return [
        [(start, length) for _, start, length in step.runs] for step in engine.steps if step.runs
    ]


def all_off(engine: Engine, prompts: list[list[int]], **options: int) -> list[Answer]:
    return [engine.ask(prompt, policy="off", **options) for prompt in prompts]


# --- chunks ---------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_budget_is_stored_and_reused(
    engine: Engine, prompt: list[int]
) -> None:
    full = engine.ask(prompt, policy="off")
    with engine.budget(tokens=64):
        with engine.counted() as gained:
            assert engine.store(prompt).agrees(full)
        assert gained["nodes"] == 1
        with engine.counted() as gained:
            assert engine.ask(prompt).agrees(full)
    assert gained["hits_exact"] == 1
    assert gained["tokens_reused_exact"] == LENGTH - 1


@pytest.mark.parametrize("budget", [48, 512])
def test_what_follows_an_exact_prefix_comes_in_chunks(
    engine: Engine, prompt: list[int], budget: int
) -> None:
    """The blocks of the last chunk are allocated long after the load."""
    begun = prompt[:70]
    engine.store(begun)
    full = engine.ask(prompt, policy="off")
    with engine.budget(tokens=budget):
        with engine.counted() as gained:
            assert engine.store(prompt, policy="exact").agrees(full)
        assert gained["tokens_reused_exact"] == len(begun)
        with engine.counted() as gained:
            assert engine.ask(prompt, policy="exact").agrees(full)
        assert gained["tokens_reused_exact"] == LENGTH - 1


@pytest.mark.parametrize("budget", [48, 512])
def test_what_follows_edited_rows_is_stored_with_its_own_rows(
    engine: Engine, prompt: list[int], budget: int
) -> None:
    """A node built on an edited plan returns exactly the rows that the engine computed."""
    half = LENGTH // 2
    engine.store(prompt[:half])
    follower = [*prompt[:30], *prompt[3:6], *prompt[30:]]
    with engine.budget(tokens=budget):
        with engine.counted() as gained:
            first = engine.store(follower)
        assert gained["hits_edited"] == gained["nodes"] == 1
        with engine.counted() as gained:
            second = engine.ask(follower)
    assert gained["tokens_reused_continued"] + gained["tokens_reused_exact"] == len(follower) - 1
    assert second.agrees(first)


# --- placeholders over several steps --------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "steps"), [({}, 1), ({"tokens": LITTLE}, 3), ({"rows": 3}, 3)], ids=str
)
def test_placeholders_over_one_step_or_many_give_the_full_answer(
    engine: Engine, prompt: list[int], limits: dict[str, int], steps: int
) -> None:
    full = engine.ask(prompt, policy="off")
    engine.store(prompt)
    keep = half if "tokens" in limits else many
    engine.steps.clear()
    with engine.counted() as gained, engine.keeping(keep), engine.budget(**limits):
        assert engine.ask(prompt).agrees(full)
    assert gained["hits_edited"] == 1
    assert steps <= len(runs_by_step(engine)) <= 8 * steps
    assert (len(runs_by_step(engine)) == 1) == (steps == 1)
    starts = [start for runs in runs_by_step(engine) for start, _ in runs]
    assert starts == sorted(starts)
    assert all(step.tokens <= limits.get("tokens", 512) for step in engine.steps)
    assert all(step.rows <= limits.get("rows", ROWS) for step in engine.steps)


def many(length: int) -> Keep:
    """Eight short runs of placeholders."""
    return [
        (start, start + length // 9 - 3) for start in range(0, length - length // 9, length // 9)
    ]


def test_an_edited_prompt_gets_the_same_answer_in_one_step_as_in_many(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    follower = [*prompt[:50], *fresh(60), *prompt[53:]]
    engine.store(prompt)
    answers = []
    for budget in (LITTLE, 512):
        engine.steps.clear()
        with engine.counted() as gained, engine.budget(tokens=budget):
            answers.append(engine.ask(follower, max_tokens=1))
        assert gained["hits_edited"] == 1
        assert (len(runs_by_step(engine)) > 1) == (budget == LITTLE)
        engine.clear()
        engine.store(prompt)
    assert answers[0].agrees(answers[1])


def test_others_decode_as_if_alone_while_a_request_is_parked(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    other = fresh(60)
    alone = engine.ask(other, policy="off", max_tokens=12)
    full = engine.ask(prompt, policy="off")
    engine.store(prompt)
    decoder = engine.add(other, policy="off", max_tokens=12)
    engine.step()
    engine.steps.clear()
    with engine.counted() as gained, engine.keeping(half), engine.budget(tokens=LITTLE):
        parked = engine.add(prompt)
        answers = engine.drain()
    assert gained["hits_edited"] == 1
    shared = [step for step in engine.steps if step.runs]
    assert len(shared) >= 2
    # the decoding request had its row in each
    assert all(step.rows > len(step.runs) for step in shared)
    assert answers[decoder][0].agrees(alone)
    assert answers[parked][0].agrees(full)


def test_a_queue_of_others_does_not_starve_a_parked_request(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    """Free rows go to the parked request before they go to new ones."""
    full = engine.ask(prompt, policy="off")
    engine.store(prompt)
    with engine.keeping(many), engine.budget(rows=2):
        first = [engine.add(fresh(20), policy="off", max_tokens=2) for _ in range(2)]
        engine.step()
        parked = engine.add(prompt, max_tokens=1)
        for _ in range(3):
            engine.step()
        later = [engine.add(fresh(20), policy="off", max_tokens=2) for _ in range(4)]
        order = list(engine.drain())
    assert set(order) == {*first, parked, *later}
    assert order.index(parked) < order.index(later[1])
    assert full.tokens


# --- batches --------------------------------------------------------------------------------------


def test_parked_requests_that_do_not_fit_together_come_one_after_the_other(
    engine: Engine, fresh: Fresh
) -> None:
    prompts = [fresh(100) for _ in range(3)]
    full = all_off(engine, prompts, max_tokens=2)
    for prompt in prompts:
        engine.store(prompt, policy="exact")
    room = engine.room(6)  # each needs paged blocks of four
    with engine.counted() as gained, engine.keeping(thirds), engine.budget(tokens=8), room:
        names = [engine.add(prompt, max_tokens=2) for prompt in prompts]
        answers = engine.drain()
    assert gained["hits_edited"] == 3
    for name, plain in zip(names, full, strict=True):
        assert answers[name][0].agrees(plain)


@pytest.mark.parametrize("budget", [LITTLE, 512])
def test_several_edited_requests_admitted_together(
    engine: Engine, fresh: Fresh, budget: int
) -> None:
    prompts = [fresh(100) for _ in range(3)]
    full = all_off(engine, prompts)
    for prompt in prompts:
        engine.store(prompt, policy="exact")
    engine.steps.clear()
    with engine.counted() as gained, engine.keeping(thirds), engine.budget(tokens=budget):
        names = [engine.add(prompt) for prompt in prompts]
        answers = engine.drain()
    assert gained["hits_edited"] == 3
    if budget == 512:
        assert len(runs_by_step(engine)) == 1
        assert engine.steps[0].rows == 3 * 3
    for name, plain in zip(names, full, strict=True):
        assert answers[name][0].agrees(plain)


def test_more_requests_than_rows(engine: Engine, fresh: Fresh) -> None:
    """Rows that are set aside for placeholders are not given to new requests."""
    prompts = [fresh(40 + count) for count in range(ROWS + 4)]
    full = all_off(engine, prompts, max_tokens=2)
    for prompt in prompts[::3]:
        engine.store(prompt, policy="exact")
    engine.steps.clear()
    with engine.counted() as gained, engine.keeping(thirds):
        names = [engine.add(prompt, max_tokens=2) for prompt in prompts]
        answers = engine.drain()
    assert gained["hits_edited"] == len(prompts[::3])
    assert max(step.rows for step in engine.steps) <= ROWS
    for name, plain in zip(names, full, strict=True):
        assert answers[name][0].agrees(plain)


def test_identical_prompts_together_miss_together_and_hit_together(
    engine: Engine, prompt: list[int]
) -> None:
    full = engine.ask(prompt, policy="off")
    for expected in ({"misses": 3, "nodes": 1}, {"hits_exact": 3, "nodes": 0}):
        with engine.counted() as gained:
            names = [engine.add(prompt) for _ in range(3)]
            answers = engine.drain()
        assert {name: gained[name] for name in expected} == expected
        assert all(answers[name][0].agrees(full) for name in names)


@pytest.mark.parametrize("n", [2, 3])
def test_several_samples_of_one_prompt(engine: Engine, prompt: list[int], n: int) -> None:
    # within the budget: vLLM on CPU itself fails on seeded requests that come in chunks
    def samples(**options: str) -> list[list[int]]:
        name = engine.add(prompt, n=n, temperature=1.0, seed=7, **options)
        return sorted(answer.tokens for answer in engine.drain()[name])

    plain = samples(policy="off")
    engine.store(prompt)
    with engine.counted() as gained:
        assert samples() == plain
    assert gained["hits_exact"] == n
    with engine.counted() as gained, engine.keeping(thirds):
        assert samples() == plain
    assert gained["hits_edited"] == n


def test_one_token_of_answer_is_enough_to_store_and_to_reuse(
    engine: Engine, prompt: list[int]
) -> None:
    full = engine.ask(prompt, policy="off", max_tokens=1)
    engine.store(prompt, max_tokens=1)
    with engine.counted() as gained:
        assert engine.ask(prompt, max_tokens=1).agrees(full)
    assert gained["hits_exact"] == 1


@pytest.mark.parametrize(("length", "stored"), [(1, 0), (BLOCK - 1, 0), (BLOCK, 1), (BLOCK + 1, 1)])
def test_short_prompts(engine: Engine, prompt: list[int], length: int, stored: int) -> None:
    """Below min_prompt_tokens (32) nothing is stored; above, a block need not be full."""
    short = prompt[:length]
    full = engine.ask(short, policy="off")
    with engine.counted() as gained:
        engine.store(short)
        assert engine.ask(short).agrees(full)
    assert gained["nodes"] == gained["hits_exact"] == stored
    assert gained["declined.short_prompt"] == (0 if stored else 2)


# --- loads that fail (with the prefix cache: test_faults.py) ---


@pytest.mark.parametrize("limits", [{}, {"tokens": LITTLE}], ids=["same step", "parked"])
def test_a_failed_load_is_a_miss(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    def fail(spec: object) -> int:
        raise LeaseError("forced")

    full = engine.store(prompt)
    with engine.counted() as gained, monkeypatch.context() as patch:
        patch.setattr(engine.worker, "load_one", fail)
        with engine.keeping(half), engine.budget(**limits):
            assert engine.ask(prompt).agrees(full)
    assert gained["declined.load_lease"] == 1
    assert gained["hits_edited"] == 0
    with engine.counted() as gained, engine.keeping(half), engine.budget(**limits):
        assert engine.ask(prompt).agrees(full)
    assert gained["hits_edited"] == 1


# --- aborts ---------------------------------------------------------------------------------------


def leases(engine: Engine) -> int:
    return int(engine.client.stats()["leases"])


def test_abort_while_waiting_for_room(engine: Engine, prompt: list[int]) -> None:
    engine.store(prompt)
    with engine.counted() as gained, engine.room(3):
        name = engine.add(prompt)
        engine.step()
        until(lambda: leases(engine) == 1, PATIENCE_S)
        engine.abort(name)
        until(lambda: leases(engine) == 0, PATIENCE_S)  # no further step is needed for that
    assert gained["declined.aborted"] == 1


def test_abort_while_the_lookup_runs(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan comes after its request has gone; its lease must end all the same."""
    engine.store(prompt)
    late = DeadlineError("not yet")

    def slow(*_: object) -> None:
        raise late

    with engine.counted() as gained:
        with monkeypatch.context() as patch:
            patch.setattr(engine.planning.link, "answer", slow)
            patch.setattr(engine.planning.lookups, "patience", lambda: 0.0)
            name = engine.add(prompt)
            engine.step()
            assert engine.planning.states
            engine.abort(name)
        until(lambda: leases(engine) == 1, PATIENCE_S)
    assert gained["declined.aborted"] == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_abort_while_parked(engine: Engine, prompt: list[int], steps: int) -> None:
    engine.store(prompt)
    with engine.counted() as gained, engine.keeping(half), engine.budget(tokens=16):
        name = engine.add(prompt)
        for _ in range(steps):
            engine.step()
        assert len(engine.planning.runs.parked) == 1
        engine.abort(name)
        assert not engine.planning.runs.parked
        assert not engine.core.has_unfinished_requests()
    assert gained["hits_edited"] == 1
    assert not engine.scheduler.requests


@pytest.mark.parametrize("step", [0, 1, -1], ids=["first", "second", "last"])
def test_abort_while_a_step_computes_placeholders(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The abort arrives after the step was scheduled and before its output."""
    engine.store(prompt)
    names, done = [], engine.worker.after_forward

    def aborted(metadata: KVShareMetadata) -> None:
        done(metadata)
        last = not engine.planning.runs.parked
        if names and (last if step == -1 else len(runs_by_step(engine)) == step + 1):
            engine.abort(names.pop())

    monkeypatch.setattr(engine.worker, "after_forward", aborted)
    with engine.counted() as gained, engine.keeping(half), engine.budget(tokens=16):
        engine.steps.clear()
        names.append(engine.add(prompt))
        while engine.core.has_unfinished_requests():
            engine.step()
    assert not names
    assert gained["hits_edited"] == 1
    assert not engine.scheduler.requests


@pytest.mark.parametrize("keep", [None, half], ids=["plain", "edited"])
def test_abort_while_decoding(engine: Engine, prompt: list[int], keep: Keep | None) -> None:
    engine.store(prompt)
    with engine.counted() as gained, engine.keeping(keep) if keep else nullcontext():
        name = engine.add(prompt, max_tokens=20)
        for _ in range(3):
            engine.step()
        engine.abort(name)
    assert gained["hits_edited" if keep else "hits_exact"] == 1
    assert not engine.scheduler.requests


# --- preemption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, thirds], ids=["exact", "edited"])
def test_preempted_requests_give_the_same_answers(
    engine: Engine, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, keep: Keep | None
) -> None:
    preempted = []
    preempt = engine.scheduler._preempt_request

    def watched(request: object, *args: object, **kwargs: object) -> None:
        preempted.append(request)
        preempt(request, *args, **kwargs)

    prompts = [fresh(3 * BLOCK - 6) for _ in range(3)]
    full = all_off(engine, prompts, max_tokens=12)
    for prompt in prompts:
        engine.store(prompt, policy="exact")
    monkeypatch.setattr(engine.scheduler, "_preempt_request", watched)
    reuse: AbstractContextManager[None] = engine.keeping(keep) if keep else nullcontext()
    with engine.counted() as gained, reuse, engine.room(10):
        names = [engine.add(prompt, max_tokens=12) for prompt in prompts]
        answers = engine.drain()
    assert gained["hits_edited" if keep else "hits_exact"] == 3
    assert preempted
    for name, plain in zip(names, full, strict=True):
        assert answers[name][0].agrees(plain)


# --- everything together --------------------------------------------------------------------------


def test_random_traffic(engine: Engine, fresh: Fresh) -> None:
    traffic = Traffic(engine, related_prompts(fresh(124)), seed=2)
    with engine.counted() as gained:
        for _ in range(3):
            traffic.batch()
    assert gained["hits_edited"]
