"""Rows of a paged cache, as tests read them and as an accelerator backend writes them."""

from __future__ import annotations

import torch
from kvshare_connectors.vllm.paged_cache import PagedCache
from torch import Tensor


def rows_at(cache: PagedCache, slots: Tensor) -> Tensor:
    """Canonical rows `[L, 2, T, H, D]` of the tokens in `slots` (int64 `[T]`), copied."""
    used, index = torch.unique(slots // cache.block_size, return_inverse=True)
    with cache.snapshot(used.tolist()) as raw:
        return raw.rows(index * cache.block_size + slots % cache.block_size)


def write_logical(cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """What the backends of `LogicalFormat` write: `[T, H, D]` each, slots -1 skipped."""
    kept = slots >= 0
    block, offset = slots[kept] // cache.shape[2], slots[kept] % cache.shape[2]
    cache[block, :, offset] = torch.cat([keys[kept], values[kept]], dim=-1)
