"""The methods that quality measurements compare, and the engine around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.identity import namespace_of

from benchmarks.data.chat_prompts import Chat
from benchmarks.harness.models import model_folder, model_name
from benchmarks.harness.result import Options
from benchmarks.methods.base import Method, Prefilled
from benchmarks.methods.cacheblend import cacheblend, dhd
from benchmarks.methods.epic import Epic
from benchmarks.methods.kvshare import kvshare, prefix
from kvshare_store.cli.progress import progress
from kvshare_store.lookup.text import delimiter_ids

FULL, NOISE, BF16 = "full", "full, in two chunks", "full, in bf16"
"""Full compute, which is the reference, and the two noise floors."""


class Arm:
    """The answers of one method with one kind of donors."""

    def __init__(self, method: str, donors: str, size: int) -> None:
        self.method = method
        self.donors = donors
        self.answers = [""] * size
        self.reused = [0] * size
        """Rows of each prompt that came from donors."""

    def take(self, index: int, prefilled: Prefilled, answer: str) -> None:
        """Note the answer to one prompt."""
        self.answers[index] = answer
        self.reused[index] = prefilled.reused


def engine_for(options: Options, dtype: torch.dtype = torch.float32) -> tuple[RowEngine, Chat, str]:
    """The engine, the tokenizer and the name of the model that the options ask for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(model_folder(options))
    return RowEngine.load(folder, dtype), Chat(folder), model_name(options)


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """What to call with a number of steps once they are done; it is reported how many are."""
    with progress() as shown:
        task = shown.add_task(title, total=total)
        yield lambda done: shown.advance(task, done)


def lineup(engine: RowEngine, *, short: bool = False) -> list[Method]:
    """The methods of every table, ours first; the short form has one other method."""
    if short:
        return [*presets(engine), cacheblend(0.15)]
    return [
        *presets(engine),
        *(cacheblend(share) for share in (0.05, 0.15, 0.30)),
        Epic(16),
        dhd(0.15),
    ]


def presets(engine: RowEngine) -> list[Method]:
    """Prefix caching and our presets, from the strictest on."""
    delimiters = delimiters_of(engine)
    names = ("faithful", "balanced", "aggressive")
    return [prefix(), *(kvshare(name, delimiters) for name in names)]


def delimiters_of(engine: RowEngine) -> frozenset[int]:
    """The tokens that the policies' `delimiters` is about, as the store finds them."""
    folder = str(engine.model.config.name_or_path)
    return delimiter_ids(namespace_of(engine.model, folder).tokenizer)
