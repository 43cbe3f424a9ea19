"""Which Hugging Face models KVShare serves, the layout of their rows, and their rotary table.

Reuse moves K between positions and computes runs of a prompt out of order. Both are right only if
every layer is causal attention over all earlier tokens and turns its K by one table that depends
on the position alone. What is not known to be so is declined, with the reasons that the vLLM
connector gives.
"""

from __future__ import annotations

from typing import Any

import torch
from kvshare_connectors.transformers.types import Config, Model

from kvshare_store.errors import UnsupportedError
from kvshare_store.tensors.dtypes import NAMES
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.tensors.rope import Rope

MODEL_TYPES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
    }
)
"""Model types whose code in transformers was read: every attention layer rotates its K by the one
rotary module of the model, hands it to the cache, and uses a 4-dimensional mask unchanged."""

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Scalings whose table depends on the position alone."""


def decline_reason(config: Config) -> str | None:
    """Why KVShare does not serve a model of this configuration, as a stable code, or None.

    Gemma 2 and 3 are served if all their layers attend globally: with windows, the rows that a run
    must recompute would differ by layer.
    """
    if config.model_type not in MODEL_TYPES:
        return "architecture_unlisted"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and _window(config)):
        return (
            "sliding_window" if "sliding_attention" in kinds or not kinds else "attention_unknown"
        )
    if getattr(config, "use_bidirectional_attention", False):
        return "bidirectional"
    parameters = rope_parameters(config)
    if not parameters:
        return "rope_missing"
    if parameters.get("rope_type", "default") not in ROPE_TYPES:
        return "rope_unknown"
    return None


def rope_parameters(config: Config) -> dict[str, Any]:
    """The rotary parameters of the layers; Gemma 3 has them per kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = found.get("full_attention")
    return dict(nested if isinstance(nested, dict) else found)


def _window(config: Config) -> bool:
    return bool(getattr(config, "sliding_window", None)) and getattr(
        config, "use_sliding_window", True
    )


def layout_of(model: Model) -> KVLayout:
    """The rows of a model. `UnsupportedError` for dtypes that the store does not hold."""
    config = model.config
    heads = config.num_attention_heads
    dtype = NAMES.get(model.dtype)
    if dtype is None:
        raise UnsupportedError(f"KVShare does not store rows of {model.dtype}")
    return KVLayout(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )


def rope_of(model: Model) -> Rope:
    """The cos/sin table of a model, from its own rotary module and in its own dtype."""
    config = model.config
    positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
    like = torch.zeros(1, dtype=model.dtype, device=model.device)
    kind = ("full_attention",) if "full_attention" in (config.rope_parameters or {}) else ()
    with torch.inference_mode():
        cos, sin = model.model.rotary_emb(like, positions, *kind)
    half = cos.shape[-1] // 2  # every angle twice: one for each half of a head
    return Rope(cos[0, :, :half].cpu(), sin[0, :, :half].cpu(), neox=True)
