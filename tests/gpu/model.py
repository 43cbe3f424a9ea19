"""A paged cache on a GPU, laid out as vLLM lays it out, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from kvshare_connectors.vllm.paged_cache import PagedCache
from torch import Tensor

from tests.support.paged import write_logical

DEVICE = torch.device("cuda:0")
LAYERS, HEADS, HEAD_DIM = 8, 8, 128

ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
}
"""Where the axes layer, block, head, token and K|V lie in memory; HND is LBHNC, NHD is LBNHC."""


def write(_: Any, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    """What a backend's `do_kv_cache_update` does."""
    write_logical(cache, keys, values, slots)


def paged_cache(
    order: str = "LBHNC",
    *,
    blocks: int = 256,
    kernel_block: int = 16,
    block_size: int = 16,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.bfloat16,
) -> PagedCache:
    """`blocks` scheduled blocks of random rows, by way of `PagedCache.from_context`."""
    shape = (layers, blocks * block_size // kernel_block, HEADS, kernel_block, 2 * HEAD_DIM)
    axes = ORDERS[order]
    memory = torch.randn([shape[axis] for axis in axes], device=DEVICE).to(dtype)
    views = memory.permute([axes.index(axis) for axis in range(len(axes))])
    context = {f"model.layers.{index}.attn": layer(view) for index, view in enumerate(views)}
    found = {name: built.kv_cache for name, built in context.items()}
    return PagedCache.from_context(context, found, block_size=block_size, blocks=blocks)


def layer(view: Tensor) -> Any:
    """The parts of an attention layer that the paged cache reads."""
    return SimpleNamespace(
        kv_cache=view,
        head_size=HEAD_DIM,
        num_kv_heads=HEADS,
        sliding_window=None,
        kv_sharing_target_layer_name=None,
        attn_type="decoder",
        attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
        impl=SimpleNamespace(do_kv_cache_update=write),
    )
