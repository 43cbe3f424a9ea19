"""Conversations as an engine receives them: each turn sends the whole history again.

A history is sent as it is, or rewritten as agent frameworks rewrite it between turns. Messages
have a role and a text; calls of tools and thoughts are part of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, str]

_TRUNCATED_TO = 120
"""Length of a truncated tool result in characters."""
_TAIL = 5
"""Messages that compaction keeps, beside the system prompt."""
_QUOTED = 160
"""Characters of a message that a made thought repeats."""
_STEP_S = 37
"""Seconds from one request to the next, as the dated system prompt has it."""
_TIME = re.compile(r"\b\d{1,2}:\d\d(?::\d\d)?\b")
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


class Rewrite(NamedTuple):
    """How a framework changes a history before it sends it, at some second of the day."""

    name: str
    apply: Callable[[list[Message], int], list[Message]]


class Asked(NamedTuple):
    """One request."""

    conversation: int
    turn: int
    """From 1."""
    messages: list[Message]


def requests(
    conversations: Sequence[list[Message]], rewrite: Rewrite, most: int
) -> Iterator[Asked]:
    """The first `most` turns of each conversation, rewritten, in the order of sending: the first
    turn of all conversations, then the second of all, and so on."""
    clock = count(0, _STEP_S)
    histories = [turns(messages)[:most] for messages in conversations]
    for turn in range(most):
        for number, history in enumerate(histories):
            if turn < len(history):
                yield Asked(number, turn + 1, rewrite.apply(history[turn], next(clock)))


def turns(messages: Sequence[Message]) -> list[list[Message]]:
    """The history before each answer of the assistant."""
    return [
        list(messages[:at])
        for at, message in enumerate(messages)
        if message["role"] == "assistant" and at
    ]


# --- how histories are rewritten ------------------------------------------------------------------


def _as_it_is(messages: list[Message], second: int) -> list[Message]:
    return messages


def _dated(messages: list[Message], second: int) -> list[Message]:
    """The system prompt has the time of the request in it, which is never the same twice."""
    now = f"{15 + second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    system = messages[0]["content"]
    changed, found = _TIME.subn(now, system, count=1)
    return [_with(messages[0], changed if found else f"It is {now}.\n\n{system}"), *messages[1:]]


def _without_thoughts(messages: list[Message], second: int) -> list[Message]:
    """Every turn of the assistant but the latest one loses its thoughts."""
    thinking = with_thoughts(messages)
    spoken = [at for at, message in enumerate(thinking) if message["role"] == "assistant"]
    earlier = set(spoken[:-1])
    return [
        _with(message, _THOUGHT.sub("", message["content"])) if at in earlier else message
        for at, message in enumerate(thinking)
    ]


def _truncated(messages: list[Message], second: int) -> list[Message]:
    """All tool results but the last are cut short."""
    tools = [at for at, message in enumerate(messages) if message["role"] == "tool"]
    old = set(tools[:-1])
    return [
        _with(message, message["content"][:_TRUNCATED_TO]) if at in old else message
        for at, message in enumerate(messages)
    ]


def _compacted(messages: list[Message], second: int) -> list[Message]:
    """The oldest messages are deleted; no tool result stays without its call."""
    tail = messages[1:][-_TAIL:]
    while len(tail) > 1 and tail[0]["role"] == "tool":
        tail = tail[1:]
    return [messages[0], *tail]


REWRITES = (
    Rewrite("as it is", _as_it_is),
    Rewrite("a date in the system prompt", _dated),
    Rewrite("thoughts stripped", _without_thoughts),
    Rewrite("old tool results truncated", _truncated),
    Rewrite("compaction", _compacted),
)


def with_thoughts(messages: Sequence[Message]) -> list[Message]:
    """The history with thoughts in every turn of the assistant.

    Where a turn has none, they are made: what was said before it, two rules of the system prompt,
    and what follows. A turn's thoughts depend on nothing behind it, so they stay what they are.
    """
    rules = [line for line in messages[0]["content"].splitlines() if line.startswith("- ")]
    return [
        _with(message, _thought(messages[at - 1], message, rules, at) + message["content"])
        if message["role"] == "assistant" and at and "<think>" not in message["content"]
        else message
        for at, message in enumerate(messages)
    ]


def _thought(before: Message, answer: Message, rules: Sequence[str], at: int) -> str:
    words = [f"The {before['role']} says: {before['content'][:_QUOTED]}"]
    if rules:
        words.append("What the rules say about it:")
        words += [rules[(at + step) % len(rules)] for step in range(2)]
    words.append(f"So the next step is: {answer['content'][:_QUOTED]}")
    return "<think>\n" + "\n".join(words) + "\n</think>\n\n"


def _with(message: Message, content: str) -> Message:
    return {**message, "content": content}


# --- recorded conversations -----------------------------------------------------------------------


def recorded(path: Path) -> Iterator[list[Message]]:
    """Messages of each recorded conversation, roles and texts alone.

    Each line of the file is `{"messages": [...]}`, with messages as the OpenAI API has them.
    `ValueError` if a line is not.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield [_plain(message) for message in json.loads(line)["messages"]]
            except (ValueError, KeyError, TypeError) as error:
                expected = 'expected {"messages": [{"role": ..., "content": ...}, ...]}'
                raise ValueError(f"{path}, line {number}: {expected}") from error


def _plain(message: dict[str, Any]) -> Message:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    spoken = [message["content"]] if message["content"] else []
    asked = [f"<tool_call>{json.dumps(call, sort_keys=True)}</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join([*spoken, *asked])}
