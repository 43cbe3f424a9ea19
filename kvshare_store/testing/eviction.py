"""Contract tests of eviction policies: subclass `PolicyTests` and supply `make_policy`."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvshare_store.blocks.eviction import EvictionPolicy

_NAMES = [f"block {number}" for number in range(12)]


class PolicyTests:
    """Every policy passes these."""

    def make_policy(self) -> EvictionPolicy:
        """A policy that knows no name."""
        raise NotImplementedError

    def filled(self, names: int, nbytes: int = 10) -> EvictionPolicy:
        """A policy with `names` names of equal bytes and cost, none used."""
        policy = self.make_policy()
        for number in range(names):
            policy.add(f"{number}", nbytes)
        return policy

    def test_a_new_policy_has_no_victims(self) -> None:
        policy = self.make_policy()
        assert list(policy.victims()) == []
        assert len(policy) == 0

    def test_unused_names_of_equal_worth_go_in_the_order_they_came(self) -> None:
        assert list(self.filled(5).victims()) == list("01234")

    def test_a_name_that_is_used_again_and_again_outlives_the_others(self) -> None:
        policy = self.filled(5)
        for _ in range(3):
            policy.touch("0")
        assert list(policy.victims())[-1] == "0"

    def test_nothing_is_immortal(self) -> None:
        """A name used a thousand times, and then never again, goes while newer ones are used."""
        policy = self.filled(20)
        for _ in range(1000):
            policy.touch("0")
        for number in range(20, 40_000):
            if "0" not in policy:
                return
            policy.remove(next(policy.victims()))
            policy.add(f"{number}", 10)
            policy.touch(f"{number}")
            policy.touch(f"{number}")
        pytest.fail("a name that nobody uses any more was kept for ever")

    def test_looking_changes_nothing(self) -> None:
        looked_at, left_alone = self.filled(9), self.filled(9)
        for policy in (looked_at, left_alone):
            for name in "0011223":
                policy.touch(name)
        for _ in range(3):
            assert list(looked_at) == list(looked_at.victims())
        for _ in range(9):
            victim = next(left_alone.victims())
            assert next(looked_at.victims()) == victim
            looked_at.remove(victim)
            left_alone.remove(victim)
            list(looked_at)

    def test_names_that_may_not_go_are_passed_over(self) -> None:
        policy = self.filled(6)
        order = list(policy)
        offered = policy.victims()
        assert [next(offered) for _ in range(3)] == order[:3]
        policy.remove(order[2])
        assert next(offered) == order[3]
        assert next(policy.victims()) == order[0]

    def test_names_may_come_and_go_while_victims_are_offered(self) -> None:
        policy = self.filled(8)
        seen = []
        for name in policy.victims():
            seen.append(name)
            policy.remove(name)
            policy.add(f"after {name}", 10)
            policy.touch("7")
            policy.remove("5")
        assert len(seen) == len(set(seen))
        assert set("012346") <= set(seen) <= set("0123467")
        assert "5" not in policy

    def test_a_name_that_was_forgotten_starts_anew(self) -> None:
        policy = self.filled(3)
        policy.remove("1")
        policy.remove("1")
        assert "1" not in policy
        assert sorted(policy) == ["0", "2"]
        policy.add("1", 10)
        assert sorted(policy) == ["0", "1", "2"]

    def test_adding_again_counts_no_use(self) -> None:
        policy = self.filled(4)
        for _ in range(5):
            policy.add("0", 10)
        assert next(policy.victims()) == "0"

    def test_any_sequence_of_calls(self) -> None:
        maker = self.make_policy

        class Calls(_Calls):
            make = staticmethod(maker)

        run_state_machine_as_test(
            Calls, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
        )


class _Calls(RuleBasedStateMachine):
    """Whatever is called: the policy knows the names it should, and offers each of them once."""

    make: ClassVar[staticmethod[[], EvictionPolicy]]

    def __init__(self) -> None:
        super().__init__()
        self.policy = type(self).make()
        self.here: set[str] = set()

    @rule(name=st.sampled_from(_NAMES), nbytes=st.integers(0, 99), cost=st.floats(0, 1e6))
    def add(self, name: str, nbytes: int, cost: float) -> None:
        self.policy.add(name, nbytes, cost)
        self.here.add(name)

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        if self.here:
            self.policy.touch(data.draw(st.sampled_from(sorted(self.here))))

    @rule(name=st.sampled_from(_NAMES))
    def remove(self, name: str) -> None:
        self.policy.remove(name)
        self.here.discard(name)

    @rule(kept=st.integers(0, 3))
    def evict(self, kept: int) -> None:
        """What is kept is passed over, as a pinned block is."""
        for number, name in enumerate(self.policy.victims()):
            if number == kept:
                self.policy.remove(name)
                self.here.remove(name)
                return

    @invariant()
    def it_knows_its_names(self) -> None:
        assert len(self.policy) == len(self.here)
        assert sorted(self.policy) == sorted(self.here)
        assert all(name in self.policy for name in self.here)
