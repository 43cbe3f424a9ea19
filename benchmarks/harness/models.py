"""The model that a run uses, its tokenizer, and texts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.result import Options
from examples.engines.small_model import NAME, prepare_model
from kvshare_store.nodes.edits import Tokens


def model_folder(options: Options) -> Path:
    """`--model`, or the small model of the examples, which is prepared first if it is missing."""
    return Path(options.model) if options.model else prepare_model()


def model_name(options: Options) -> str:
    """The name of that model in results."""
    return Path(options.model).name if options.model else NAME


def tokenizer_of(options: Options) -> Any:
    """The tokenizer of that model, as transformers has it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(options))


def tokenized(texts: Sequence[str], folder: Path) -> list[Tokens]:
    """Token ids of each text, int32, without a chat template or special tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.asarray(each.ids, np.int32) for each in encoded]
