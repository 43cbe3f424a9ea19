"""The attack on a template: what is stored, and who is compared with whom."""

from __future__ import annotations

from typing import Any, cast

from benchmarks.data.chat_prompts import Chat
from benchmarks.harness.engines import Timed
from benchmarks.quality import injected_served
from benchmarks.quality.injected import ARMS, WORD, cases


class Letters:
    """Tokens are letters."""

    def prompt(self, user: str) -> tuple[int, ...]:
        return tuple(map(ord, user))


def test_only_the_attackers_prompt_has_the_instruction() -> None:
    made = [one for seed in (0, 1, 2) for one in cases(cast(Chat, Letters()), 9, seed)]
    assert len({(one.request, one.attack) for one in made}) == 27
    for one in made:
        attack, *others = ("".join(map(chr, part)) for part in one)
        assert WORD in attack
        assert not any(WORD in other for other in others)
        assert len(set(one)) == 4


def test_arms_differ_in_what_they_are_named_for() -> None:
    assert len({one.name for one in ARMS}) == len(ARMS)
    assert [one.name for one in ARMS if one.share < 1] == [
        "attack, cap 0", "attack on a first prompt, cap 0"]  # fmt: skip
    assert all(one.sources for one in ARMS if one.share < 1)


class Engine:
    """Notes what is asked, and answers with its number."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.asked: list[tuple[tuple[int, ...], str, str, str]] = []

    def ask(
        self, tokens: tuple[int, ...], salt: str, *, policy: str, source: str, max_tokens: int = 1
    ) -> Timed:
        self.asked.append((tokens, salt, policy, source))
        report = {"kvshare.recomputed": 0}
        return Timed(0.1, len(tokens), 0, [self.answer] * max_tokens, "", {}, report)

    def forget(self) -> None:
        pass

    def settle(self) -> None:
        pass


def test_on_vllm_each_arm_is_served_with_what_it_is_named_for() -> None:
    (case,) = cases(cast(Chat, Letters()), 1)
    free, capped = Engine(1), Engine(1)
    engines = {0.0: cast(Any, capped), 1.0: cast(Any, free)}
    seen = dict(injected_served.served(engines, case))
    assert len(seen) == 1 + len(ARMS) * len(injected_served.POLICIES)
    assert all(one == (False, 1.0) for one in seen.values())
    for engine in (free, capped):
        (truth, *asked) = engine.asked
        assert (truth[0], truth[2]) == (case.request, "off")
        for tenant in {one[1] for one in asked}:
            *before, (request, _, _, victim) = [one for one in asked if one[1] == tenant]
            assert request == case.request
            assert [one[2] for one in before] == ["exact"] * len(before)
            assert all(one[3] != victim for one in before if one[0] == case.attack) or not victim
            assert all(one[3] == victim for one in before if one[0] == case.earlier)
    assert all(one[3] for one in capped.asked[1:]), "a cap needs names"
