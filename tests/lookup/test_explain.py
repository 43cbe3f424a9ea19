"""Explanations: they tell what the planner does, and account for every token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from kvshare_store.daemon import protocol
from kvshare_store.daemon.questions import answer
from kvshare_store.errors import ConfigError, NodeError, PlanError
from kvshare_store.lookup.explanation import Explanation
from kvshare_store.lookup.policy import PRESETS
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import Outcome, ReusePlan
from tests.support.oracle import Driver
from tests.support.stores import Open


def prompt(length: int = 400, seed: int = 1) -> Tokens:
    return np.random.default_rng(seed).integers(0, 30_000, length).astype(np.int32)


def edited(tokens: Tokens, at: int = 100, count: int = 3, seed: int = 7) -> Tokens:
    """The same with some tokens replaced."""
    changed = tokens.copy()
    changed[at : at + count] = prompt(count, seed) + 40_000
    return changed


def explained(engine: Driver, tokens: Tokens, **how: Any) -> Explanation:
    found = engine.store.explain(tokens, engine.namespace, **how)
    parts = found.parts
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
    assert sum(part.stop - part.start for part in parts) == len(tokens) == found.tokens
    assert sum(found.by_kind.values()) == len(tokens)
    assert sum(found.by_reason.values()) == found.by_kind.get("recomputed", 0)
    assert all(bool(part.reason) == (part.kind == "recomputed") for part in parts)
    return found


def fate_of(found: Explanation) -> list[str]:
    """Kind or reason of each position."""
    return [p.reason or p.kind for p in found.parts for _ in range(p.stop - p.start)]


def kinds_of(plan: ReusePlan) -> list[str]:
    kinds = ["recomputed"] * plan.tokens
    for span in plan.spans:
        kind = "exact" if span.exact else "continued" if span.continued else "edited"
        kinds[span.start : span.stop] = [kind] * span.length
    return kinds


@pytest.mark.parametrize("policy", ["exact", "faithful", "balanced", "aggressive"])
def test_it_is_the_plan_that_is_made(driver: Open, policy: str) -> None:
    engine = driver(policy=policy)
    first = prompt()
    engine.save(first)
    engine.save(prompt(300, seed=2))
    request = np.concatenate([edited(first), prompt(300, seed=2)[50:250]])
    found = explained(engine, request)
    plan = engine.store.plan(request, engine.namespace)
    kinds = [p.kind for p in found.parts for _ in range(p.stop - p.start)]
    assert kinds == kinds_of(plan)
    assert (found.declined, found.generation) == (plan.declined, plan.generation)
    assert found.expected is not None
    assert found.expected.saving == pytest.approx(plan.saving_ms, abs=0.01)
    taken = {one.node for one in found.candidates if one.taken}
    assert taken == set(plan.donors)


def test_each_rule_answers_for_its_tokens(driver: Open) -> None:
    engine = driver(policy="balanced", edit_window=16, edit_growth=0.0, tail=4, min_run=20)
    first = prompt()
    engine.save(first)
    request = edited(edited(first, 100), 130)
    fate = fate_of(explained(engine, request))
    assert fate[:100] == ["exact"] * 100
    assert fate[100:103] == ["edit"] * 3
    assert fate[103:119] == ["window"] * 16
    assert fate[119:130] == ["min_run"] * 11
    assert fate[130:133] == ["edit"] * 3
    assert fate[133:149] == ["window"] * 16
    assert fate[149:396] == ["edited"] * 247
    assert fate[396:] == ["tail"] * 4


def test_rows_that_the_policy_does_not_build_on(driver: Open) -> None:
    engine = driver(max_generation=1)
    first = prompt()
    engine.save(first)
    second = edited(edited(first), 200, seed=8)
    plan = engine.plan(second)
    engine.finish(plan)
    assert engine.save(second, plan) is not None
    request = np.concatenate([prompt(50, seed=9), second[60:]])
    fate = fate_of(explained(engine, request))
    assert fate[:50] == ["edit"] * 50
    assert fate[190:193] == ["generation"] * 3


def test_a_plan_that_would_save_too_little(driver: Open) -> None:
    engine = driver(min_saving_ms=1e6)
    tokens = prompt()
    engine.save(tokens)
    found = explained(engine, tokens)
    assert found.declined == "no_saving"
    assert found.by_reason == {"cost": 399, "tail": 1}
    (candidate,) = found.candidates
    assert (candidate.covers, candidate.kept, candidate.taken) == (399, 0, False)
    assert "no_saving" in candidate.why


def test_why_others_were_passed_over(driver: Open) -> None:
    engine = driver()
    first, twin = prompt(), edited(prompt(), seed=8)
    engine.save(first)
    engine.save(twin)
    engine.save(prompt(300, seed=5))
    request = edited(first)
    found = explained(engine, request)
    why = {one.tokens: one for one in found.candidates if not one.taken}
    assert why[400].why == "has nothing that the donors taken lack"
    assert why[400].shared > 300
    assert {one.prefix for one in found.candidates if one.tokens == 400} == {100}
    assert found.divergence is not None
    assert found.divergence.position == 100
    assert found.divergence.request[:3] == tuple(request[100:103].tolist())
    theirs = {tuple(tokens[100:103].tolist()) for tokens in (first, twin)}
    assert found.divergence.donor[:3] in theirs


def test_one_candidate_alone_and_all_but_one(driver: Open) -> None:
    engine = driver()
    first, second = prompt(), edited(prompt())
    one, other = engine.save(first), engine.save(second)
    assert one is not None
    assert other is not None
    alone = explained(engine, first, only=other)
    assert {found.node for found in alone.candidates} == {other}
    assert alone.candidates[0].found_by == ("asked",)
    without = explained(engine, first, without=[one], policy="exact")
    assert {found.node for found in without.candidates if found.taken} == {other}
    assert without.by_kind["exact"] == 100
    with pytest.raises(NodeError):
        engine.store.explain(first, engine.namespace, only="ab" * 16)


def test_a_laxer_policy_is_explained_and_not_served(driver: Open) -> None:
    engine = driver(policy="exact")
    first = prompt()
    engine.save(first)
    assert explained(engine, edited(first)).by_reason == {"policy": 299, "tail": 1}
    found = explained(engine, edited(first), policy="aggressive")
    assert found.policy == PRESETS["aggressive"].name
    assert found.by_kind["edited"] > 250
    with pytest.raises(ConfigError):
        engine.store.explain(first, engine.namespace, policy="lax")


@pytest.mark.parametrize(("length", "reason"), [(4, "short_prompt"), (40, "empty_store")])
def test_what_is_declined_before_it_is_planned(driver: Open, length: int, reason: str) -> None:
    found = explained(driver(), prompt(length))
    assert (found.declined, found.by_reason, found.candidates) == (reason, {reason: length}, ())


def test_nothing_is_leased_counted_or_logged(driver: Open) -> None:
    engine = driver()
    engine.save(prompt())
    engine.store.flush()
    before = engine.store.stats()
    explained(engine, prompt())
    assert engine.store.stats() == before
    assert engine.store.requests.last(10) == []


# --- the log of requests --------------------------------------------------------------------------


def test_requests_are_logged_as_they_ended(driver: Open) -> None:
    engine = driver()
    first = prompt()
    engine.store.plan_soon(first, engine.namespace, request="chat-1").result()
    engine.save(first)
    plan = engine.store.plan_soon(edited(first), engine.namespace, request="chat-2").result()
    kinds = (plan.exact, plan.reused - plan.exact, plan.tokens - plan.reused)
    engine.store.finish(plan, Outcome(*kinds, nbytes=64, seconds=0.001))
    engine.store.outcomes.decline("multimodal", 30)
    lost = engine.store.plan(first, engine.namespace)
    engine.store.finish(lost, Outcome(recomputed=400, failed="aborted"))
    failed, declined, used, missed = engine.store.requests.last(10)
    assert (missed.request, missed.outcome, missed.reason) == ("chat-1", "miss", "empty_store")
    assert (used.request, used.outcome, used.reason) == ("chat-2", "edited", "")
    assert (used.exact, used.edited, used.recomputed) == kinds
    assert used.donors == plan.donors
    assert sum(stop - start for start, stop, _ in used.spans) == plan.reused
    assert used.load == 0.001
    assert used.held >= used.lookup > 0
    assert used.saving_ms == plan.saving_ms
    assert (declined.reason, declined.tokens) == ("multimodal", 30)
    assert (failed.outcome, failed.reason, failed.recomputed) == ("miss", "aborted", 400)
    assert [one.number for one in engine.store.requests.last(10, declined=True)] == [4, 3, 1]
    slowest = engine.store.requests.last(10, slow=True)
    assert slowest == sorted(slowest, key=lambda one: -one.seconds)
    assert engine.store.requests.last(10, request="chat") == [used, missed]
    assert engine.store.requests.last(10, request="4") == [failed]
    assert not any(one.prompt for one in engine.store.requests.last(10))


def test_what_the_first_token_took_is_logged_whatever_is_reported_first(driver: Open) -> None:
    engine = driver()
    engine.save(prompt())
    for name, early in (("chat-1", False), ("chat-2", True)):
        plan = engine.store.plan_soon(prompt(), engine.namespace, request=name).result()
        reports = [
            partial(engine.finish, plan),
            partial(engine.store.requests.prefilled, name, 0.25),
        ]
        for report in reversed(reports) if early else reports:
            report()
        assert engine.store.requests.last(1)[0].prefill == 0.25
    engine.serve(prompt())
    assert engine.store.requests.last(1)[0].prefill == 0.0, "each time is of one request"


def test_what_an_engine_still_had_of_a_failed_load_is_logged_whatever_is_reported_first(
    driver: Open,
) -> None:
    """The load's end and what the engine says when it begins again go two ways."""
    engine = driver()
    engine.save(prompt())
    for name, early in (("chat-1", False), ("chat-2", True)):
        plan = engine.store.plan_soon(prompt(), engine.namespace, request=name).result()
        failed = Outcome(failed="load_lease", recomputed=plan.tokens)
        reports = [
            partial(engine.store.finish, plan, failed),
            partial(engine.store.outcomes.engine_cached, 64, name),
        ]
        for report in reversed(reports) if early else reports:
            report()
        (entry,) = engine.store.requests.last(1)
        assert (entry.cached, entry.recomputed) == (64, plan.tokens - 64)


def test_what_an_engine_declines_is_logged_and_counted_as_its_tenants(driver: Open) -> None:
    engine = driver()
    engine.save(prompt())
    engine.store.outcomes.decline("policy_off", 30, "chat-1", engine.namespace)
    (logged,) = engine.store.requests.last(10, request="chat")
    assert (logged.model, logged.tenant) == (engine.namespace.model, engine.namespace.tenant)
    assert (logged.reason, logged.recomputed, logged.policy) == ("policy_off", 30, "")
    (counted,) = engine.store.stats()["namespaces"].values()
    assert (counted["requests"], counted["tokens"]) == ({"miss": 1}, {"not_reused": 30})
    engine.store.purge(namespace=engine.namespace.digest)
    assert engine.store.requests.last(10) == []


def test_what_the_engines_cache_had_of_a_miss_corrects_its_entry(driver: Open) -> None:
    engine = driver()
    for name in ("chat-1", "chat-2"):
        engine.store.plan_soon(prompt(), engine.namespace, request=name).result()
    engine.store.outcomes.engine_cached(64, "chat-1")
    engine.store.outcomes.engine_cached(32)  # an engine of the release before names no request
    later, first = engine.store.requests.last(2)
    assert (first.request, first.cached, first.recomputed) == ("chat-1", 64, len(prompt()) - 64)
    assert (later.cached, later.recomputed) == (0, len(prompt()))
    engine.store.outcomes.decline("late", 30)
    engine.store.outcomes.engine_cached(64, "chat-1")
    assert engine.store.requests.last(3)[2] == first, "it is told once"


def test_what_the_engines_cache_had_of_a_hit_stays(driver: Open) -> None:
    engine = driver()
    engine.save(prompt())
    plan = engine.store.plan_soon(prompt(), engine.namespace, request="chat-1").result()
    engine.store.finish(plan, Outcome(exact=100, recomputed=len(prompt()) - 100))
    engine.store.outcomes.engine_cached(64, "chat-1")
    (entry,) = engine.store.requests.last(1)
    assert (entry.exact, entry.cached) == (100, 0)


def test_tokens_are_logged_only_where_that_is_set(driver: Open) -> None:
    engine = driver(log_prompts=True)
    engine.store.plan(prompt(), engine.namespace)
    (found,) = engine.store.requests.last(10)
    assert found.prompt == prompt().tobytes()


def test_the_log_is_bounded(driver: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare_store.lookup.request_log._PROMPT_BYTES", 4000)
    engine = driver(log_prompts=True)
    for seed in range(5):
        engine.store.plan(prompt(seed=seed), engine.namespace)
    kept = [bool(one.prompt) for one in engine.store.requests.last(10)]
    assert kept == [True, True, False, False, False]
    for _ in range(1100):
        engine.store.outcomes.decline("late", 1)
    assert len(engine.store.requests.last(5000)) == 1000


def test_a_donor_of_another_tenant_is_not_explained(driver: Open) -> None:
    engine = driver()
    stranger = Driver(engine.store, engine.namespace.for_tenant("stranger"))
    node = stranger.save(prompt())
    with pytest.raises(NodeError):
        engine.store.explain(prompt(), engine.namespace, only=node or "")


def test_what_was_purged_is_not_in_the_log(driver: Open) -> None:
    engine = driver(log_prompts=True)
    engine.save(prompt())
    engine.serve(prompt())
    assert engine.store.requests.last(10)
    engine.store.purge(engine.namespace.digest)
    assert not engine.store.requests.last(10)


def test_a_prompt_that_is_too_long_is_not_explained(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "EXPLAINED_TOKENS", 40)
    engine = driver()
    engine.save(range(40))
    asked = np.arange(41, dtype=np.int32)
    with pytest.raises(PlanError, match="41 tokens is too long to be explained: at most 40"):
        answer(engine.store, protocol.Explain(asked.tobytes()))
    assert answer(engine.store, protocol.Explain(asked[:40].tobytes()))["explanation"]
