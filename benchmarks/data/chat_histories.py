"""Support conversations as an engine receives them: each turn sends the whole history.

A history is sent unchanged, or rewritten as agent frameworks rewrite it between turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.data.datasets import file_of, lines

Message = dict[str, str]

_TRUNCATED_TO = 120
"""Length of a truncated tool result in characters."""
_RECENT = 1
"""How many of the latest tool results are kept in full."""


class Rewrite(NamedTuple):
    """How a framework changes the history before it sends turn `turn`."""

    name: str
    apply: Callable[[list[Message], int], list[Message]]


def _as_it_is(messages: list[Message], turn: int) -> list[Message]:
    return messages


def _dated(messages: list[Message], turn: int) -> list[Message]:
    """The system prompt has the time of the turn in it."""
    system = messages[0]["content"]
    changed = system.replace("15:00:00 EST", f"15:{turn:02d}:00 EST", 1)
    return [{"role": "system", "content": changed}, *messages[1:]]


def _truncated(messages: list[Message], turn: int) -> list[Message]:
    """All tool results but the last are cut short."""
    tools = [at for at, message in enumerate(messages) if message["role"] == "tool"]
    old = set(tools[:-_RECENT])
    return [
        {**message, "content": message["content"][:_TRUNCATED_TO]} if at in old else message
        for at, message in enumerate(messages)
    ]


REWRITES = (
    Rewrite("as it is", _as_it_is),
    Rewrite("old tool results truncated", _truncated),
    Rewrite("a date in the system prompt", _dated),
)


def conversations(data: Path) -> Iterator[list[Message]]:
    """Messages of each recorded conversation, roles and texts alone.

    `MissingDataError` if the data set is not there.
    """
    for row in lines(file_of(data, "tau", "airline.jsonl")):
        yield [_plain(message) for message in row["messages"]]


def _plain(message: dict[str, Any]) -> Message:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    spoken = [message["content"]] if message["content"] else []
    asked = [f"<tool_call>{json.dumps(call, sort_keys=True)}</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join([*spoken, *asked])}


def turns(messages: Sequence[Message]) -> list[list[Message]]:
    """The history before each answer of the assistant."""
    return [
        list(messages[:at])
        for at, message in enumerate(messages)
        if message["role"] == "assistant" and at
    ]


def as_tokens(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Tokens of a history in ChatML, the small model's template, up to the start of the answer."""
    said = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    text = "".join([*said, "<|im_start|>assistant\n"])
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
