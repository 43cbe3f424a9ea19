"""Recorded support conversations, and their histories as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data.datasets import DataFormatError, file_of
from examples.prompts.histories import Message, recorded


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
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
