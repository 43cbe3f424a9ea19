"""Recorded prompts: one a line, with answer, time and tenant where they are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

import msgspec

from kvshare_store.config import json_lines
from kvshare_store.errors import ConfigError, PlanError
from kvshare_store.nodes.edits import Tokens, as_tokens
from kvshare_store.simulate.traces import Tokenize

Object = dict[str, Any]
Render = Callable[[list[Object], list[Object] | None], str]
"""Messages, and the tools that they may call, as text, by the model's chat template."""


class Prompt(NamedTuple):
    """One recorded request."""

    tokens: Tokens
    answer: Tokens
    """Tokens that were generated; none where the line has no answer."""
    at: float | None
    """When it was sent, in seconds since any fixed moment; None if the line does not say."""
    tenant: str
    session: str

    @property
    def computed(self) -> Tokens:
        """The tokens that have rows when the request has ended. The last token of an answer has
        none: it was never an input."""
        if len(self.answer) < 2:
            return self.tokens
        return as_tokens([*self.tokens.tolist(), *self.answer[:-1].tolist()])


class _Line(msgspec.Struct):
    """What a line may hold; other fields are ignored."""

    messages: list[Object] | None = None
    tools: list[Object] | None = None
    prompt: str | None = None
    tokens: list[int] | None = None
    answer: str | None = None
    answer_tokens: list[int] | None = None
    at: float | None = None
    tenant: str = ""
    session: str = ""


class Reader(NamedTuple):
    """How lines become prompts."""

    tokenize: Tokenize | None = None
    render: Render | None = None
    answers: bool = True
    """False: answers are ignored."""
    timed: bool = False
    """Every line must say when it was sent."""

    def prompt(self, line: _Line) -> Prompt:
        """The prompt of a line; `ConfigError` or `PlanError` if it has none."""
        if line.tokens is None and line.prompt is None and line.messages is None:
            raise ConfigError("it has no `messages`, `prompt` or `tokens`")
        if line.at is None and self.timed:
            raise ConfigError("it has no `at`, which --settle needs")
        if line.at is not None and not math.isfinite(line.at):
            raise ConfigError("`at` is not a number of seconds")
        tokens = self._tokens(line.tokens, self._text(line))
        answer = self._tokens(line.answer_tokens, line.answer) if self.answers else _NONE
        return Prompt(tokens, answer, line.at, line.tenant, line.session)

    def _text(self, line: _Line) -> str | None:
        """Read only where there are no tokens."""
        if line.tokens is not None or line.prompt is not None or line.messages is None:
            return line.prompt
        if self.render is None:
            raise ConfigError("it has messages: name their model's folder with --tokenizer DIR")
        return self.render(line.messages, line.tools)

    def _tokens(self, ids: list[int] | None, text: str | None) -> Tokens:
        if ids is None and text:
            if self.tokenize is None:
                raise ConfigError("it has text: name its tokenizer with --tokenizer DIR")
            ids = list(self.tokenize(text))
        return as_tokens(ids) if ids else _NONE


def read_prompts(file: IO[bytes], reader: Reader) -> Iterator[Prompt]:
    """The prompts of a JSONL file (gzip or not), in its order.

    A line has `tokens`, or `prompt` as text, or `messages` (and `tools`); it may have
    `answer_tokens`, or `answer` as text, `at` in seconds, `tenant` and `session`. Where it has
    several, tokens count, then text. `ConfigError` names the line that is wrong.
    """
    for number, line in json_lines(file, _Line, "the prompts"):
        try:
            yield reader.prompt(line)
        except (ConfigError, PlanError) as error:
            raise ConfigError(f"the prompts cannot be read: line {number}: {error}") from error


def in_order(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Sorted by `at`, in the order of the file where times are equal. A prompt without `at` comes
    right after the one before it."""
    timed: list[tuple[float, Prompt]] = []
    for prompt in prompts:
        before = timed[-1][0] if timed else -math.inf
        timed.append((before if prompt.at is None else prompt.at, prompt))
    timed.sort(key=lambda entry: entry[0])
    return [prompt for _, prompt in timed]


_NONE = as_tokens(range(0))
