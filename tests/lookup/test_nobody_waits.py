"""A lookup waits for nobody else's: not for a tier, not for an alignment, and changes are seen."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from kvshare_store.blocks import io_loop
from kvshare_store.daemon import protocol
from kvshare_store.errors import ConfigError, PlanError
from kvshare_store.lookup import places, search
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.index import NamespaceIndex
from kvshare_store.nodes.vector_matrix import VectorMatrix
from kvshare_store.plan import ReusePlan
from kvshare_store.store import Store
from tests.save.test_answers import save as save_answer
from tests.support.faulty import GatedTier
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]
PATIENCE = 30.0
"""Seconds after which a test that waits has failed; no test waits that long when it passes."""


def gated(store: Store) -> GatedTier:
    """Let the store's disk hand out nothing until the gate opens."""
    level = store.blocks.levels.named("disk")
    assert level is not None
    gate = GatedTier(level.tier, threading.Event(), "get")
    level.tier = gate
    return gate


def cold_and_hot(driver: Open) -> tuple[Driver, GatedTier]:
    """A store with prompt 1 on disk alone and prompt 2 in memory too."""
    driver().save(prompt(1, 40))
    engine = driver(policy="exact")
    engine.save(prompt(2, 40))
    engine.store.flush()
    return engine, gated(engine.store)


# --- tiers --------------------------------------------------------------------------------------


def test_a_plan_from_below_is_awaited_by_no_thread_that_plans(driver: Open) -> None:
    engine, tier = cold_and_hot(driver)
    store = engine.store
    cold = store.plan_soon(prompt(1, 40), engine.namespace)
    hot = [store.plan_soon(prompt(2, 40), engine.namespace) for _ in range(3)]
    assert not cold.done(), "this very thread has planned, and waits for nothing"
    assert all(plan.done() for plan in hot), "what is in memory is planned on return"
    told: Future[ReusePlan] = Future()
    cold.add_done_callback(lambda done: told.set_result(done.result()))
    tier.gate.set()
    plan = told.result(PATIENCE)
    assert plan.exact == 39
    engine.check(prompt(1, 40), plan)
    for each in (plan, *(one.result() for one in hot)):
        engine.finish(each)
    assert store.stats()["leases"] == 0


def test_a_block_that_is_late_is_a_miss_and_holds_nothing(driver: Open) -> None:
    engine, tier = cold_and_hot(driver)
    late = engine.store.plan_soon(prompt(1, 40), engine.namespace, deadline_ms=20.0)
    assert late.result(PATIENCE).declined == "not_resident"
    assert engine.store.stats()["leases"] == 0
    tier.gate.set()
    engine.store.flush()
    assert engine.serve(prompt(1, 40)).exact == 39


def test_a_client_that_goes_while_its_blocks_come_leaves_no_lease(driver: Open) -> None:
    engine, tier = cold_and_hot(driver)
    plan = engine.store.plan_soon(prompt(1, 40), engine.namespace, owner="client")
    engine.store.reap({"client"})
    tier.gate.set()
    assert plan.result(PATIENCE).declined == "not_resident"
    assert engine.store.stats()["leases"] == 0


def test_a_store_that_closes_ends_its_plans(driver: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_loop, "_PATIENCE", 0.2)
    engine, tier = cold_and_hot(driver)
    plan = engine.store.plan_soon(prompt(1, 40), engine.namespace, deadline_ms=100.0)
    engine.store.close()
    assert plan.result(PATIENCE).declined == "not_resident"
    tier.gate.set()


def test_input_that_makes_no_sense_raises_at_once(driver: Open) -> None:
    engine = driver()
    with pytest.raises(PlanError):
        engine.store.plan_soon([-1], engine.namespace)
    with pytest.raises(ConfigError):
        engine.store.plan_soon(prompt(1, 40), engine.namespace, policy="lax")
    assert engine.store.stats()["lookups"] == 0


# --- alignment ----------------------------------------------------------------------------------


@contextmanager
def held_alignment(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, ...]]:
    """The first alignment says that it has begun and waits until it may go on."""
    begun, go_on = threading.Event(), threading.Event()
    outline = search.outline

    def wait(*given, **named):  # type: ignore[no-untyped-def]
        if not begun.is_set():
            begun.set()
            assert go_on.wait(PATIENCE), "nobody let the alignment go on"
        return outline(*given, **named)

    monkeypatch.setattr(search, "outline", wait)
    try:
        yield begun, go_on
    finally:
        go_on.set()


EDITED = [*prompt(1, 24), 7, *prompt(1, 48)[25:]]


def test_no_lookup_waits_for_the_table_of_a_prompt_that_was_just_saved(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, saved = driver(), prompt(1, 2_100)
    engine.save(saved)
    monkeypatch.setattr(places, "Places", lambda *_: pytest.fail("a lookup makes it"))
    plan = engine.plan([*saved[:1_000], 7, *saved[1_001:]])
    assert plan.reused > 1_500
    engine.finish(plan)


def test_an_alignment_delays_no_other_lookup_and_no_save(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short prompts take turns, which is quicker for all; one that takes time is long."""
    engine, long = driver(), prompt(1, 2_100)
    engine.save(long)
    stranger = Driver(engine.store, engine.namespace.for_tenant("other"), engine.book)
    stranger.save(prompt(2, 40))
    with held_alignment(monkeypatch) as (begun, go_on), ThreadPoolExecutor(2) as pool:
        edited = pool.submit(engine.plan, [*long[:1_000], 7, *long[1_001:]])
        assert begun.wait(PATIENCE)
        assert pool.submit(stranger.serve, prompt(2, 40)).result(PATIENCE).exact == 39
        assert pool.submit(engine.save, prompt(3, 40)).result(PATIENCE) is not None
        assert not edited.done()
        go_on.set()
        engine.finish(edited.result(PATIENCE))


@pytest.mark.parametrize("change", ["evicted", "cleared"])
def test_a_donor_that_leaves_during_the_alignment(
    driver: Open, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    engine = driver()
    engine.save(prompt(1, 48))
    with held_alignment(monkeypatch) as (begun, go_on), ThreadPoolExecutor(1) as pool:
        soon = pool.submit(engine.plan, EDITED)
        assert begun.wait(PATIENCE)
        engine.store.clear() if change == "cleared" else engine.store.evict(nodes=1)
        go_on.set()
        assert soon.result(PATIENCE).declined == "empty_store"
    assert engine.store.stats()["leases"] == 0
    engine.store.flush()
    assert engine.store.blocks.names() == set()


def test_a_donor_whose_answer_is_stored_during_the_alignment(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longer node has the same rows, under another id."""
    engine = driver()
    donor = engine.save(prompt(1, 48))
    with held_alignment(monkeypatch) as (begun, go_on), ThreadPoolExecutor(1) as pool:
        soon = pool.submit(engine.plan, EDITED)
        assert begun.wait(PATIENCE)
        longer = save_answer(engine, prompt(1, 48), prompt(9, 10))
        go_on.set()
        plan = soon.result(PATIENCE)
    assert longer != donor
    assert plan.donors == (longer,)
    engine.finish(plan)
    assert engine.store.stats()["leases"] == 0


def test_a_donor_that_leaves_and_comes_back_during_the_alignment(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt with other rows: the plan has rows that belong together, or is a miss."""
    engine = driver()
    engine.save(prompt(1, 48))
    with held_alignment(monkeypatch) as (begun, go_on), ThreadPoolExecutor(1) as pool:
        soon = pool.submit(engine.plan, EDITED)
        assert begun.wait(PATIENCE)
        engine.store.evict(nodes=1)
        engine.save(prompt(1, 48))
        go_on.set()
        plan = soon.result(PATIENCE)  # `Driver.plan` has checked every row
    if not plan.declined:
        engine.finish(plan)
    assert engine.store.stats()["leases"] == 0


# --- a namespace without nodes costs nothing ------------------------------------------------------


def tenants(namespace: Namespace, count: int) -> Iterator[Namespace]:
    return (namespace.for_tenant(f"salt {at}") for at in range(count))


def kept(*kinds: type) -> int:
    """Objects of these kinds that are alive, those of earlier tests among them, which may still
    go."""
    gc.collect()
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


def test_lookups_with_salts_that_nobody_saved_under_leave_nothing(driver: Open) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    before, cached = kept(NamespaceIndex, VectorMatrix), kept(Namespace)
    tokens = np.asarray(prompt(2, 40), np.int32)
    for tenant in tenants(engine.namespace, 10_000):
        assert engine.store.plan(tokens, tenant).declined == "empty_store"
    assert kept(NamespaceIndex, VectorMatrix) <= before
    assert list(engine.store.nodes.namespaces) == [engine.namespace]
    assert kept(Namespace) < cached + 1_000, "caches by namespace are small"


def test_the_last_node_takes_the_index_along(driver: Open) -> None:
    engine = driver()
    before = kept(NamespaceIndex, VectorMatrix)
    for tenant in tenants(engine.namespace, 20):
        Driver(engine.store, tenant, engine.book).save(prompt(1, 40))
    assert kept(NamespaceIndex, VectorMatrix) > before
    engine.store.evict(nodes=20)
    assert kept(NamespaceIndex, VectorMatrix) <= before
    assert engine.store.tree.namespaces() == []


def test_a_save_that_is_given_up_names_no_namespace(driver: Open) -> None:
    engine = driver()
    for tenant in tenants(engine.namespace, 5):
        engine.store.abandon(engine.store.stage(prompt(1, 40), tenant).id)
    assert list(engine.store.nodes.namespaces) == []


def test_an_index_of_one_prompt_is_small() -> None:
    matrix = VectorMatrix()
    assert matrix._rows.nbytes == 0
    matrix.add("one", np.ones(384, np.float32))
    assert matrix._rows.nbytes <= 4 * 384 * 4


# --- rates --------------------------------------------------------------------------------------


def test_a_slow_models_prefill_makes_no_fast_models_plans(driver: Open) -> None:
    engine = driver(min_saving_ms=5.0)
    small = Driver(engine.store, engine.namespace, engine.book)
    large = Driver(engine.store, Namespace("large", engine.namespace.layout), engine.book)
    for each in (small, large):
        each.save(prompt(1, 400))
    for _ in range(20):
        engine.store.observe(large.namespace.model_digest, 1_000, 10.0)
        engine.store.observe(small.namespace.model_digest, 1_000, 1e-3)
    assert large.serve(prompt(1, 400)).exact == 399
    assert small.serve(prompt(1, 400)).declined == "no_saving"


def test_slow_loads_switch_reuse_off_for_a_while_only(driver: Open) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    rate = engine.store.costs.load["host"]
    rate.smallest = 1
    for _ in range(3):
        rate.observe(1, 1000.0)
    declined = [engine.serve(prompt(1, 40)).declined for _ in range(4)]
    assert declined == ["no_saving", "no_saving", "no_saving", ""]


def test_tenants_and_adapters_of_a_model_share_its_rate(driver: Open) -> None:
    engine = driver()
    tenant = engine.namespace.for_tenant("t", "adapter")
    assert tenant.model_digest == engine.namespace.model_digest
    assert engine.namespace.model_digest != Namespace("n", engine.namespace.layout).model_digest


def test_an_engine_that_does_not_name_its_model_is_understood(driver: Open) -> None:
    """The message as the release before wrote it; its measurement counts for every known model."""
    said = protocol.decode_request(
        protocol.encode({"type": "observe", "tokens": 128, "seconds": 1.0})
    )
    assert said == protocol.Observe(128, 1.0)
    store = driver().store
    rates = [store.costs.of("a").prefill, store.costs.of("b").prefill]
    store.observe(said.model, said.tokens, said.seconds)
    assert [rate.value for rate in rates] == [128.0, 128.0]


def test_rates_of_models_that_nobody_serves_any_more_are_forgotten(driver: Open) -> None:
    costs = driver().store.costs
    for at in range(1_000):
        costs.of(str(at))
    assert len(costs._models) < 100
