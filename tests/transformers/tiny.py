"""Tiny models with random weights: one of each family, made in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
import transformers

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FULL = {"layer_types": ["full_attention"] * 3, "sliding_window": None}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"rope_parameters": LLAMA3},
    "Qwen2Config": {"use_sliding_window": False},
    "Qwen3Config": {"use_sliding_window": False},
    "MistralConfig": {"sliding_window": None},
    "GemmaConfig": {},
    "Gemma2Config": FULL,
    "Gemma3TextConfig": FULL,
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of a family with random weights, the same at every call."""
    config = getattr(transformers, family)(**(TINY | FAMILIES[family] | changes))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (length,), generator=generator).tolist()
