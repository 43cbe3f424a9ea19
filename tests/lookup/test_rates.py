"""What one namespace may ask for: beyond it there is a typed answer, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvshare_store.errors import LimitError
from kvshare_store.lookup.rates import _KEPT, Rates
from kvshare_store.namespace import Namespace
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_second_gives_as_many_as_the_rate() -> None:
    clock = Clock()
    rates = Rates(clock)
    assert [rates.allow("a", 3.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert rates.allow("b", 3.0), "each namespace has its own"
    clock.now += 0.34
    assert [rates.allow("a", 3.0) for _ in range(2)] == [True, False]
    clock.now += 3600.0
    assert [rates.allow("a", 3.0) for _ in range(5)] == [True] * 3 + [False] * 2, "none are hoarded"


def test_less_than_one_a_second() -> None:
    clock = Clock()
    rates = Rates(clock)
    assert [rates.allow("a", 0.1) for _ in range(2)] == [True, False]
    clock.now += 9.9
    assert not rates.allow("a", 0.1)
    clock.now += 0.2
    assert rates.allow("a", 0.1)


def test_a_rate_that_changes_counts_at_once() -> None:
    rates = Rates(Clock())
    assert [rates.allow("a", 1.0) for _ in range(2)] == [True, False]
    assert all(rates.allow("a", 0.0) for _ in range(100))


def test_made_up_namespaces_take_no_memory() -> None:
    rates = Rates(Clock())
    for number in range(_KEPT + 100):
        assert rates.allow(str(number), 1.0)
    assert len(rates) == _KEPT


def other(engine: Driver, namespace: Namespace) -> Driver:
    """The same store as another tenant sees it."""
    tenant = Namespace(namespace.model, namespace.layout, tenant="other")
    return Driver(engine.store, tenant, engine.book)


def test_plans_beyond_the_rate_are_declined(driver: Open, namespace: Namespace) -> None:
    engine = driver(plans_per_second=0.001)
    node = engine.save(prompt(1, 40))
    neighbour = other(engine, namespace)
    neighbour.save(prompt(2, 40))
    assert engine.serve(prompt(1, 40)).exact == 39
    assert engine.plan(prompt(1, 40)).declined == "too_many_plans"
    assert engine.store.serving.plan_node(node or "").result().declined == "too_many_plans"
    assert neighbour.serve(prompt(2, 40)).exact == 39
    stats = engine.store.stats()
    assert stats["declined"] == {"too_many_plans": 2}
    assert (stats["lookups"], stats["misses"], stats["leases"]) == (4, 2, 0)
    assert engine.store.requests.last(2)[1].reason == "too_many_plans"


def test_saves_beyond_the_rate_are_refused(driver: Open, namespace: Namespace) -> None:
    engine = driver(saves_per_second=0.001)
    engine.save(prompt(1, 40))
    with pytest.raises(LimitError, match="saves_per_second"):
        engine.save(prompt(2, 40))
    assert LimitError.retryable
    assert other(engine, namespace).save(prompt(2, 40))
    stats: dict[str, Any] = engine.store.stats()
    assert (stats["errors"], stats["nodes"], stats["staged"]) == ({"limit": 1}, 2, 0)


def test_a_namespace_of_too_many_prompts_evicts_its_own(driver: Open, namespace: Namespace) -> None:
    engine = driver(namespace_nodes=2)
    theirs = other(engine, namespace)
    for seed in (11, 12):
        theirs.save(prompt(seed, 40))
    for seed in (1, 2):
        engine.save(prompt(seed, 40))
    engine.serve(prompt(1, 40))
    engine.save(prompt(3, 40))
    assert engine.plan(prompt(2, 40)).declined == "no_donor"
    for one, seeds in ((engine, (1, 3)), (theirs, (11, 12))):
        assert [one.serve(prompt(seed, 40)).exact for seed in seeds] == [39, 39]


def test_pinned_prompts_count_and_stay(driver: Open) -> None:
    engine = driver(namespace_nodes=1)
    pinned = engine.save(prompt(1, 40))
    engine.store.pin(pinned or "")
    assert engine.save(prompt(2, 40))
    assert [node.id for node in engine.store.tree] == [pinned], "there is room for no other"


def test_the_count_of_prompts_survives_a_restart(driver: Open) -> None:
    engine = driver()
    for seed in range(4):
        engine.save(prompt(seed, 40))
    engine.store.flush()
    engine = driver(namespace_nodes=3)
    assert engine.store.collect().nodes == 1
    assert len(engine.store.tree) == 3
