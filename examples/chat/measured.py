"""What each server needed for each turn, and what that comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from examples.engines.server import Streamed

ARMS = ("prefix", "kvshare")
"""vLLM with its own prefix caching alone, and with KVShare."""


@dataclass(frozen=True)
class Turn:
    """One turn of one conversation, answered by both servers."""

    history: str
    """How the history was rewritten."""
    conversation: int
    turn: int
    """From 1."""
    answers: dict[str, Streamed]
    """By arm."""

    @property
    def ratio(self) -> float:
        """KVShare's time to first token, times prefix caching's."""
        return self.answers["kvshare"].ttft_s / self.answers["prefix"].ttft_s

    @property
    def same(self) -> bool:
        """Whether both gave the same answer."""
        return self.answers["kvshare"].text == self.answers["prefix"].text


class Row(NamedTuple):
    """Turns of one kind of history: a turn's number with medians over the conversations, or turns 2
    and later of all (`2+`)."""

    history: str
    turn: str
    n: int
    tokens: float
    """Of the prompt."""
    computed: dict[str, float]
    """Of these, computed, by arm."""
    seconds: dict[str, float]
    """Time to first token by arm."""
    ratio: float
    """Median of KVShare's times as multiples of prefix caching's."""
    total: float
    """All of KVShare's times together, times prefix caching's."""
    same: int
    """How many answers are the same."""


def rows(turns: Sequence[Turn]) -> Iterator[Row]:
    """For each kind of history a row for each turn, and one for turns 2 and later."""
    for history in dict.fromkeys(turn.history for turn in turns):
        of_kind = [turn for turn in turns if turn.history == history]
        for number in sorted({turn.turn for turn in of_kind}):
            yield _row(history, str(number), [turn for turn in of_kind if turn.turn == number])
        if later := [turn for turn in of_kind if turn.turn > 1]:
            yield _row(history, "2+", later)


def _row(history: str, name: str, turns: Sequence[Turn]) -> Row:
    by_arm = {arm: [turn.answers[arm] for turn in turns] for arm in ARMS}
    sums = {arm: sum(answer.ttft_s for answer in answers) for arm, answers in by_arm.items()}
    return Row(
        history,
        name,
        len(turns),
        median(answer.tokens for answer in by_arm["prefix"]),
        {arm: median(answer.computed for answer in by_arm[arm]) for arm in ARMS},
        {arm: median(answer.ttft_s for answer in by_arm[arm]) for arm in ARMS},
        median(turn.ratio for turn in turns),
        sums["kvshare"] / sums["prefix"],
        sum(turn.same for turn in turns),
    )


def report(model: str, turns: Sequence[Turn]) -> dict[str, Any]:
    """The content of chat-report.json: every turn with both answers, and the rows of the table."""
    return {
        "model": model,
        "rows": [row._asdict() for row in rows(turns)],
        "turns": [asdict(turn) for turn in turns],
    }


def problems(turns: Sequence[Turn]) -> list[str]:
    """Reasons why the example failed, a line each; empty if it worked."""
    reused = sum(int(turn.answers["kvshare"].report.get("kvshare.reused", 0)) for turn in turns)
    if reused:
        return []
    reasons = {turn.answers["kvshare"].report.get("kvshare.reason", "") for turn in turns}
    return [f"KVShare reused nothing; it says: {', '.join(sorted(reasons)) or 'nothing'}"]
