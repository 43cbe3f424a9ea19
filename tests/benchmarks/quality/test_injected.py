"""The attack on a template: what is stored, and who is compared with whom."""

from __future__ import annotations

from typing import cast

from benchmarks.data.chat_prompts import Chat
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
