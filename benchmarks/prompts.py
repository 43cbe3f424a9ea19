"""ShareGPT as the replays see it: prompts in order, as tokens and as text vectors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.data import Prompt, all_turns, first_turns, sharegpt
from benchmarks.result import Options
from benchmarks.vectors import text_vectors
from examples.demo.model import NAME, prepare_model
from kvshare_store.lookup.text import delimiter_ids
from kvshare_store.nodes.edits import Tokens

CONVERSATIONS, SHORT_CONVERSATIONS = 8_865, 600
"""The first so many of ShareGPT."""


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


def tokenizer_folder(options: Options) -> Path:
    """The model whose tokenizer counts: `--model` or the demo model."""
    return Path(options.model) if options.model else prepare_model()


def tokenizer_name(options: Options) -> str:
    """What results call that model."""
    return options.model or NAME


def tokenized(texts: Sequence[str], folder: Path) -> list[Tokens]:
    """Token ids of each text, int32, without a chat template or special tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.asarray(each.ids, np.int32) for each in encoded]


def delimiters_of(folder: Path) -> Collection[int]:
    """Token ids of line ends and turn markers, as the store finds them."""
    return delimiter_ids(str(folder))


def sharegpt_prompts(options: Options) -> tuple[Prompts, list[int]]:
    """Every human turn, and which of them begin a conversation."""
    count = options.size(CONVERSATIONS, SHORT_CONVERSATIONS)
    conversations = sharegpt(options.data, count)
    turns = all_turns(conversations)
    begin = {f"{prompt.id}#0" for prompt in first_turns(conversations)}
    firsts = [at for at, turn in enumerate(turns) if turn.id in begin]
    return _prompts(turns, tokenizer_folder(options)), firsts


def _prompts(prompts: Sequence[Prompt], folder: Path) -> Prompts:
    texts = [prompt.text for prompt in prompts]
    return Prompts(texts, tokenized(texts, folder), text_vectors(texts))
