"""Attention for models whose query heads share K and V, without copying K and V.

transformers' own function for `sdpa` repeats K and V for every query head when a mask is given.
While decoding, that copy costs several times what attention does. Here the query heads of a group
stand one below the other as more queries of the same head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvshare_connectors.transformers.types import Model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "kvshare_grouped"
_FEW = 128
"""Queries up to which the mask, which is repeated instead, stays small beside K and V."""


def grouped_attention(
    module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In transformers' attention interface: `query` `[batch, heads, new, dim]`, `key` and `value`
    `[batch, kv_heads, seen, dim]`, additive mask `[batch, 1, new, seen]`.

    Returns `[batch, new, heads, dim]`.
    """
    batch, heads, new, dim = query.shape
    kv_heads = key.shape[1]
    if attention_mask is None or heads == kv_heads or new > _FEW:
        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found, None
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * new, dim)
    mask = attention_mask.repeat(1, 1, group, 1)
    found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(batch, heads, new, dim).transpose(1, 2).contiguous(), None


@contextmanager
def attending(model: Model, name: str) -> Iterator[None]:
    """Let a model that uses `sdpa` attention use a registered function instead, inside the
    context."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
