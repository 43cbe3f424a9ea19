"""Recorded conversations, and histories as tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data.chat_histories import (
    BEGIN_S,
    TURN_S,
    as_tokens,
    conversations,
    side_by_side,
    supported,
    talked,
)
from benchmarks.data.datasets import DataFormatError, MissingDataError
from examples.prompts.histories import turns

MESSAGES = [
    {"role": role, "content": f"{role} {number}"}
    for number in range(2)
    for role in ("user", "assistant")
]


class Letters:
    """A tokenizer with one token per letter."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def write(data: Path, line: str) -> None:
    (data / "tau").mkdir()
    (data / "tau" / "airline.jsonl").write_text(line + "\n")


def test_a_later_turn_begins_with_the_tokens_of_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, json.dumps({"messages": MESSAGES}))
    (only,) = conversations(tmp_path)
    first, second = (as_tokens(history, Letters()) for history in turns(only))
    assert second[: len(first)] == first


def test_conversations_are_sent_side_by_side_each_turn_with_its_history(tmp_path: Path) -> None:
    write(tmp_path, "\n".join(json.dumps({"messages": MESSAGES}) for _ in range(3)))
    sessions = supported(tmp_path, 2, 6)
    assert [[sent.answer for sent in session] for session in sessions] == 2 * [
        ["assistant 0", "assistant 1"]
    ]
    prompts = side_by_side(sessions, Letters())
    assert [(prompt.session, prompt.at) for prompt in prompts] == [
        ("0", 0.0), ("1", BEGIN_S), ("0", TURN_S), ("1", BEGIN_S + TURN_S),
    ]  # fmt: skip
    first, second = prompts[0], prompts[2]
    whole = [*first.tokens.tolist(), *first.answer.tolist()]
    assert second.tokens.tolist()[: len(whole)] == whole, "the next turn goes on from the answer"
    assert [len(session) for session in supported(tmp_path, 2, 1)] == [1, 1]


def test_of_people_only_what_they_said_is_sent(tmp_path: Path) -> None:
    (tmp_path / "sharegpt").mkdir()
    rows = [{"id": "a", "human": ["one"]}, {"id": "b", "human": ["two", "three", "four"]}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(tmp_path / "sharegpt" / "human_turns.jsonl.gz", "wt") as file:
        file.write(text)
    (session,) = talked(tmp_path, 5, 2)
    assert [[m["content"] for m in sent.history] for sent in session] == [["two"], ["two", "three"]]
    assert [len(prompt.answer) for prompt in side_by_side([session], Letters())] == [0, 0]


def test_missing_conversations_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="tau-bench"):
        next(conversations(tmp_path))


def test_what_is_no_conversation_is_named(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    with pytest.raises(DataFormatError, match="line 1"):
        next(conversations(tmp_path))
