"""Recorded conversations, and histories as tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data.chat_histories import as_tokens, conversations
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


def test_missing_conversations_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="tau-bench"):
        next(conversations(tmp_path))


def test_what_is_no_conversation_is_named(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    with pytest.raises(DataFormatError, match="line 1"):
        next(conversations(tmp_path))
