"""Token ids as text: for text embeddings, for delimiters, for people."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from kvshare_store.namespace import Namespace
from kvshare_store.tree.edits import Tokens

_DELIMITERS = ("\n", "\n\n", "Ċ", "ĊĊ", "<0x0A>", "<|im_end|>", "<|im_start|>")


@functools.lru_cache(maxsize=16)
def _tokenizer(folder: str) -> Any | None:
    """The fast tokenizer in a model folder, or None when there is none or no library for it."""
    path = Path(folder) / "tokenizer.json"
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - optional: `kvshare-store[semantic]`
    except ImportError:
        return None
    return Tokenizer.from_file(str(path)) if folder and path.is_file() else None


def decode(namespace: Namespace, tokens: Tokens) -> str | None:
    """The prompt as text, special tokens included, or None without a tokenizer."""
    tokenizer = _tokenizer(namespace.tokenizer)
    if tokenizer is None:
        return None
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    return text


@functools.lru_cache(maxsize=64)
def delimiter_ids(namespace: Namespace) -> frozenset[int]:
    """Token ids of line ends and turn markers; empty without a tokenizer."""
    tokenizer = _tokenizer(namespace.tokenizer)
    if tokenizer is None:
        return frozenset()
    ids = (tokenizer.token_to_id(text) for text in _DELIMITERS)
    return frozenset(token for token in ids if token is not None)
