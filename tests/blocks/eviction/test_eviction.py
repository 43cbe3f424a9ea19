"""Eviction policies: the contract tests of all of them, and what is special about each."""

from __future__ import annotations

from typing import get_args

import pytest

from kvshare_store.blocks.eviction import (
    LRU,
    POLICIES,
    S3FIFO,
    CostAware,
    EvictionPolicy,
    make_policy,
)
from kvshare_store.config import EvictionName
from kvshare_store.errors import ConfigError
from kvshare_store.testing.eviction import PolicyTests


class TestLRU(PolicyTests):
    def make_policy(self) -> EvictionPolicy:
        return LRU()

    def test_the_least_recently_used_goes_first(self) -> None:
        policy = self.filled(4)
        for name in "1021":
            policy.touch(name)
        assert list(policy.victims()) == list("3021")

    def test_a_touch_adds(self) -> None:
        policy = LRU()
        policy.touch("a")
        assert list(policy) == ["a"]


def in_main(names: str, nbytes: int) -> S3FIFO:
    """A policy whose evicted names have all come back through the ghost queue."""
    policy = S3FIFO()
    policy.add("large", 100 * nbytes)  # so that the ghost queue has room for them
    for name in names:
        policy.add(name, nbytes)
        policy.remove(name)
    for name in names:
        policy.add(name, nbytes)
    policy.remove("large")
    return policy


class TestS3FIFO(PolicyTests):
    def make_policy(self) -> EvictionPolicy:
        return S3FIFO()

    def test_names_used_once_leave_before_those_used_twice(self) -> None:
        policy = self.filled(6)
        for name in "00112":
            policy.touch(name)
        assert list(policy.victims()) == list("234501")

    def test_what_comes_back_soon_is_not_new(self) -> None:
        """A name in the ghost queue goes to the main queue; a later scan of new names does not
        evict it."""
        policy = self.filled(10)
        assert next(policy.victims()) == "0"
        policy.remove("0")
        policy.add("0", 10)
        for number in range(100, 200):
            policy.add(f"{number}", 10)
            victim = next(policy.victims())
            assert victim != "0"
            policy.remove(victim)

    def test_queues_are_measured_in_bytes(self) -> None:
        """The queue of new names is spared while its bytes are under a tenth of all."""
        policy = in_main("ab", 1000)
        policy.add("new", 100)
        assert next(policy.victims()) == "a"
        policy.add("newer", 200)
        assert next(policy.victims()) == "new"

    def test_a_use_in_main_is_a_second_chance_and_no_more(self) -> None:
        policy = in_main("abc", 10)
        policy.touch("a")
        gone = []
        for _ in range(3):
            gone.append(next(policy.victims()))
            policy.remove(gone[-1])
        assert gone == ["b", "c", "a"]


class TestCostAware(PolicyTests):
    def make_policy(self) -> EvictionPolicy:
        return CostAware()

    def test_what_is_dear_for_its_bytes_stays(self) -> None:
        policy = CostAware()
        policy.add("cheap", 10, cost=1.0)
        policy.add("dear", 10, cost=5.0)
        policy.add("large", 100, cost=5.0)
        assert list(policy.victims()) == ["large", "cheap", "dear"]

    def test_uses_multiply_the_cost(self) -> None:
        policy = CostAware()
        policy.add("dear", 10, cost=1.7)
        policy.add("used", 10, cost=1.0)
        assert next(policy.victims()) == "used"
        policy.touch("used")
        policy.touch("used")
        assert next(policy.victims()) == "dear"

    def test_more_users_raise_a_name_at_once(self) -> None:
        policy = self.filled(3)
        policy.add("0", 10, cost=4.0)
        assert list(policy.victims()) == list("120")

    def test_other_bytes_make_a_name_no_younger(self) -> None:
        policy = self.filled(3)
        policy.add("0", 20, cost=2.0)
        assert list(policy.victims()) == list("012")
        policy.remove(next(policy.victims()))
        policy.add("3", 10)
        policy.add("1", 20, cost=2.0)
        assert list(policy.victims()) == list("123")

    def test_what_changes_meanwhile_is_not_offered_twice(self) -> None:
        policy = self.filled(3)
        offered = policy.victims()
        assert next(offered) == "0"
        policy.add("0", 10, cost=9.0)
        assert list(offered) == ["1", "2"]

    def test_what_comes_back_soon_keeps_its_uses(self) -> None:
        policy = self.filled(4)
        policy.remove(next(policy.victims()))
        policy.add("0", 10)
        policy.add("4", 10)
        assert list(policy.victims()) == list("12340")

    def test_what_comes_back_late_is_new(self) -> None:
        policy = self.filled(4)
        policy.remove(next(policy.victims()))
        for number in range(100, 120):
            policy.add(f"{number}", 10)
            policy.remove(next(policy.victims()))
        policy.add("0", 10)
        policy.add("last", 10)
        assert list(policy.victims())[-1] == "last"

    def test_a_deleted_name_does_not_age_the_others(self) -> None:
        policy = self.filled(2)
        policy.add("dear", 10, cost=1e9)
        policy.remove("dear")
        policy.touch("0")
        policy.add("new", 10)
        assert list(policy.victims()) == ["1", "new", "0"]


def test_every_policy_has_a_class_here() -> None:
    classes = {TestLRU: LRU, TestS3FIFO: S3FIFO, TestCostAware: CostAware}
    assert set(classes.values()) == set(POLICIES.values())
    assert set(POLICIES) == set(get_args(EvictionName))
    assert all(type(make_policy(name)) is kind for name, kind in POLICIES.items())


def test_a_policy_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cost, lru, s3fifo"):
        make_policy("fifo")


@pytest.mark.parametrize("name", POLICIES)
def test_victims_of_equal_worth_go_in_the_order_they_came(name: str) -> None:
    policy = make_policy(name)
    for number in range(1000):
        policy.add(f"{number}", 10)
    for number in range(100):
        victim = next(policy.victims())
        assert victim == f"{number}"
        policy.remove(victim)
        policy.add(f"new {number}", 10)
