"""What vLLM's own `/metrics` says of reuse, compared with what the answers say."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from prometheus_client import REGISTRY, generate_latest

from kvshare_store.daemon import protocol
from tests.engine.harness import SHARED, Answer, Engine, Fresh
from tests.engine.test_behaviour import LENGTH, NEW, edited
from tests.support.exposition import Exposed

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SETTINGS = SHARED
KINDS = ("exact", "continued", "edited", "recomputed")


class Gained:
    """What the exposed metrics have gained since it was made."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        engine.settle()
        self._before = Exposed(generate_latest(REGISTRY).decode())

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        self._engine.settle()  # a load is reported in the step after it
        now = Exposed(generate_latest(REGISTRY).decode()).by(name, *labels)
        before = self._before.by(name, *labels)
        gained = {key: value - before.get(key, 0.0) for key, value in now.items()}
        return {key: value for key, value in gained.items() if value}

    def of(self, name: str) -> float:
        return self.by(name).get((), 0.0)


def outcome(answer: Answer) -> tuple[str, str]:
    for kind in ("edited", "continued", "exact"):
        if answer.said[kind]:
            return kind, ""
    return "miss", answer.said["reason"]


def workload(engine: Engine, fresh: Fresh) -> list[Answer]:
    """Requests of every kind."""
    first = fresh(4 * LENGTH)
    second = edited(first, 60)
    answers = [engine.store(first)]
    engine.forget()
    answers.append(engine.store(first))  # exact
    answers.append(engine.store(first))  # in vLLM's own prefix cache
    engine.forget()
    answers.append(engine.store(second))  # edited
    engine.forget()
    answers.append(engine.store([*second, *NEW]))  # continued
    answers.append(engine.store(fresh(LENGTH)))  # like nothing before
    answers.append(engine.ask(fresh(LENGTH), policy="off"))
    return answers


def test_the_log_says_what_a_plan_took_to_the_first_token(engine: Engine, fresh: Fresh) -> None:
    engine.clear()
    began = time.monotonic()
    answers = workload(engine, fresh)
    took = time.monotonic() - began
    logged = engine.client.call(protocol.ListRequests(limit=len(answers)))
    assert [bool(one["prefill"]) for one in logged] == [one["outcome"] != "miss" for one in logged]
    assert 0 < sum(one["prefill"] for one in logged) < took


def test_every_value_is_what_happened(engine: Engine, fresh: Fresh) -> None:
    engine.clear()
    gained, before = Gained(engine), engine.stats()
    answers = workload(engine, fresh)
    kinds = {answer.said["reason"] or outcome(answer)[0] for answer in answers}
    assert {"exact", "edited", "continued", "empty_store", "policy_off"} <= kinds
    tokens = {(kind,): sum(answer.said[kind] for answer in answers) for kind in KINDS}
    assert all(tokens.values())
    assert gained.by("vllm:kvshare_tokens_total", "kind") == tokens
    requests = Counter(map(outcome, answers))
    assert gained.by("vllm:kvshare_requests_total", "outcome", "reason") == requests
    after = engine.stats()
    looked_up = sum(answer.said["reason"] != "policy_off" for answer in answers)
    assert gained.of("vllm:kvshare_lookup_seconds_count") == looked_up
    assert 0 < gained.of("vllm:kvshare_lookup_seconds_sum") < 60
    loads = [stats["seconds"]["load"] for stats in (before, after)]
    assert (
        gained.of("vllm:kvshare_load_seconds_count")
        == loads[1]["buckets"][-1] - loads[0]["buckets"][-1]
        == sum(outcome(answer)[0] != "miss" for answer in answers)
    )
    took = loads[1]["sum"] - loads[0]["sum"]
    assert gained.of("vllm:kvshare_load_seconds_sum") == pytest.approx(took)


def test_placeholders_are_no_hits_of_vllm_either(engine: Engine, fresh: Fresh) -> None:
    """vLLM's own count of what connectors had, and ours, are of the same tokens."""
    engine.clear()
    gained = Gained(engine)
    answers = workload(engine, fresh)
    reused = sum(answer.said["reused"] for answer in answers)
    assert gained.of("vllm:external_prefix_cache_hits_total") == reused
    prompt = sum(answer.said["prefix_cached"] for answer in answers)
    assert gained.of("vllm:prefix_cache_hits_total") == prompt
    ours = sum(gained.by("vllm:kvshare_tokens_total", "kind").values())
    assert gained.of("vllm:prompt_tokens_total") == prompt + ours


def test_of_an_aborted_request_only_its_end_is_counted(engine: Engine, fresh: Fresh) -> None:
    engine.clear()
    gained = Gained(engine)
    with engine.budget(tokens=50):
        name = engine.add(fresh(LENGTH))
        engine.step()
        engine.abort(name)
        engine.drain()
    assert gained.by("vllm:kvshare_requests_total", "outcome", "reason") == {("aborted", ""): 1}
    assert gained.by("vllm:kvshare_tokens_total", "kind") == {}


def test_each_series_is_there_from_the_beginning(engine: Engine) -> None:
    """Else the first events are lost to `rate`."""
    exposed = Exposed(generate_latest(REGISTRY).decode())
    for kind in KINDS:
        assert exposed.value("vllm:kvshare_tokens_total", kind=kind, engine="0") >= 0
    for ended in (*KINDS[:3], "miss", "aborted"):
        assert exposed.value("vllm:kvshare_requests_total", outcome=ended, reason="") >= 0
