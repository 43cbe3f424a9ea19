"""What workers and engines report is added up by vLLM, and told apart by engine."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from kvshare_connectors.vllm import KVShareConnector
from kvshare_connectors.vllm.metrics import (
    DECLARED,
    KVSharePromMetrics,
    KVShareStats,
    Tally,
    loads,
)
from prometheus_client import CollectorRegistry, generate_latest

from kvshare_store.observability.exposition import FAMILIES
from kvshare_store.save.second_looks import Look
from tests.connectors.vllm.registered import registered
from tests.support.exposition import Exposed
from tests.support.made_parts import parts_in
from tests.support.metrics_page import PAGE, parts

pytestmark = pytest.mark.filterwarnings("ignore")


def answer(reason: str = "", **tokens: int) -> dict[str, Any]:
    said = dict.fromkeys(("exact", "continued", "edited", "recomputed"), 0) | tokens
    return {f"kvshare.{name}": value for name, value in (said | {"reason": reason}).items()}


def look(policy: str, edit: str = "", *, greedy: bool = True, bound: float | None = None) -> Look:
    return Look("node", 1, "n", b"", policy=policy, edit=edit, greedy=greedy, bound=bound)


def worker(*seconds: float) -> Any:
    """As much of a worker's output as vLLM's aggregator looks at."""
    from vllm.v1.outputs import KVConnectorOutput

    return SimpleNamespace(
        kv_connector_output=KVConnectorOutput(kv_connector_stats=loads(seconds)),
        ec_connector_output=None,
    )


def test_loads_of_all_workers_are_observed() -> None:
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator

    aggregator = KVOutputAggregator(expected_finished_count=3)
    outputs = [worker(0.1), worker(), worker(0.2, 0.3)]
    stats = aggregator.aggregate(outputs).kv_connector_output.kv_connector_stats
    assert stats.data["loads"] == [0.1, 0.2, 0.3]
    nothing = aggregator.aggregate([worker(), worker()])
    assert nothing.kv_connector_output.kv_connector_stats is None


def test_scheduler_and_workers_are_added_up_on_their_way() -> None:
    """Pickled from the workers, as MessagePack to the process that answers `/metrics`."""
    tally = Tally()
    tally.ended(answer(exact=5, edited=2, recomputed=3), computed=True)
    tally.ended(answer(recomputed=7, reason="no_donor"), computed=True)
    tally.looked_up(0.25)
    tally.scored(look("balanced", "insert"), (0.0, 0.5, 0.25))
    tally.scored(look("balanced", "insert", bound=0.02), (0.0,))
    tally.scored(look("control", greedy=False), (1.0, 1.0))
    taken = tally.take()
    assert taken is not None
    assert tally.take() is None
    from_worker = pickle.loads(pickle.dumps(loads([0.5])))  # noqa: S301 - our own bytes
    both = from_worker.aggregate(taken)
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(both.to_dict()))
    stats = KVShareConnector.build_kv_connector_stats(arrived)
    assert isinstance(stats, KVShareStats)
    assert stats.data == {
        "tokens": {"exact": 5, "continued": 0, "edited": 2, "recomputed": 10},
        "requests": {"edited": {"": 1}, "miss": {"no_donor": 1}},
        "scores": {
            "balanced": {
                "greedy": {"insert": {"answers": 2, "tokens": 4, "regret": 0.75, "diverged": 1}}
            },
            "control": {"sampled": {"": {"answers": 1, "tokens": 2, "regret": 2.0}}},
        },
        "bound": 0.02,
        "lookups": [0.25],
        "loads": [0.5],
    }
    said = stats.reduce()
    assert (said["KVShare requests"], said["KVShare loads mean (ms)"]) == (2, 500.0)
    assert said["KVShare waits for plans mean (ms)"] == 250.0
    stats.reset()
    assert stats.is_empty()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> KVSharePromMetrics:
    """For two engines behind one front end."""
    return registered(registry, "demo", engines=2)


def test_engines_are_told_apart(registry: CollectorRegistry, metrics: KVSharePromMetrics) -> None:
    for engine, tokens in ((0, 3), (1, 5), (1, 5)):
        tally = Tally()
        tally.ended(answer(exact=tokens, recomputed=1), computed=True)
        taken = tally.take()
        assert taken is not None
        metrics.observe(taken.to_dict(), engine)
    metrics.observe(KVShareStats().to_dict(), 0)
    exposed = Exposed(generate_latest(registry).decode())
    assert exposed.by("vllm:kvshare_tokens_total", "engine", "kind") == {
        ("0", "exact"): 3.0, ("0", "recomputed"): 1.0,
        ("1", "exact"): 10.0, ("1", "recomputed"): 2.0,
    }  # fmt: skip
    assert exposed.by("vllm:kvshare_requests_total", "engine", "outcome") == {
        ("0", "exact"): 1.0,
        ("1", "exact"): 2.0,
    }
    assert exposed.value("vllm:kvshare_load_seconds_count", engine="1", model_name="demo") == 0


def test_scores_are_told_apart_by_policy_and_by_kind_of_edit(
    registry: CollectorRegistry, metrics: KVSharePromMetrics
) -> None:
    """Under the names and labels of the daemon's."""
    for _ in range(2):
        tally = Tally()
        tally.scored(look("balanced", "insert", bound=0.05), (0.0, 0.5))
        tally.scored(look("balanced", "replace", greedy=False), (2.0,))
        tally.scored(look("balanced", "replace"), (0.0,))
        tally.scored(look("control"), (0.0, 0.0))
        taken = tally.take()
        assert taken is not None
        metrics.observe(taken.to_dict(), 1)
    exposed = Exposed(generate_latest(registry).decode())
    inserted, replaced = ("balanced", "greedy", "insert"), ("balanced", "greedy", "replace")
    sampled, control = ("balanced", "sampled", "replace"), ("control", "greedy", "")
    expected = {
        "scored_answers": dict.fromkeys((inserted, replaced, sampled, control), 2),
        "scored_tokens": {inserted: 4, replaced: 2, sampled: 2, control: 4},
        "regret_nats": {inserted: 1.0, sampled: 4.0},
        "diverged_answers": {("balanced", "insert"): 2},
    }
    for name, samples in expected.items():
        labels = ("policy", "chosen", "edit")
        if name == "diverged_answers":
            labels = ("policy", "edit")
        assert exposed.by(f"vllm:kvshare_{name}_total", *labels) == samples
        family = {one.name: one for one in FAMILIES}[f"kvshare_{name}_total"]
        assert family.labels == labels
    assert exposed.by("vllm:kvshare_quality_bound", "engine") == {("1",): 0.05}


def test_a_daemon_of_the_release_before_names_neither_edit_nor_bound(
    registry: CollectorRegistry, metrics: KVSharePromMetrics
) -> None:
    older = {"node": "n", "stamp": 1, "namespace": "n", "tokens": b"", "policy": "balanced"}
    tally = Tally()
    tally.scored(msgspec.convert(older, Look), (0.5,))
    taken = tally.take()
    assert taken is not None
    metrics.observe(taken.to_dict(), 0)
    exposed = Exposed(generate_latest(registry).decode())
    assert exposed.by("vllm:kvshare_scored_answers_total", "policy", "edit") == {
        ("balanced", ""): 1
    }
    assert exposed.by("vllm:kvshare_quality_bound", "engine") == {}


def test_an_engine_that_is_not_served_says_so() -> None:
    tally = Tally()
    tally.unserved("mamba_or_hybrid")
    taken = tally.take()
    assert taken is not None
    assert taken.data["requests"] == {"miss": {"mamba_or_hybrid": 1}}


def test_the_page_is_what_the_code_says() -> None:
    """`python -m tests.support.metrics_page` writes its tables anew."""
    assert parts_in(PAGE) == parts()


def test_what_is_declared_is_what_is_exported(
    registry: CollectorRegistry, metrics: KVSharePromMetrics
) -> None:
    exported = {it.name: (it.type, it.documentation) for it in registry.collect()}
    assert exported == {one.name: (one.kind, one.help) for one in DECLARED}
