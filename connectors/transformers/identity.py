"""From a loaded model to a namespace: everything that must be equal before rows are shared."""

from __future__ import annotations

import json

import blake3
import torch
from kvshare_connectors.transformers.capability import layout_of, rope_parameters
from kvshare_connectors.transformers.types import Model

from kvshare_store.namespace import Namespace

_ELEMENTS = 1 << 16
"""Evenly spaced samples of each weight: training and merging change weights everywhere."""
ENGINE = "transformers"


def namespace_of(model: Model, tokenizer: str = "") -> Namespace:
    """The namespace of a loaded model, for no tenant.

    The engine is part of it: rows that vLLM computed differ from these in their last bits, and
    exact prefixes must be equal bit for bit.
    """
    return Namespace(
        model=model.config.name_or_path or type(model).__name__,
        revision=fingerprint(model),
        layout=layout_of(model),
        rope=json.dumps(rope_parameters(model.config), sort_keys=True, default=str),
        ranks=ENGINE,
        tokenizer=tokenizer,
    )


def fingerprint(model: Model) -> str:
    """Names, shapes and contents of the weights as they are loaded, adapters included."""
    hasher = blake3.blake3(repr(type(model)).encode())
    for name, weight in sorted(model.state_dict().items()):
        hasher.update(f"{name}:{list(weight.shape)}:{weight.dtype}:".encode())
        flat = weight.detach().flatten()
        sample = flat[:: max(1, -(-flat.numel() // _ELEMENTS))].contiguous().cpu()
        hasher.update(sample.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest(length=16)
