"""ShareGPT prompts in recorded order, as text, tokens and text vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.data.datasets import Prompt, all_turns, first_turns, sharegpt
from benchmarks.data.text_vectors import text_vectors
from benchmarks.harness.models import model_folder, tokenized
from benchmarks.harness.result import Options
from kvshare_store.nodes.edits import Tokens

CONVERSATIONS, SHORT_CONVERSATIONS = 8_865, 600
"""How many conversations of ShareGPT are read."""


class Prompts(NamedTuple):
    """Prompts in the order in which they were recorded."""

    texts: list[str]
    tokens: list[Tokens]
    vectors: npt.NDArray[np.float32]
    """float32 [prompts, 384]."""

    def only(self, which: Sequence[int]) -> Prompts:
        """Some of the prompts, in the order given."""
        texts = [self.texts[at] for at in which]
        return Prompts(texts, [self.tokens[at] for at in which], self.vectors[list(which)])


def sharegpt_prompts(options: Options) -> tuple[Prompts, list[int]]:
    """Every human turn, and which of them begin a conversation."""
    count = options.size(CONVERSATIONS, SHORT_CONVERSATIONS)
    conversations = sharegpt(options.data, count)
    turns = all_turns(conversations)
    begin = {f"{prompt.id}#0" for prompt in first_turns(conversations)}
    firsts = [at for at, turn in enumerate(turns) if turn.id in begin]
    return _prompts(turns, model_folder(options)), firsts


def _prompts(prompts: Sequence[Prompt], folder: Path) -> Prompts:
    texts = [prompt.text for prompt in prompts]
    return Prompts(texts, tokenized(texts, folder), text_vectors(texts))
