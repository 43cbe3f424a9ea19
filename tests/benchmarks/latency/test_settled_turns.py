"""From served turns to a line for each think time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.harness.engines import Engine, Home, Timed
from benchmarks.harness.result import Options
from benchmarks.latency.settled_turns import Turn, result_of, said, serve
from examples.prompts.histories import Message


def timed(tokens: int, computed: int, **report: int) -> Timed:
    known = {f"kvshare.{name}": value for name, value in report.items()}
    return Timed(0.25, tokens, 0, [1, 2], "", {}, known | {"kvshare.recomputed": computed})


@pytest.mark.parametrize(
    ("computed", "report", "exact", "again"),
    [
        (110, {"exact": 990}, True, 10),
        (100, {"exact": 1000}, True, 0),
        (110, {"exact": 400, "continued": 590}, False, 10),
        (110, {"exact": 400, "edited": 590}, False, 10),
        (1100, {}, False, 1000),
    ],
)
def test_an_exact_history_is_one_that_was_found(
    computed: int, report: dict[str, int], exact: bool, again: int
) -> None:
    turn = Turn(1000, timed(1100, computed, **report))
    assert (turn.exact, turn.again) == (exact, again)


class Recorded:
    """An engine that answers with two tokens, and tells what it was asked to do."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def ask(self, tokens: list[int], salt: str, max_tokens: int) -> Timed:
        self.done.append(tokens)
        return timed(len(tokens), 1)

    def idle(self, seconds: float) -> None:
        self.done.append(seconds)


def test_conversations_take_turns_and_their_users_think_at_once() -> None:
    engine = Recorded()
    found = serve(cast("Engine", engine), cast("Home", None), [[[7, 8], [9]], [[6]]], "s", 5.0)
    assert engine.done == [[7, 8], [6], 5.0, [7, 8, 1, 2, 9]]
    assert [(turn.history, turn.timed.tokens) for turn in found] == [(4, 5)]


def test_a_conversation_is_its_first_prompt_and_what_follows_each_answer() -> None:
    words: list[Message] = [
        {"role": role, "content": text}
        for role, text in (("system", "be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"),
                           ("assistant", "d"), ("user", "e"))
    ]  # fmt: skip
    texts: list[str] = []

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        texts.append(text)
        return {"input_ids": [len(texts)]}

    first, second = said(words, 600, tokenizer, 4), said(words, 1200, tokenizer, 4)
    assert first == [[1], [2, 3]]
    assert len(second) == 2
    assert "be kind" in texts[0]
    assert texts[0] != texts[3], "another time of the day"
    assert texts[1] == "<|im_end|>\n"
    assert texts[2] == "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"


def test_each_think_time_has_a_line() -> None:
    approximate = Turn(1000, timed(1100, 100, exact=400, continued=600))
    exact = Turn(1000, timed(1100, 100, exact=1000))
    made = result_of(
        {None: [approximate] * 4, 1.0: [exact, *[approximate] * 3], 30.0: [exact] * 4}, 2,
        Options(data=Path()), "model",
    )  # fmt: skip
    assert [row[:4] for row in made.rows] == [
        [None, "off", 4, 0.0], [1.0, "idle", 4, 0.25], [30.0, "idle", 4, 1.0]
    ]  # fmt: skip
    assert made.n == {"conversations": 2, "later turns at each think time": 4}
    assert len(made.series["turns"]) == 12
