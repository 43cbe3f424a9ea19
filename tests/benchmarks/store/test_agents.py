"""What the replay of recorded requests says of its arms, with much and with little memory."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.store.agents import (
    MEMORY,
    POLICIES,
    ROW_BYTES,
    Key,
    Left,
    Slice,
    replayed,
    room_of,
    rows_of,
    targets_of,
)
from kvshare_store.config import StoreConfig
from kvshare_store.simulate.prompts import Prompt

WORDS = np.random.default_rng(1).integers(0, 30_000, (40, 200)).astype(np.int32)
CONFIG = StoreConfig(home="none")


def conversations(count: int, turns: int) -> list[Prompt]:
    """Side by side, each turn with its whole history and an answer of 30 tokens."""
    sent = []
    for turn in range(turns):
        for at in range(count):
            words = WORDS[at * turns : at * turns + turn + 1]
            sent.append(Prompt(words.ravel(), words[-1, :30], 30.0 * len(sent), "", str(at)))
    return sent


@pytest.mark.parametrize("memory", MEMORY)
def test_every_arm_is_replayed_at_equal_memory(memory: str) -> None:
    """Short prompts in little memory: a block of 64 tokens that must go is more than one of 16."""
    requests, served = conversations(4, 4), list[None]()
    found = replayed(Slice("tau", "all", requests), memory, CONFIG, lambda: served.append(None))
    assert len(served) == 2 * len(requests), "settled ones are replayed too"
    assert {key.arm for key in found} == {"prefix_caching", *POLICIES}
    bounded = memory != "all"
    for left in found.values():
        assert max(left.ratio, left.settled) <= (1.05 if bounded else 1.0)
    room = room_of(requests, memory)
    assert (room.budget < float("inf")) == bounded
    if bounded:
        assert room.budget == float(memory) * 829 * ROW_BYTES


def test_less_memory_leaves_more() -> None:
    requests = conversations(4, 4)
    left = [
        replayed(Slice("tau", "all", requests), memory, CONFIG, lambda: None)[
            Key("balanced", "tau", memory, "all")
        ].tokens
        for memory in MEMORY
    ]
    assert left == sorted(left)
    assert left[0] < left[-1]


def test_each_row_says_what_settled_and_leaves_open_what_was_not_replayed() -> None:
    found = {
        Key("balanced", "recorded", "all", sessions): Left(9, [1.0, 2.0, 3.0], ratio, settled)
        for sessions, ratio, settled in (("all", 0.5, 0.4), ("dev", 0.6, 0.3), ("report", 0.3, 0.2))
    } | {Key("exact", "tau", "1", "all"): Left(8, [4.0, 0.0, 0.0], 1.01, 0.9)}
    assert rows_of(found) == [
        ["balanced", "recorded", "all", 9, 1.0, 2.0, 3.0, 0.5, 0.4, 0.6, 0.3, 0.3, 0.2],
        ["exact", "tau", "1", 8, 4.0, 0.0, 0.0, 1.01, 0.9, None, None, None, None],
    ]
    assert [reached for _, _, reached in targets_of(found)] == [True, True, False]
    assert "exact, tau, 1, all" in targets_of(found)[-1][1]
