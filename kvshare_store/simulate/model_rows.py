"""How many bytes K and V of a token take, from the `config.json` of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvshare_store.errors import ConfigError
from kvshare_store.tensors.layout import KVLayout


def row_bytes_of(folder: Path) -> int:
    """Bytes of K and V of one token over all layers, in 16 bits a number, as vLLM keeps them unless
    it is told otherwise. `folder`: a model's, as on Hugging Face. `ConfigError` if it does not say
    how many heads have K and V."""
    path = folder / "config.json"
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--row-bytes: {path} cannot be read: {error}") from error
    text = found.get("text_config") or found
    if "kv_lora_rank" in text:
        raise ConfigError(f"--row-bytes: {path} is of a model without heads for K and V (MLA)")
    try:
        heads = text["num_attention_heads"]
        dim = text.get("head_dim") or text["hidden_size"] // heads
        kv_heads = text.get("num_key_value_heads") or heads
        return KVLayout(text["num_hidden_layers"], kv_heads, dim, "bfloat16").row_bytes
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"--row-bytes: {path} does not say {error}") from error
