"""Nodes that a client knows by id: all rows of one, without a lookup."""

from __future__ import annotations

import pytest

from kvshare_store.daemon.by_id import forget, has_nodes, held, nodes_of
from kvshare_store.plan import ReusePlan
from tests.support.oracle import Driver
from tests.support.stores import Open

PROMPT = list(range(100, 130))


def rows_checked(one: Driver, node: str, tokens: list[int]) -> ReusePlan:
    """The plan of a whole node, whose rows are those of these tokens."""
    plan = one.store.serving.plan_node(node).result()
    assert not plan.declined
    assert plan.exact == plan.tokens == plan.reused == len(tokens)
    one.check(tokens, plan)
    one.finish(plan)
    return plan


def test_all_rows_of_a_node_are_leased_whatever_policy_and_cost_say(driver: Open) -> None:
    one = driver(policy="exact", min_saving_ms=1e9, min_prompt_tokens=30)
    node = one.save(PROMPT)
    assert node is not None
    assert one.plan(PROMPT).declined == "no_saving"
    rows_checked(one, node, PROMPT)
    assert one.store.stats()["hits_exact"] == 1
    assert one.store.stats()["leases"] == 0


def test_rows_come_from_disk_too(driver: Open) -> None:
    node = driver().save(PROMPT)
    assert node is not None
    rows_checked(driver(), node, PROMPT)


def test_a_node_with_equal_blocks(driver: Open) -> None:
    one = driver()
    layout = one.namespace.layout
    node = one.store.save(PROMPT, one.namespace, bytes(len(PROMPT) * layout.row_bytes))
    assert node is not None
    plan = one.store.serving.plan_node(node).result()
    assert plan.exact == len(PROMPT)
    assert len(plan.blocks) < len(plan.spans)
    assert all(not any(one.store.rows_of(plan, at)) for at in range(len(plan.blocks)))


def test_unknown_and_edited_nodes_are_plans_without_use(driver: Open) -> None:
    one = driver()
    one.save(PROMPT)
    edited = one.serve_and_save([*PROMPT[:14], 7, *PROMPT[15:]])
    assert edited is not None
    for node in ("", "0" * 32, edited):
        assert one.store.serving.plan_node(node).result().declined == "unknown_node"


def test_rows_that_a_codec_rounded_are_refused(driver: Open) -> None:
    node = driver(disk_codec="int8").save(PROMPT)
    assert node is not None
    one = driver(disk_codec="int8")
    assert one.store.serving.plan_node(node).result().declined == "lossy"
    assert one.store.stats()["leases"] == 0


def test_nodes_are_asked_for_listed_and_forgotten(driver: Open) -> None:
    one = driver()
    ids = sorted(filter(None, (one.save([n, *PROMPT]) for n in range(5))))
    assert has_nodes(one.store, [*ids, "0" * 32]) == [True] * 5 + [False]
    (holding,) = held(one.store, "mod")
    assert holding.namespace == one.namespace
    assert holding.nbytes == 5 * 31 * one.namespace.layout.row_bytes
    assert held(one.store, "other") == []
    first = nodes_of(one.store, holding.digest, "", 3)
    second = nodes_of(one.store, holding.digest, first[-1][0], 3)
    assert [node for node, _ in (*first, *second)] == ids
    assert {len(tokens) for _, tokens in first} == {31 * 4}
    assert forget(one.store, [ids[0], ids[0], "0" * 32]) == [ids[0]]
    assert has_nodes(one.store, ids) == [False] + [True] * 4


@pytest.mark.parametrize("asked", ["to use it", "to look", "never"])
def test_asking_for_a_node_makes_it_the_last_to_go(driver: Open, asked: str) -> None:
    one = driver(max_nodes=3, eviction="lru")
    first = one.save([1, *PROMPT])
    assert first is not None
    for number in range(2, 6):
        if asked == "to use it":
            assert has_nodes(one.store, [first]) == [True]
        elif asked == "to look":
            has_nodes(one.store, [first], use=False)
        one.save([number, *PROMPT])
    assert has_nodes(one.store, [first]) == [asked == "to use it"]
