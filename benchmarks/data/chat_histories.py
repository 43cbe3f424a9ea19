"""Recorded support conversations, and their histories as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data.datasets import DataFormatError, file_of, sharegpt
from examples.prompts.histories import Message, recorded, turns
from kvshare_store.simulate.prompts import Prompt

BEGIN_S, TURN_S = 5.0, 30.0
_PLAIN = {"add_special_tokens": False}


def conversations(data: Path) -> Iterator[list[Message]]:
    """The messages of each conversation of tau-bench.

    `MissingDataError` if the data set is not there, `DataFormatError` if it is another.
    """
    path = file_of(data, "tau", "airline.jsonl")
    try:
        yield from recorded(path)
    except ValueError as error:
        raise DataFormatError(path, str(error)) from error


def as_tokens(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Tokens of a history in ChatML, the small model's template, up to the start of the answer."""
    said = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    text = "".join([*said, "<|im_start|>assistant\n"])
    tokens: list[int] = tokenizer(text, **_PLAIN)["input_ids"]
    return tokens


class Sent(NamedTuple):
    """One request: the whole history, and the answer to it; empty if it was not recorded."""

    history: list[Message]
    answer: str


def supported(data: Path, count: int, most: int) -> list[list[Sent]]:
    """The first `most` requests of so many support conversations."""
    return [
        [Sent(history, messages[len(history)]["content"]) for history in turns(messages)[:most]]
        for messages in islice(conversations(data), count)
    ]


def talked(data: Path, count: int, most: int) -> list[list[Sent]]:
    """The same of ShareGPT's conversations of two turns and more. Answers were not recorded, so a
    history is what the person has said so far."""
    several = (each for each in sharegpt(data) if len(each.human) > 1)
    return [
        [
            Sent([{"role": "user", "content": text} for text in each.human[: at + 1]], "")
            for at in range(min(most, len(each.human)))
        ]
        for each in islice(several, count)
    ]


def side_by_side(sessions: Sequence[Sequence[Sent]], tokenizer: Any) -> list[Prompt]:
    """Requests for the replay, in the order of time: a conversation begins every `BEGIN_S` seconds,
    and its turns follow one another every `TURN_S`."""
    prompts = []
    for number, session in enumerate(sessions):
        for turn, (history, answer) in enumerate(session):
            text = f"{answer}<|im_end|>" if answer else ""
            ids = as_tokens(history, tokenizer), tokenizer(text, **_PLAIN)["input_ids"]
            tokens, answered = (np.asarray(each, np.int32) for each in ids)
            at = BEGIN_S * number + TURN_S * turn
            prompts.append(Prompt(tokens, answered, at, "", str(number)))
    return sorted(prompts, key=lambda prompt: prompt.at or 0.0)
