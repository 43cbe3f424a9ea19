"""Long conversations with tools, and requests that rewrite them in known ways.

Texts are real (tau: answers, calls and tool results; ShareGPT: what people say and think aloud);
their order is drawn. A token is a word or a sign of the text, so no model's tokenizer is needed.
Where each token of a request comes from is known, because the request is built that way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.data.chat_histories import conversations
from benchmarks.data.datasets import sharegpt
from kvshare_store.nodes.edits import Tokens

_WORD = re.compile(r"\w+|[^\w\s]|\s+")
_FIRST_TOKEN = 10
_THOUGHT, _SAID = (30, 200), (10, 300)
"""Least and most tokens of a thought, and of what a person says beside the recorded words."""
_SUMMARY, _NEWS = 250, 150
"""Tokens of a summary that stands for what was deleted, and of a new turn."""
_DATE_AT, _DATE = 60, 8


class Message(NamedTuple):
    """One message; `thought` is what an agent thinks before it answers."""

    role: str
    thought: Tokens
    text: Tokens


class Piece(NamedTuple):
    """A part of a prompt. `source`: where it stands in the stored prompt; -1: it is new."""

    tokens: Tokens
    source: int = -1


class Request(NamedTuple):
    """A prompt, and of each position the position in the stored prompt (-1: none)."""

    tokens: Tokens
    source_of: npt.NDArray[np.int64]


class Texts:
    """Endless real text, in tokens."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._ids: dict[str, int] = {}

    def tokens(self, text: str) -> Tokens:
        """A number for each word and sign, in the order in which they were first seen."""
        ids = self._ids
        words = _WORD.findall(text)
        return np.asarray([ids.setdefault(word, len(ids) + _FIRST_TOKEN) for word in words],
                          np.int32)  # fmt: skip

    @cached_property
    def system(self) -> Tokens:
        """The system prompt of the recorded conversations."""
        return self.tokens(next(iter(conversations(self._data)))[0]["content"])

    @cached_property
    def spoken(self) -> Tokens:
        """What people said, one behind the other."""
        return self.tokens(
            "\n".join(t for each in sharegpt(self._data)[:3_000] for t in each.human)
        )

    @cached_property
    def recorded(self) -> list[tuple[str, Tokens]]:
        """Roles and words of the recorded messages."""
        return [
            (message["role"], self.tokens(message["content"]))
            for messages in conversations(self._data)
            for message in messages[1:]
        ]


class History:
    """A conversation of about `length` tokens: a system prompt, then messages."""

    def __init__(self, texts: Texts, length: int, seed: int) -> None:
        self.draw = np.random.default_rng((length, seed))
        self._texts = texts
        self.system = texts.system[: length // 4]
        self.messages: list[Message] = []
        at = int(self.draw.integers(len(texts.recorded)))
        size = len(self.system)
        while size < length:
            role, text = texts.recorded[at % len(texts.recorded)]
            message = self._message(role, text)
            self.messages.append(message)
            size += len(message.thought) + len(message.text)
            at += 1

    def _message(self, role: str, text: Tokens) -> Message:
        if role == "assistant":
            return Message(role, self.fresh(int(self.draw.integers(*_THOUGHT))), text)
        said = self.fresh(int(self.draw.integers(*_SAID))) if role == "user" else text[:0]
        return Message(role, text[:0], np.concatenate((text, said)))

    def fresh(self, count: int) -> Tokens:
        """Some text from anywhere."""
        at = int(self.draw.integers(len(self._texts.spoken) - count))
        return self._texts.spoken[at : at + count]

    def pieces(self) -> list[list[Piece]]:
        """The system prompt, then each message as its thought and its text."""
        at = len(self.system)
        parts = [[Piece(self.system, 0)]]
        for message in self.messages:
            thought = Piece(message.thought, at)
            text = Piece(message.text, at + len(message.thought))
            parts.append([thought, text])
            at += len(message.thought) + len(message.text)
        return parts

    def tokens(self, messages: int | None = None) -> Tokens:
        """The whole prompt, or its beginning with so many messages."""
        said = self.messages[:messages]
        return np.concatenate([self.system, *(part for m in said for part in (m.thought, m.text))])


def _joined(pieces: Iterable[Piece]) -> Request:
    parts = list(pieces)
    sources = [
        np.arange(len(p.tokens)) + p.source if p.source >= 0 else np.full(len(p.tokens), -1)
        for p in parts
    ]
    return Request(np.concatenate([p.tokens for p in parts]), np.concatenate(sources))


def _flat(parts: Sequence[Sequence[Piece]]) -> Iterator[Piece]:
    return (piece for part in parts for piece in part)


def _appended(history: History) -> Request:
    return _joined([*_flat(history.pieces()), Piece(history.fresh(_NEWS))])


def _compacted(history: History) -> Request:
    system, *said = history.pieces()
    tail = _flat(said[len(said) // 2 :])
    return _joined([*system, Piece(history.fresh(_SUMMARY)), *tail, Piece(history.fresh(_NEWS))])


def _tool_replaced(history: History) -> Request:
    parts = history.pieces()
    tools = [at for at, message in enumerate(history.messages, 1) if message.role == "tool"]
    at = int(history.draw.choice(tools or [len(parts) // 2]))
    other = Piece(history.fresh(max(20, len(parts[at][1].tokens))))
    return _joined([*_flat([*parts[:at], [other], *parts[at + 1 :]]), Piece(history.fresh(_NEWS))])


def _without_thoughts(history: History) -> Request:
    system, *said = history.pieces()
    return _joined([*system, *(text for _, text in said), Piece(history.fresh(_NEWS))])


def _reordered(history: History) -> Request:
    system, *said = history.pieces()
    order = history.draw.permutation(len(said)).tolist()
    return _joined([*system, *_flat([said[at] for at in order]), Piece(history.fresh(_NEWS))])


def _other_agent(history: History) -> Request:
    system, *said = history.pieces()
    prompt = Piece(history.fresh(len(system[0].tokens)))
    return _joined([prompt, *_flat(said), Piece(history.fresh(_NEWS))])


def _dated(history: History) -> Request:
    system, *said = history.pieces()
    tokens = system[0].tokens
    new = [
        Piece(tokens[:_DATE_AT], 0),
        Piece(history.fresh(_DATE)),
        Piece(tokens[_DATE_AT + _DATE :], _DATE_AT + _DATE),
    ]
    return _joined([*new, *_flat(said), Piece(history.fresh(_NEWS))])


REWRITES: dict[str, Callable[[History], Request]] = {
    "appended": _appended,
    "front deleted, tail kept": _compacted,
    "one tool result replaced": _tool_replaced,
    "thoughts stripped": _without_thoughts,
    "messages re-ordered": _reordered,
    "another agent's prompt around it": _other_agent,
    "a date near the start": _dated,
}
