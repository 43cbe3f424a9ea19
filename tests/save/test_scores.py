"""What second looks say of answers: who is asked, what counts, and where it is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from kvshare_store.daemon import describe, protocol
from kvshare_store.errors import ProtocolError
from kvshare_store.nodes.node import Node
from kvshare_store.observability.exposition import exposition
from kvshare_store.quality.ladder import Terms
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.score import SCORED_TOKENS
from kvshare_store.save import second_looks
from kvshare_store.save.second_looks import LOOK_SECONDS, End, Look
from kvshare_store.save.staging import Buffer, Reuse, packed
from tests.save.test_answers import PROMPT, changed
from tests.save.test_second_looks import Clock, compute, edited, node, queue
from tests.support.oracle import Driver, pick, positions_of, prompt

Open = Callable[..., Driver]
ANSWER = prompt(2, 20)
REGRETS = (0.0, 0.0, 0.5, 0.0, 1.5)
WHOLE = (*REGRETS, *(0.0,) * (SCORED_TOKENS - len(REGRETS)))
"""Of all tokens that are asked for."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(driver: Open, clock: Clock) -> Callable[[float], Driver]:
    """A store that takes such a share of the answers served in full for controls."""

    def open_(share: float) -> Driver:
        engine = driver(second_look_control=share)
        queue(engine).clock = clock
        return engine

    return open_


@pytest.fixture
def engine(opened: Callable[[float], Driver]) -> Driver:
    return opened(0.0)


def answer(
    engine: Driver,
    told: Sequence[int],
    *,
    request: str = "request-1",
    greedy: bool = True,
    length: int = len(ANSWER),
) -> Node:
    """Store the answer to a stored prompt, exact or edited, as an engine does."""
    stored = node(engine, told, exact=False) or node(engine, told, exact=True)
    assert stored is not None
    reuse = Reuse(generation=stored.generation, contexts=stored.contexts)
    tokens, exact = [*told, *ANSWER[:length]], stored.exact
    staged = engine.store.stage(
        tokens, engine.namespace, reuse, extends=len(told), greedy=greedy, request=request
    )
    rows = engine.book.computed(tokens, len(tokens) if exact else 20, request)
    fresh = positions_of(staged.fresh)
    engine.book.write(tokens, rows, fresh, len(tokens) if exact else 20)
    blocks = packed(pick(rows, fresh), staged.sizes, engine.namespace.layout)
    assert engine.store.commit(staged.id, Buffer(blocks))
    found = node(engine, tokens, exact=exact)
    assert found is not None
    return found


def given(engine: Driver, owner: str = "engine", *, scores: bool = True) -> Look | None:
    return engine.store.next_look(owner, [engine.namespace.digest], scores=scores)


def said(
    engine: Driver,
    look: Look,
    regrets: tuple[float, ...] = REGRETS,
    *,
    owner: str = "engine",
    end: End = "computed",
) -> None:
    engine.store.saving.looks.ended(owner, look.node, look.stamp, end, regrets)


def verdict(engine: Driver, name: str) -> dict[str, Any] | None:
    return engine.store.verdicts.of_node(name)


# --- edited answers -------------------------------------------------------------------------------


def test_a_look_says_which_tokens_are_scored(engine: Driver) -> None:
    told = edited(engine)
    answer(engine, told)
    look = given(engine)
    assert look is not None
    assert (look.answer, look.score, look.control) == (len(told), SCORED_TOKENS, False)


def test_a_short_answer_is_scored_as_far_as_it_goes(engine: Driver) -> None:
    told = edited(engine)
    answer(engine, told, length=3)
    look = given(engine)
    assert look is not None
    assert look.score == 3


def test_a_prompt_without_its_answer_is_not_scored(engine: Driver) -> None:
    edited(engine)
    look = given(engine)
    assert look is not None
    assert (look.answer, look.score) == (0, 0)
    said(engine, look)
    assert verdict(engine, look.node) is None


@pytest.mark.parametrize("settled_first", [False, True])
def test_the_verdict_is_seen_at_both_twins_and_at_the_request(
    engine: Driver, settled_first: bool
) -> None:
    """The exact rows and what the engine says of the answer come over two connections."""
    told = edited(engine)
    stored = answer(engine, told)
    look = given(engine)
    assert look is not None
    if settled_first:
        compute(engine, [*told, *ANSWER])
    said(engine, look)
    if not settled_first:
        compute(engine, [*told, *ANSWER])
    twin = node(engine, [*told, *ANSWER], exact=True)
    assert twin is not None
    found = describe.show_node(engine.store, twin.id)["verdict"]
    expected = {
        "scored": 5, "control": False, "policy": stored.policy, "greedy": True,
        "regret": pytest.approx(0.4), "worst": 1.5, "diverged": 2, "floor": None,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["traffic"].startswith(engine.namespace.digest[:12])
    assert found["settled"] >= stored.created
    edited_one = verdict(engine, stored.id)
    assert edited_one is not None
    assert edited_one["at"] == found["at"]
    of_request = engine.store.verdicts.of_request("request-1", engine.namespace.digest[:12])
    assert of_request is not None
    assert of_request["at"] == found["at"]
    assert engine.store.verdicts.of_request("request-1", "ab") is None, "another tenant's"
    assert engine.store.verdicts.of_request("request-2", "") is None


def test_without_greed_there_is_a_regret_but_no_divergence(engine: Driver) -> None:
    answer(engine, edited(engine), greedy=False)
    look = given(engine)
    assert look is not None
    said(engine, look)
    found = verdict(engine, look.node)
    assert found is not None
    assert (found["scored"], found["diverged"]) == (5, None)


def test_what_means_something_else_does_not_count(engine: Driver) -> None:
    answer(engine, edited(engine), length=3)
    look = given(engine)
    assert look is not None
    said(engine, look, REGRETS[:3], owner="other")
    said(engine, msgspec.structs.replace(look, stamp=look.stamp + 1), REGRETS[:3])
    said(engine, look, (0.0,) * 4)
    assert verdict(engine, look.node) is None, "nor more than were asked for"
    said(engine, look, REGRETS[:3])
    assert verdict(engine, look.node) is None, "it has ended"


def test_what_engines_had_that_are_gone_is_scored_by_others(engine: Driver) -> None:
    answer(engine, edited(engine))
    look = given(engine, "one")
    assert look is not None
    engine.store.reap({"one"})
    said(engine, look, owner="one")
    assert verdict(engine, look.node) is None
    again = given(engine, "two")
    assert again is not None
    said(engine, again, owner="two")
    assert verdict(engine, look.node) is not None


@pytest.mark.parametrize("regret", [-0.1, float("nan"), float("inf"), 1e9])
def test_regrets_that_are_no_regrets_are_refused(regret: float) -> None:
    body = protocol.encode(protocol.Looked("ab", 7, "computed", (regret,)))
    with pytest.raises(ProtocolError):
        protocol.decode_request(body)


# --- controls -------------------------------------------------------------------------------------


def control(engine: Driver, seed: int = 31) -> Node:
    told = prompt(seed, 40)
    engine.save(told)
    return answer(engine, told, request=f"request-{seed}")


def test_an_answer_served_in_full_is_given_to_engines_that_score(
    opened: Callable[[float], Driver],
) -> None:
    engine = opened(1.0)
    stored = control(engine)
    assert given(engine, scores=False) is None, "one of the release before would compute it in vain"
    look = given(engine)
    assert look is not None
    assert (look.node, look.control, look.answer) == (stored.id, True, 40)
    assert given(engine, "other") is None
    said(engine, look, (), end="dropped")
    again = given(engine, "other")
    assert again == look
    said(engine, look, (0.0, 0.25), owner="other")
    assert given(engine) is None
    found = verdict(engine, stored.id)
    assert found is not None
    assert (found["control"], found["policy"], found["settled"]) == (True, "exact", None)
    assert (found["floor"], found["floor_answers"]) == (0.125, 1)
    stats = engine.store.stats()
    assert (stats["looks"], stats["looks_control"], stats["edited_stored"]) == (0, 2, 0)


def test_the_share_says_how_many_are_controls(opened: Callable[[float], Driver]) -> None:
    engine = opened(0.0)
    control(engine)
    assert given(engine) is None
    engine.store.reload(msgspec.structs.replace(engine.store.config, second_look_control=1.0))
    stored = control(engine, 32)
    look = given(engine)
    assert look is not None
    assert look.node == stored.id


def test_prompts_without_answers_are_no_controls(opened: Callable[[float], Driver]) -> None:
    engine = opened(1.0)
    engine.save(PROMPT)
    assert given(engine) is None


def test_controls_are_few_and_the_oldest_go(
    opened: Callable[[float], Driver], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_looks, "_CONTROLS", 2)
    engine = opened(1.0)
    stored = [control(engine, seed) for seed in (41, 42, 43)]
    looks = [given(engine, owner) for owner in ("one", "two", "three")]
    assert [look and look.node for look in looks] == [stored[1].id, stored[2].id, None]
    control(engine, 44)
    clock.now += 601
    assert given(engine) is None, "nor are they scored much later"


def test_a_control_comes_after_nine_edited_prompts_where_both_wait(
    opened: Callable[[float], Driver],
) -> None:
    engine = opened(1.0)
    stored = control(engine)
    for seed in range(50, 62):
        edited(engine, prompt(seed, 40))
    looks = [given(engine, str(at)) for at in range(12)]
    assert [look is not None and look.control for look in looks].index(True) == 9
    assert looks[9] is not None
    assert looks[9].node == stored.id


def test_the_floor_is_a_tenants_own(opened: Callable[[float], Driver]) -> None:
    engine = opened(1.0)
    control(engine)
    look = given(engine)
    assert look is not None
    said(engine, look, (0.5,))
    other = Driver(engine.store, engine.namespace.for_tenant("other"), engine.book)
    answer(other, edited(other), request="other")
    look = given(other)
    assert look is not None
    said(other, look)
    found = verdict(other, look.node)
    assert found is not None
    assert found["floor"] is None


def test_the_floor_of_a_sampled_answer_is_that_of_sampled_controls(
    opened: Callable[[float], Driver],
) -> None:
    engine = opened(1.0)
    control(engine)
    answer(engine, edited(engine), greedy=False)
    for regrets in (REGRETS, (0.5,)):
        look = given(engine)
        assert look is not None
        said(engine, look, regrets)
        found = verdict(engine, look.node)
        assert found is not None
        assert found["floor"] == (0.5 if look.control else None)


def test_a_score_counts_for_the_class_of_its_request_and_a_control_for_the_floor(
    opened: Callable[[float], Driver],
) -> None:
    engine = opened(1.0)
    answer(engine, edited(engine))
    control(engine)
    for regrets in (WHOLE, (0.0,) * SCORED_TOKENS):
        look = given(engine)
        assert look is not None
        said(engine, look, regrets)
    (known,) = engine.store.quality.report()
    assert known.traffic.endswith("/replace")
    assert [(one.policy, one.greedy) for one in known.policies] == [("aggressive", 1)]
    assert known.policies[0].diverged.mean == 1
    assert (known.floor.greedy, known.floor.diverged.mean) == (1, 0)


def test_a_part_of_a_score_is_seen_and_teaches_nothing(
    opened: Callable[[float], Driver],
) -> None:
    """An engine whose steps have room for one token only would call every class harmless."""
    engine = opened(1.0)
    answer(engine, edited(engine))
    control(engine)
    for _ in range(2):
        look = given(engine)
        assert look is not None
        said(engine, look, (0.0,))
        assert verdict(engine, look.node) is not None
    assert engine.store.quality.report() == []


def test_an_answer_counts_once(engine: Driver, clock: Clock) -> None:
    answer(engine, edited(engine))
    look = given(engine)
    assert look is not None
    said(engine, look, WHOLE, end="dropped")
    assert engine.store.quality.report() == [], "a look that was dropped says nothing"
    look = given(engine)
    assert look is not None
    said(engine, look, WHOLE)
    clock.now += LOOK_SECONDS + 1
    again = given(engine)  # its exact rows never came
    assert again is not None
    assert (again.node, again.score) == (look.node, 0)
    said(engine, again, WHOLE)
    (known,) = engine.store.quality.report()
    assert known.policies[0].greedy == 1


def test_a_class_is_known_apart_by_share_computed_and_by_distance(engine: Driver) -> None:
    """As the prompt was served, and its answer finds it."""
    engine.save(PROMPT)
    told = changed(PROMPT)
    plan = engine.serve(told)
    engine.save(told, plan)
    answer(engine, told)
    look = given(engine)
    assert look is not None
    said(engine, look, WHOLE)
    (known,) = engine.store.quality.report()
    (policy,) = known.policies
    share = 100 * (1 - (plan.reused - plan.exact) / (len(told) - plan.exact))
    (computed,), (distance,) = policy.computed, policy.distance
    assert computed.start <= share
    assert computed.stop is None or share < computed.stop
    assert distance.start <= len(told) - 22 < (distance.stop or len(told))
    assert computed.diverged == distance.diverged == policy.diverged


def test_an_answer_whose_prompt_is_forgotten_has_its_edit_still(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_looks, "_REMEMBERED", 1)
    engine = driver(second_look_control=0.0)
    told = edited(engine)
    edited(engine, prompt(51, 40))
    answer(engine, told)
    look = given(engine)
    assert look is not None
    said(engine, look, WHOLE)
    ((policy,),) = (one.policies for one in engine.store.quality.report())
    assert (policy.greedy, policy.computed) == (1, ())
    assert [one.greedy for one in policy.distance] == [1]


def test_a_look_says_the_kind_of_edit_and_the_bound(driver: Open) -> None:
    engine = driver(second_look_control=1.0)
    answer(engine, edited(engine))
    control(engine)
    engine.store.quality.reload(Terms(0.75, 0.05))
    first, second = given(engine), given(engine)
    assert first is not None
    assert second is not None
    assert (first.edit, first.bound) == ("replace", 0.75)
    assert (second.control, second.edit, second.bound) == (True, "", 0.75)


# --- what is counted and forgotten ----------------------------------------------------------------


def test_scores_are_counted_by_policy(opened: Callable[[float], Driver]) -> None:
    engine = opened(1.0)
    answer(engine, edited(engine))
    control(engine)
    for regrets in (REGRETS, (0.25, 0.0)):
        look = given(engine)
        assert look is not None
        said(engine, look, regrets)
    stats = engine.store.stats()
    assert stats["scores"] == {
        "aggressive": {"greedy": {"answers": 1, "diverged": 1, "tokens": 5, "regret": 2.0}},
        "control": {"greedy": {"answers": 1, "diverged": 1, "tokens": 2, "regret": 0.25}},
    }
    lines = exposition(stats).decode().splitlines()
    assert 'kvshare_regret_nats_total{chosen="greedy",edit="",policy="control"} 0.25' in lines
    assert 'kvshare_diverged_answers_total{edit="replace",policy="aggressive"} 1.0' in lines
    assert "kvshare_second_look_controls_total 1.0" in lines


def test_what_is_said_during_a_purge_is_forgotten_too(
    engine: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(engine, edited(engine))
    look = given(engine)
    assert look is not None
    forget = Quality.forget

    def slow(self: Quality, namespace: str) -> None:
        forget(self, namespace)  # it writes a file
        said(engine, look, WHOLE)

    monkeypatch.setattr(Quality, "forget", slow)
    engine.store.flush()
    engine.store.purge(engine.namespace.digest)
    assert engine.store.quality.report() == []
    assert verdict(engine, look.node) is None


def test_a_purge_forgets_verdicts_and_looks_that_engines_have(
    opened: Callable[[float], Driver],
) -> None:
    engine = opened(1.0)
    answer(engine, edited(engine))
    first = given(engine)
    assert first is not None
    said(engine, first)
    control(engine)
    second = given(engine)
    assert second is not None
    engine.store.flush()
    engine.store.purge(engine.namespace.digest)
    said(engine, second)
    for look in (first, second):
        assert verdict(engine, look.node) is None
    assert engine.store.verdicts.of_request("request-1", "") is None
