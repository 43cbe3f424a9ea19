"""Which edited prompts are given to idle engines, to whom, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.nodes.node import Node, node_id
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.plan.contexts import Context
from kvshare_store.save import second_looks
from kvshare_store.save.second_looks import LOOK_SECONDS, Look, SecondLooks
from kvshare_store.save.staging import Reuse
from tests.save.test_answers import ANSWER, PROMPT, changed, save
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(driver: Open, clock: Clock) -> Driver:
    """A store whose queue has a clock of its own."""
    opened = driver(second_look_control=0.0)
    queue(opened).clock = clock
    return opened


def queue(engine: Driver) -> SecondLooks:
    return engine.store.saving.looks


def edited(engine: Driver, donor: Sequence[int] = PROMPT) -> list[int]:
    """A prompt that was stored with edited rows."""
    engine.save(donor)
    tokens = changed(list(donor))
    engine.save(tokens, engine.serve(tokens))
    assert node(engine, tokens, exact=False) is not None
    return tokens


def compute(engine: Driver, tokens: Sequence[int]) -> None:
    """As an engine does in a look: from the exact prefix on."""
    engine.save(tokens, engine.serve(tokens, policy="exact"))


def node(engine: Driver, tokens: Sequence[int], *, exact: bool) -> Node | None:
    name = node_id(engine.namespace.digest, np.asarray(tokens, np.int32), exact)
    return engine.store.tree.get(name)


def next_look(engine: Driver, owner: str = "engine") -> list[int] | None:
    """The tokens of the next look, or None."""
    look = given(engine, owner)
    return None if look is None else np.frombuffer(look.tokens, np.int32).tolist()


def given(engine: Driver, owner: str = "engine") -> Look | None:
    return engine.store.next_look(owner, [engine.namespace.digest])


def counts(engine: Driver, *names: str) -> list[Any]:
    stats = engine.store.stats()
    return [stats[name] for name in names]


# --- what is given --------------------------------------------------------------------------------


def test_an_edited_prompt_is_given_once_and_settles(engine: Driver) -> None:
    tokens = edited(engine)
    assert next_look(engine, "one") == tokens
    assert next_look(engine, "two") is None, "no prompt is done twice"
    compute(engine, tokens)
    assert node(engine, tokens, exact=True) is not None
    assert node(engine, tokens, exact=False) is None
    assert engine.serve([*tokens, 7]).exact == len(tokens)
    names = ("edited_stored", "settled", "looks", "looks_waiting")
    assert counts(engine, *names) == [1, 1, 1, 0]


def test_an_answer_is_part_of_the_look(engine: Driver) -> None:
    tokens = edited(engine)
    before = node(engine, tokens, exact=False)
    assert before is not None
    assert save(engine, tokens, ANSWER, Reuse(generation=1, contexts=before.contexts))
    assert next_look(engine) == [*tokens, *ANSWER]
    assert counts(engine, "edited_stored", "looks_waiting") == [1, 1]


def test_exact_prompts_are_not_given(engine: Driver) -> None:
    engine.save(PROMPT)
    save(engine, PROMPT, ANSWER)
    assert next_look(engine) is None
    assert counts(engine, "edited_stored", "looks") == [0, 0]


def test_only_prompts_of_the_namespaces_that_an_engine_names(engine: Driver) -> None:
    edited(engine)
    assert engine.store.next_look("engine", ["ab" * 32]) is None
    assert engine.store.next_look("engine", []) is None
    assert next_look(engine)


def test_prompts_of_adapters_are_declined(engine: Driver) -> None:
    space = engine.namespace.for_tenant("", "adapter")
    one = Driver(engine.store, space, engine.book)
    edited(one)
    assert engine.store.next_look("engine", [space.digest]) is None
    assert counts(engine, "edited_stored", "looks_declined", "looks_waiting") == [1, 1, 0]


def test_a_prompt_whose_answer_is_on_the_way_waits_for_it(engine: Driver, clock: Clock) -> None:
    """While an engine works. The answer of its own an idle one stores before it asks."""
    tokens = edited(engine)
    engine.store.text.working("engine", True)
    assert next_look(engine) is None
    engine.store.text.working("engine", False)
    engine.store.text.working("other", True)
    assert next_look(engine) is None
    clock.now += 61
    assert next_look(engine) == tokens
    engine.store.saving.looks.ended("engine", *_name(engine, tokens), "dropped")
    other = edited(engine, prompt(11, 40))
    assert next_look(engine, "third") == tokens
    engine.store.text.working("other", False)
    assert next_look(engine) == other


def test_what_a_longer_exact_prompt_begins_with_is_not_computed(engine: Driver) -> None:
    tokens = edited(engine)
    compute(engine, [*tokens, *ANSWER])
    assert next_look(engine) is None
    assert counts(engine, "looks_waiting") == [0]


# --- the order ------------------------------------------------------------------------------------


def test_the_newest_conversation_comes_first(engine: Driver, clock: Clock) -> None:
    first = edited(engine)
    clock.now += 30
    second = edited(engine, prompt(11, 40))
    assert [next_look(engine), next_look(engine)] == [second, first]


def test_a_donor_of_many_comes_before_a_conversation_and_one_with_a_next_turn_does_not(
    engine: Driver,
) -> None:
    first = edited(engine)
    for seed in (21, 22, 23):
        engine.serve_and_save([*first, *prompt(seed, 20)])
    turns = edited(engine, prompt(11, 40))
    engine.serve_and_save([*turns, *prompt(24, 20)])
    found = iter(lambda: next_look(engine), None)
    order = list(found)
    assert order[0] == first
    assert [*turns, *prompt(24, 20)] in order
    assert turns not in order, "the conversation has moved on"


# --- bounds ---------------------------------------------------------------------------------------


def test_the_queue_is_bounded(driver: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_looks, "_MOST", 3)
    engine = driver(second_look_control=0.0)
    tokens = [edited(engine, prompt(seed, 40)) for seed in range(31, 36)]
    assert counts(engine, "looks_waiting") == [3]
    found = [next_look(engine) for _ in range(4)]
    assert found[3] is None
    assert sorted(found[:3]) == sorted(tokens[2:])  # type: ignore[type-var]


def test_what_waited_too_long_is_given_no_more(engine: Driver, clock: Clock) -> None:
    edited(engine)
    clock.now += 601
    assert next_look(engine) is None
    assert counts(engine, "looks_waiting") == [0]


def test_a_node_that_left_the_store_is_given_no_more(engine: Driver) -> None:
    edited(engine)
    engine.store.clear()
    assert next_look(engine) is None
    assert counts(engine, "looks_waiting") == [0]


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_ends_by_time_and_after_three_tries_nobody_gets_the_prompt(
    engine: Driver, clock: Clock
) -> None:
    tokens = edited(engine)
    for owner in ("one", "two", "three"):
        assert next_look(engine, owner) == tokens
        clock.now += LOOK_SECONDS - 1
        assert next_look(engine, "other") is None
        clock.now += 2
    assert next_look(engine, "four") is None
    assert counts(engine, "looks", "looks_waiting") == [3, 0]


def test_a_look_that_was_dropped_may_be_taken_by_another(engine: Driver) -> None:
    tokens = edited(engine)
    look = given(engine, "one")
    assert look is not None
    engine.store.saving.looks.ended("two", look.node, look.stamp, "dropped")
    assert next_look(engine, "two") is None, "it is not two's to give back"
    engine.store.saving.looks.ended("one", look.node, look.stamp + 1, "dropped")
    assert next_look(engine, "two") is None, "nor was it this form"
    engine.store.saving.looks.ended("one", look.node, look.stamp, "dropped")
    assert next_look(engine, "two") == tokens
    assert counts(engine, "looks_dropped") == [1], "what one has not had is no drop"
    for _ in range(5):
        engine.store.saving.looks.ended("two", look.node, look.stamp, "dropped")
        assert next_look(engine, "two") == tokens, "as often as requests come in between"


def test_a_look_that_an_engine_declined_is_given_to_nobody(engine: Driver) -> None:
    edited(engine)
    look = given(engine)
    assert look is not None
    engine.store.saving.looks.ended("engine", look.node, look.stamp, "declined")
    assert next_look(engine, "other") is None
    assert counts(engine, "looks_declined", "looks_waiting") == [1, 0]


def test_what_an_engine_had_that_is_gone_may_be_taken_by_another(engine: Driver) -> None:
    tokens = edited(engine)
    assert next_look(engine, "one") == tokens
    engine.store.reap({"nobody"})
    assert next_look(engine, "two") is None
    engine.store.reap({"one"})
    assert next_look(engine, "two") == tokens


def test_nothing_is_known_of_looks_that_nobody_was_given(engine: Driver) -> None:
    engine.store.saving.looks.ended("engine", "nobody", 1, "computed")
    tokens = edited(engine)
    engine.store.saving.looks.ended("engine", *_name(engine, tokens), "declined")
    assert next_look(engine) == tokens


# --- what is counted ------------------------------------------------------------------------------


def test_a_looks_lookup_is_no_request(engine: Driver) -> None:
    """Whether it finds something, nothing, is given up, or runs out."""
    edited(engine)
    store, before = engine.store, engine.store.stats()
    logged = store.requests.last(100)

    def look(tokens: Sequence[int], owner: str = "engine") -> ReusePlan:
        asked = store.plan_soon(tokens, engine.namespace, policy="exact", owner=owner, look=True)
        return asked.result()

    used, given_up, lost = look(PROMPT), look(PROMPT), look(PROMPT, "lost")
    nbytes = used.exact * engine.namespace.layout.row_bytes
    left = used.tokens - used.exact
    store.finish(used, Outcome(used.exact, 0, left, nbytes, 1e-3))
    store.finish(given_up, Outcome(failed="aborted", recomputed=10, cached=used.tokens - 10))
    store.reap({"lost"})
    assert lost.lease
    assert look(prompt(99, 40)).declined
    after = store.stats()
    assert after["leases"] == 0
    assert after["bytes_loaded"] == before["bytes_loaded"] + nbytes
    same = {"lookups", "misses", "declined", *(name for name in before if "tokens_" in name),
            *(name for name in before if name.startswith("hits_"))}  # fmt: skip
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    requests = next(iter(before["namespaces"].values()))["requests"]
    assert next(iter(after["namespaces"].values()))["requests"] == requests
    assert after["seconds"]["lookup"] == before["seconds"]["lookup"]
    assert store.requests.last(100) == logged


# --- what replaces what ---------------------------------------------------------------------------


def test_children_of_a_settled_prompt_keep_their_rows(engine: Driver) -> None:
    tokens = edited(engine)
    child = [*tokens, *prompt(21, 20)]
    engine.serve_and_save(child)
    compute(engine, tokens)
    assert node(engine, tokens, exact=False) is None
    assert engine.serve([*child, 7]).reused == len(child)


def test_a_pinned_prompt_stays_beside_the_exact_one(engine: Driver) -> None:
    tokens = edited(engine)
    before = node(engine, tokens, exact=False)
    assert before is not None
    engine.store.flush()
    assert engine.store.pin(before.id)
    compute(engine, tokens)
    assert node(engine, tokens, exact=True) is not None
    assert node(engine, tokens, exact=False) is not None
    assert next_look(engine) is None


def test_whoever_was_planned_a_prompt_that_settles_meanwhile_hangs_from_the_exact_one(
    engine: Driver,
) -> None:
    tokens = edited(engine)
    child = [*tokens, *prompt(21, 20)]
    plan = engine.plan(child)
    compute(engine, tokens)
    saved = engine.save(child, plan)  # its plan is open: the edited node vouches
    assert saved
    exact, found = node(engine, tokens, exact=True), engine.store.tree.get(saved)
    assert exact is not None
    assert found is not None
    assert found.parent == exact.id
    engine.finish(plan)


def test_the_answer_to_a_prompt_that_has_settled_is_not_taken_for_another(engine: Driver) -> None:
    """Its rows were computed behind edited ones, and the store has no such prompt any more."""
    tokens = edited(engine)
    before = node(engine, tokens, exact=False)
    assert before is not None
    compute(engine, tokens)
    reuse = Reuse(generation=1, contexts=before.contexts)
    assert save(engine, tokens, ANSWER, reuse) is None
    other = Reuse(generation=1, contexts=(Context(20, bytes(16)),))
    assert save(engine, tokens, ANSWER, other) is None


def test_a_look_can_be_sent(engine: Driver) -> None:
    tokens = edited(engine)
    look = given(engine)
    assert look is not None
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(look), type=Look)
    assert np.frombuffer(sent.tokens, np.int32).tolist() == tokens
    assert (sent.node, sent.stamp) == _name(engine, tokens)


def _name(engine: Driver, tokens: Sequence[int]) -> tuple[str, int]:
    found = node(engine, tokens, exact=False)
    assert found is not None
    return found.id, found.stamp
