"""Turns of conversations that several engines serve, and their times beside prefix caching's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from benchmarks.harness.engines import Timed
from benchmarks.harness.result import Cell
from benchmarks.harness.spread import median_and_middle_half

SIDE_BY_SIDE = 3
"""Conversations that an engine serves turn about."""
ANSWER = 16


class Turn(NamedTuple):
    """One turn, served by every arm."""

    kind: str
    """What was done to the history."""
    number: int
    """From 1."""
    timed: dict[str, Timed]

    def ratio(self, arm: str) -> float:
        """This arm's time to first token beside the first prefix-caching engine's."""
        return self.timed[arm].ttft_s / self.timed["prefix"].ttft_s

    def same(self, arm: str, tokens: int = ANSWER) -> bool:
        """Whether the answer begins with the tokens that full compute gives."""
        return self.timed[arm].token_ids[:tokens] == self.timed["full"].token_ids[:tokens]


def target_of(what: str, most: float, turns: Sequence[Turn]) -> tuple[str, str, bool]:
    """KVShare's time as a multiple of prefix caching's, median."""
    reached = median([turn.ratio("kvshare") for turn in turns])
    goal = f"{what}: at most {most} times prefix caching's time to first token, median"
    return goal, f"{reached:.2f}, n = {len(turns)}", reached <= most


def times_of(arm: str, turns: Sequence[Turn]) -> list[Cell]:
    """Milliseconds, the multiple of prefix caching's time with its middle half, that of the sum of
    all turns, and tokens of the prompts that were computed."""
    timed = [turn.timed[arm] for turn in turns]
    total = sum(one.ttft_s for one in timed) / sum(turn.timed["prefix"].ttft_s for turn in turns)
    return [
        round(median(one.ttft_s for one in timed) * 1e3),
        *median_and_middle_half([turn.ratio(arm) for turn in turns], 2),
        f"{total:.2f}",
        sum(one.computed for one in timed),
    ]
