"""Conversations that are rewritten at random: under any policy KVShare computes no more than prefix
caching alone.

The replay and the planner are the real ones; only rows are missing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.config import StoreConfig
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.simulate.prompt_replay import PREFIX_CACHING, Room, arms_of, replay
from kvshare_store.simulate.prompts import Prompt

ROW_BYTES = 64
POLICIES = ("exact", "faithful", "balanced", "aggressive")

Message = list[int]
Conversation = list[Message]


class Turn(NamedTuple):
    """What happens to one of the conversations before it is sent again."""

    what: str
    which: int
    """Index of the conversation."""
    where: int
    """Index of the message in it."""
    length: int
    """Tokens of the new message."""
    answer: int
    """Tokens of the answer to this turn."""


CHANGES = ("begin", "append", "branch", "rewrite", "strip", "compact", "reorder", "again", "date")

turns = st.builds(
    Turn,
    st.sampled_from(CHANGES),
    st.integers(0, 3),
    st.integers(0, 5),
    st.integers(1, 150),
    st.integers(0, 80),
)


class Traffic:
    """Several conversations, each a list of messages. All new tokens come from one source."""

    def __init__(self) -> None:
        self._chance = np.random.default_rng(0)
        self._system = self._new(60)
        self._all: list[Conversation] = [[self._system, self._new(40)]]

    def prompt(self, turn: Turn) -> Prompt:
        """The conversation's next request, after its change. The answer becomes its last message;
        in every other turn it comes back as it was generated."""
        which = turn.which % len(self._all)
        conversation = self._changed(turn, self._all[which])
        if turn.what in ("begin", "branch"):
            self._all.append(conversation)
        else:
            self._all[which] = conversation
        tokens = [token for message in conversation for token in message]
        answer = self._new(turn.answer)
        conversation.append(answer)
        return Prompt(as_tokens(tokens), as_tokens(answer), None, "", "")

    def say(self, length: int) -> None:
        """A new message in the first conversation."""
        self._all[0].append(self._new(length))

    def _changed(self, turn: Turn, old: Conversation) -> Conversation:
        new, at = self._new(turn.length), 1 + turn.where % max(1, len(old) - 1)
        changes: dict[str, Conversation] = {
            "begin": [self._system, new],
            "append": [*old, new],
            "branch": [*old[:at], new],
            "rewrite": [*old[:at], new, *old[at + 1 :]],
            "strip": [*old[:at], *(message[len(message) // 2 :] for message in old[at:])],
            "compact": [old[0], new, *old[at:]],
            "reorder": [*old[:at], *reversed(old[at:])],
            "again": list(old),
            "date": [[*new[:4], *old[0][4:]], *old[1:]],
        }
        return changes[turn.what]

    def _new(self, length: int) -> Message:
        return [int(token) for token in self._chance.integers(0, 30_000, length)]


def computed(turns: Sequence[Turn], policy: str, **settings: float) -> tuple[int, int]:
    """Tokens that prefix caching and KVShare compute for these turns."""
    traffic = Traffic()
    prompts = [traffic.prompt(turn) for turn in turns]
    config = StoreConfig(**settings)
    counted = replay(prompts, arms_of(config, [policy], Room(ROW_BYTES)), 0)
    return sum(counted.to_compute(PREFIX_CACHING)), sum(counted.to_compute(policy))


@pytest.mark.parametrize("policy", POLICIES)
@given(turns=st.lists(turns, min_size=1, max_size=24))
def test_no_more_than_prefix_caching(policy: str, turns: list[Turn]) -> None:
    alone, ours = computed(turns, policy)
    assert ours <= alone


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("price", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(2))
def test_long_traffic(policy: str, price: float, seed: int) -> None:
    alone, ours = computed(drawn(seed, 80), policy, approximation_price=price)
    assert ours <= alone


def drawn(seed: int, count: int) -> list[Turn]:
    chance = random.Random(seed)
    return [
        Turn(
            chance.choice(CHANGES),
            chance.randrange(4),
            chance.randrange(6),
            chance.randint(1, 150),
            chance.randint(0, 80),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("room", [1, 1.5, 2, 3, 4, 8])
def test_in_bounded_memory(policy: str, room: float) -> None:
    """`room`: how many of the longest prompts either side may keep."""
    for seed in range(4):
        traffic = Traffic()
        prompts = [traffic.prompt(turn) for turn in drawn(seed, 60)]
        budget = room * ROW_BYTES * max(len(prompt.computed) for prompt in prompts)
        counted = replay(prompts, arms_of(StoreConfig(), [policy], Room(ROW_BYTES, budget)), 0)
        assert sum(counted.to_compute(policy)) <= sum(counted.to_compute(PREFIX_CACHING)), seed


@pytest.mark.parametrize(("policy", "most"), [("balanced", 0.2), ("aggressive", 0.2)])
@pytest.mark.parametrize("turns", [8, 30])
def test_a_date_that_changes_at_every_turn(policy: str, turns: int, most: float) -> None:
    """However long the conversation: when no more edits may be built on one another, a prompt is
    computed in full now and then, and the next ones build on that."""
    dated = [Turn("date", 0, 0, 100, 40) for _ in range(turns)]
    talk = Traffic()
    prompts = []
    for turn in dated:
        talk.say(turn.length)
        prompts.append(talk.prompt(turn))
    arms = arms_of(StoreConfig(), [policy], Room(ROW_BYTES))
    counted = replay(prompts, arms, 0)
    assert sum(counted.to_compute(policy)) <= most * sum(counted.to_compute(PREFIX_CACHING))
