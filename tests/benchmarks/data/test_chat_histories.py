"""Conversations as an engine receives them, and what a rewrite does to their histories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data.chat_histories import REWRITES, as_tokens, conversations, turns
from benchmarks.data.datasets import MissingDataError

RESULT = "a long result " * 40
RECORDED = [
    {"role": "system", "content": "The current time is 2024-05-15 15:00:00 EST."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"function": {"name": "look", "arguments": "{}"}, "id": "1"}]},
    {"role": "tool", "content": RESULT, "name": "look"},
    {"role": "assistant", "content": "Once more."},
    {"role": "tool", "content": RESULT, "name": "look"},
    {"role": "assistant", "content": "Done."},
]  # fmt: skip


class Letters:
    """A tokenizer with a token a letter."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def recorded(tmp_path: Path) -> list[dict[str, str]]:
    (tmp_path / "tau").mkdir()
    (tmp_path / "tau" / "airline.jsonl").write_text(json.dumps({"messages": RECORDED}) + "\n")
    (only,) = conversations(tmp_path)
    return only


def texts(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_every_answer_has_the_history_before_it(recorded: list[dict[str, str]]) -> None:
    assert [len(history) for history in turns(recorded)] == [2, 4, 6]
    assert '<tool_call>{"arguments": "{}", "name": "look"}</tool_call>' in texts(recorded)[2]
    encoded = as_tokens(turns(recorded)[1], Letters())
    assert as_tokens(turns(recorded)[2], Letters())[: len(encoded)] == encoded


def test_each_rewrite_changes_what_its_name_says(recorded: list[dict[str, str]]) -> None:
    last = turns(recorded)[-1]
    changed = {
        rewrite.name: [
            at
            for at, (old, new) in enumerate(
                zip(texts(last), texts(rewrite.apply(last, 3)), strict=True)
            )
            if old != new
        ]
        for rewrite in REWRITES
    }
    assert changed == {
        "as it is": [],
        "old tool results truncated": [3],
        "a date in the system prompt": [0],
    }


def test_missing_conversations_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="tau-bench"):
        next(conversations(tmp_path))
