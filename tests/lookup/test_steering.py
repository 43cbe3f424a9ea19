"""Under a bound what is known of a request's class chooses the policy of its plan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.config import StoreConfig, policy_names
from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.explanation import Explanation
from kvshare_store.lookup.steering import reason_under_bound
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Match
from kvshare_store.nodes.node import node_id
from kvshare_store.plan import ReusePlan
from kvshare_store.quality.quality import Quality
from tests.quality.streams import score
from tests.support.daemons import serving
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]

DONOR = prompt(1, 300)
BOUND: dict[str, Any] = {"quality_bound": 0.02, "policy": "aggressive"}


def edited(seed: int = 5) -> list[int]:
    return [*DONOR[:100], *prompt(seed, 3), *DONOR[103:]]


def traffic(engine: Driver, tokens: list[int]) -> str:
    """The class that the last plan for these tokens was steered by."""
    node = engine.store.tree.get(node_id(engine.namespace.digest, array(DONOR), True))
    assert node is not None
    asked = msgspec.structs.replace(node, token_bytes=array(tokens).tobytes())
    return engine.store.quality.planned.of(engine.store.tree, asked, len(tokens))


def array(tokens: list[int]) -> Any:
    return np.asarray(tokens, np.int32)


def teach(engine: Driver, tokens: list[int], policy: str, *, bad: bool = False) -> None:
    """Scores of 400 answers to prompts like this one."""
    engine.serve(tokens)
    of = {"namespace": engine.namespace.digest, "traffic": traffic(engine, tokens)}
    for _ in range(400):
        engine.store.quality.observe(score(policy, diverged=bad, **of))  # type: ignore[arg-type]


def served(engine: Driver, tokens: list[int], **options: Any) -> ReusePlan:
    """The plan that most requests get: some try the next policy."""
    plans = [engine.serve(tokens, **options) for _ in range(9)]
    policies = [plan.policy for plan in plans]
    return max(plans, key=lambda plan: policies.count(plan.policy))


@pytest.fixture
def engine(driver: Open) -> Driver:
    opened = driver(**BOUND)
    opened.save(DONOR)
    return opened


def test_a_daemon_says_at_its_start_what_a_bound_does(
    config: Callable[..., StoreConfig], caplog: pytest.LogCaptureFixture
) -> None:
    for settings, words in (
        ({}, []),
        (BOUND | {"policy": "exact"}, []),
        (BOUND, ["quality_bound is 2.0 %", "begins at exact", "after about 304 good scores"]),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "kvshare"), serving(config(**settings)):
            pass
        assert ("quality_bound" in caplog.text) == bool(words)
        assert all(word in caplog.text for word in words)


def test_a_class_begins_at_exact_and_loosens_on_evidence(engine: Driver) -> None:
    plan = served(engine, edited())
    assert (plan.policy, plan.generation, plan.exact) == ("exact", 0, 100)
    classes = engine.store.stats()["quality"]["classes"]
    assert {policy for policy, count in classes.items() if count} == {"exact"}, "not scored yet"
    teach(engine, edited(), "faithful")
    plan = served(engine, edited(6))
    assert (plan.policy, plan.generation) == ("faithful", 1)
    assert min(span.start for span in plan.spans if span.edited) >= 103 + 64
    teach(engine, edited(), "aggressive")
    plan = served(engine, edited(6))
    assert plan.policy == "aggressive"
    assert min(span.start for span in plan.spans if span.edited) == 103
    teach(engine, edited(), "aggressive", bad=True)
    assert served(engine, edited(6)).policy in ("exact", "faithful")


def test_a_plan_that_the_bound_leaves_nothing_of_is_declined_for_that(engine: Driver) -> None:
    tokens = [*prompt(5, 3), *DONOR[3:]]
    plan = served(engine, tokens)
    assert (plan.policy, plan.declined) == ("exact", "quality_bound")
    assert plan.quality_bound == BOUND["quality_bound"], "what an answer says of it"
    assert engine.store.metrics.declined["quality_bound"] >= 5
    assert "no_donor" not in engine.store.metrics.declined
    found = explained(engine, tokens)
    assert (found.policy, found.declined) == ("exact", "quality_bound")
    assert found.steering is not None
    assert explained(engine, tokens, policy="exact").declined == "no_donor", "by itself"
    assert engine.serve(prompt(8, 300)).declined == "no_donor"


@pytest.mark.parametrize("declined", ["no_donor", "nothing_kept", "no_saving"])
def test_what_the_policy_is_declined_for_is_the_bounds(declined: str) -> None:
    assert reason_under_bound(declined) == "quality_bound"


@pytest.mark.parametrize("declined", ["", "blocks_gone"])
def test_what_no_policy_is_declined_for_is_not_the_bounds(declined: str) -> None:
    assert reason_under_bound(declined) == declined


def test_the_log_says_which_bound_made_a_policy_stricter(engine: Driver) -> None:
    teach(engine, edited(), "faithful")
    plan = served(engine, edited(6))
    assert plan.policy == "faithful"
    served(engine, [*DONOR[:100], *DONOR[120:]])
    engine.serve([*DONOR, 1, 2, 3])
    last, *others = engine.store.requests.last(None)
    assert (last.outcome, last.steering) == ("exact", None), "no bound asks about exact rows"
    stricter = next(one for one in others if one.policy == "exact")
    assert stricter.outcome == "exact"
    assert stricter.steering is not None
    assert (stricter.steering.rung, stricter.steering.bound) == ("exact", 0.02)
    assert stricter.steering.traffic.endswith("/delete")
    replaced = [one.steering for one in others if one.steering not in (None, stricter.steering)]
    looser = replaced[0]
    assert looser is not None
    assert (looser.rung, looser.tried) == ("faithful", "balanced")
    assert looser.traffic == traffic(engine, edited())


def test_a_request_of_the_laxest_rung_is_not_said_to_be_stricter(engine: Driver) -> None:
    teach(engine, edited(), "aggressive")
    assert served(engine, edited(6)).policy == "aggressive"
    assert engine.store.requests.last(1)[0].steering is None


def test_another_kind_of_edit_is_another_class(engine: Driver) -> None:
    teach(engine, edited(), "aggressive")
    removed = [*DONOR[:100], *DONOR[120:]]
    assert served(engine, removed).policy == "exact"


def test_exact_plans_are_not_steered(engine: Driver) -> None:
    plan = engine.serve([*DONOR, 1, 2, 3])
    assert (plan.policy, plan.exact) == ("aggressive", 300)
    assert engine.store.quality.report() == []


def test_no_plan_is_laxer_than_asked_or_configured(driver: Open) -> None:
    for configured in ("faithful", "balanced", "aggressive"):
        engine = driver(**{**BOUND, "policy": configured})
        engine.save(DONOR)
        teach(engine, edited(), "aggressive")
        teach(engine, edited(), configured)
        for asked in policy_names():
            strictest = min(configured, asked, key=policy_names().index)
            policies = {engine.serve(edited(), policy=asked).policy for _ in range(20)}
            allowed = policy_names()[: policy_names().index(strictest) + 1]
            assert policies <= {*allowed}


def test_the_node_and_its_score_are_of_the_class_and_rung_of_the_plan(engine: Driver) -> None:
    teach(engine, edited(), "faithful")
    tokens = edited(6)
    plan = engine.serve(tokens)
    while plan.policy != "faithful":
        plan = engine.serve(tokens)
    engine.save(tokens, plan)
    store = engine.store
    node = store.tree.get(node_id(engine.namespace.digest, array(tokens), False))
    assert node is not None
    assert node.policy == "faithful"
    planned = store.quality.planned.of(store.tree, node, node.length)
    assert planned == traffic(engine, edited())
    # a daemon that does not remember the plan comes to the same class
    forgetful = type(store.quality.planned)()
    assert forgetful.of(store.tree, node, node.length) == planned


def test_a_second_look_is_not_steered(engine: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quality, "rung", never)
    plan = engine.store.plan_soon(edited(), engine.namespace, look=True).result()
    assert (plan.policy, plan.generation) == ("exact", 0), "so it gets no approximate rows"


def never(*_: object) -> str:
    raise AssertionError("nobody may ask")


def test_without_a_bound_nothing_is_asked(driver: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quality, "rung", never)
    engine = driver()
    engine.save(DONOR)
    assert engine.serve(edited()).generation == 1


def test_a_bound_can_be_set_while_it_runs(driver: Open, config: Callable[..., Any]) -> None:
    engine = driver()
    engine.save(DONOR)
    engine.store.reload(config(**BOUND))
    assert served(engine, edited()).policy == "exact"
    engine.store.reload(config())
    assert engine.serve(edited()).policy == "aggressive"


def test_restarts_keep_what_was_learned_and_purges_do_not(
    driver: Open, home: Path, namespace: Namespace
) -> None:
    engine = driver(**BOUND)
    engine.save(DONOR)
    teach(engine, edited(), "balanced")
    engine.store.flush()
    engine = driver(**BOUND)
    assert served(engine, edited()).policy == "balanced"
    assert served(driver(**BOUND, edit_window=3), edited()).policy == "exact"
    engine = driver(**BOUND)
    teach(engine, edited(), "balanced")
    engine.store.close()
    digest = namespace.digest.encode()
    assert digest in (home / "quality").read_bytes()
    engine = driver(**BOUND)
    engine.store.purge(namespace.digest)
    assert digest not in (home / "quality").read_bytes()
    engine.save(DONOR)
    assert served(engine, edited()).policy == "exact"


def test_rows_that_a_lossy_codec_changed_are_not_served_past_the_bound(
    driver: Open, home: Path
) -> None:
    engine = driver(**BOUND, disk_codec="int8")
    engine.save(DONOR)
    engine.store.close()
    bound = driver(**BOUND, disk_codec="int8").store
    assert bound.plan(DONOR, engine.namespace).declined == "lossy"
    free = driver(policy="aggressive", disk_codec="int8").store
    plan = free.plan(DONOR, engine.namespace)
    assert (plan.declined, plan.generation) == ("", 1)


def test_a_lookup_that_says_it_is_a_look_is_no_way_past_the_bound(engine: Driver) -> None:
    for policy in ("aggressive", "balanced", "faithful", None):
        lookup = engine.store.plan_soon(edited(), engine.namespace, policy=policy, look=True)
        assert lookup.result().generation == 0


def test_a_clock_tick_writes_down_that_nobody_scores(
    engine: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(engine.store.quality, "keep", lambda: kept.append(True))
    engine.store.reap()
    assert kept


def test_without_a_disk_nothing_is_written(driver: Open, home: Path) -> None:
    engine = driver(**BOUND, disk=False)
    engine.save(DONOR)
    teach(engine, edited(), "balanced")
    engine.store.close()
    assert not (home / "quality").exists()


def test_what_a_donor_covers_as_a_script_sees_it(engine: Driver) -> None:
    (node,) = engine.store.tree
    other = msgspec.structs.replace(node, id="other")
    cover = Cover(array(prompt(9, 300)))
    cover.add(node, [Match(0, 0, 50), Match(53, 50, 5), Match(60, 60, 40), Match(120, 20, 30)])
    cover.add(other, [Match(100, 0, 20)])
    cover.add(node, [Match(150, 50, 20), Match(200, 120, 100)])
    ascending = [Match(0, 0, 50), Match(60, 60, 40), Match(200, 120, 100)]
    assert cover.matches(node, 8) == ascending
    assert cover.matches(other, 8) == [Match(100, 0, 20)]
    assert cover.matches(other, 21) == []


# --- explanations ---------------------------------------------------------------------------------


def explained(engine: Driver, tokens: list[int], **how: Any) -> Explanation:
    return engine.store.explain(tokens, engine.namespace, **how)


def test_an_explanation_is_of_the_rung_and_counts_nowhere(
    engine: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(engine, edited(), "faithful")
    tokens, ask = edited(6), Quality.rung
    monkeypatch.setattr(Quality, "rung", never)
    found = explained(engine, tokens)
    assert found.steering is not None
    assert (found.policy, found.generation, found.steering.rung) == ("faithful", 1, "faithful")
    assert (found.steering.bound, found.steering.tried) == (0.02, "balanced")
    assert 0 < found.steering.share < 0.02
    assert found.by_reason["window"] > 0
    monkeypatch.setattr(Quality, "rung", ask)
    plan = served(engine, tokens)
    assert found.steering.traffic == traffic(engine, tokens)
    edited_tokens = sum(span.length for span in plan.spans if span.edited)
    assert found.by_kind["edited"] == edited_tokens


def test_an_explanation_of_a_class_that_nothing_is_known_of(engine: Driver) -> None:
    found = explained(engine, edited())
    assert found.steering is not None
    assert (found.policy, found.steering.rung, found.steering.tried) == (
        "exact", "exact", "faithful")  # fmt: skip
    assert found.steering.share == pytest.approx(0.02)
    assert "edited" not in found.by_kind


def test_what_another_policy_would_do_is_still_explained(engine: Driver) -> None:
    teach(engine, edited(), "faithful")
    found = explained(engine, edited(6), policy="aggressive")
    assert found.steering is not None
    assert (found.policy, found.steering.rung) == ("aggressive", "faithful")
    strict = explained(engine, edited(6), policy="faithful")
    assert strict.steering is not None
    assert (strict.policy, strict.steering.rung, strict.steering.tried) == (
        "faithful", "faithful", "")  # fmt: skip
    for policy in ("exact", "off"):
        assert explained(engine, edited(6), policy=policy).steering is None


def test_exact_plans_and_stores_without_a_bound_say_nothing_of_it(
    engine: Driver, driver: Open
) -> None:
    assert explained(engine, [*DONOR, 1, 2, 3]).steering is None
    assert explained(engine, prompt(77, 40)).steering is None
    plain = msgspec.to_builtins(explained(driver(), edited()))
    assert "steering" not in plain
    assert "source" not in plain["candidates"][0]
