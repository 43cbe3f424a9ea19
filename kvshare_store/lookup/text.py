"""Token ids as text: for text embeddings, for delimiters, for people."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from kvshare_store.nodes.edits import Tokens

log = logging.getLogger("kvshare")

_DELIMITERS = ("\n", "\n\n", "Ċ", "ĊĊ", "<0x0A>", "<|im_end|>", "<|im_start|>")


@functools.lru_cache(maxsize=16)
def _tokenizer(folder: str) -> Any | None:
    """The fast tokenizer in a model folder; None, and a warning, if there is none to be read."""
    path = Path(folder) / "tokenizer.json"
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - optional: `kvshare-store[semantic]`
    except ImportError:
        return None
    try:
        if not folder or not path.is_file():
            return None
    except (OSError, ValueError):  # a folder that may not be entered, or no path at all
        return None
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001 - what it raises for a file it cannot parse
        log.warning("kvshare: %s cannot be used, so prompts have no text: %s", path, error)
        return None


def decode(folder: str, tokens: Tokens) -> str | None:
    """The prompt as text, special tokens included, by the tokenizer in a folder; None without."""
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        return None
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    return text


def encode(folder: str, text: str) -> list[int] | None:
    """Text as token ids, without any that a tokenizer adds by itself; None without one."""
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        return None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@functools.lru_cache(maxsize=16)
def delimiter_ids(folder: str) -> frozenset[int]:
    """Token ids of line ends and turn markers, by the tokenizer in a folder; empty without one."""
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        return frozenset()
    ids = (tokenizer.token_to_id(text) for text in _DELIMITERS)
    return frozenset(token for token in ids if token is not None)
