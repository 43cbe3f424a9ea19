"""The layout inside a block of vLLM's paged KV cache; no other module knows it.

Every backend served here gives a layer a view `[blocks, kv_heads, block_size, 2 * head_dim]`. How
K and V lie in it differs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from kvshare_connectors.vllm.types import AttentionLayer
from torch import Tensor

from kvshare_store.errors import UnsupportedError


class Format(Protocol):
    """How K and V lie in the `[kv_heads, block_size, 2 * head_dim]` elements of a block.

    `blocks`: `[B, H, N, 2 * D]`. Both methods return a view of the same memory in tiles of n tokens
    by d elements: `[B, N/n, n, H, D/d, d]`, n dividing 16. Its dtype may be a wider word.
    """

    def keys(self, blocks: Tensor) -> Tensor: ...

    def values(self, blocks: Tensor) -> Tensor: ...


class LogicalFormat:
    """Accelerator backends: K and V of a token side by side, `[H, N, K | V]`.

    Source: `do_kv_cache_update` of vllm/v1/attention/backends/{flash_attn, triton_attn,
    flashinfer, flex_attention}.py. Only strides differ between vLLM's cache layouts.
    """

    def keys(self, blocks: Tensor) -> Tensor:
        return blocks.chunk(2, dim=-1)[0].transpose(1, 2)[:, :, None, :, :, None]

    def values(self, blocks: Tensor) -> Tensor:
        return blocks.chunk(2, dim=-1)[1].transpose(1, 2)[:, :, None, :, :, None]


class VecFormat:
    """CPU, `isa` "vec" and "vec16": of every (block, head), K as `[D, N]`, then V as `[N, D]`.

    Source: csrc/cpu/cpu_attn_vec.hpp, cpu_attn_vec16.hpp (`reshape_and_cache`).
    """

    def keys(self, blocks: Tensor) -> Tensor:
        count, heads, tokens, width = blocks.shape
        stored = blocks.flatten(2).chunk(2, dim=-1)[0].view(count, heads, width // 2, tokens)
        return stored.permute(0, 3, 1, 2)[:, :, None, :, :, None]

    def values(self, blocks: Tensor) -> Tensor:
        count, heads, tokens, width = blocks.shape
        stored = blocks.flatten(2).chunk(2, dim=-1)[1].view(count, heads, tokens, width // 2)
        return stored.transpose(1, 2)[:, :, None, :, :, None]


class AmxFormat:
    """CPU, `isa` "amx" (bf16): tiles for the AMX unit.

    Of every (block, head), K as `[N/16, D/2, 16 tokens, 2 dims]`, then V as
    `[D/16, N/2, 16 dims, 2 tokens]`. Source: csrc/cpu/cpu_attn_amx.hpp (`reshape_and_cache`).
    """

    def keys(self, blocks: Tensor) -> Tensor:
        count, heads, tokens, width = blocks.shape
        # The two dims of a pair stay together, so they move as one 32-bit word.
        words = blocks.flatten(2).chunk(2, dim=-1)[0].view(torch.int32)
        stored = words.view(count, heads, tokens // 16, width // 4, 16)
        return stored.permute(0, 2, 4, 1, 3)[..., None]

    def values(self, blocks: Tensor) -> Tensor:
        count, heads, tokens, width = blocks.shape
        stored = blocks.flatten(2).chunk(2, dim=-1)[1]
        tiles = stored.view(count, heads, width // 32, tokens // 2, 16, 2)
        return tiles.permute(0, 3, 5, 1, 2, 4)


_CPU_FORMATS: dict[str, type[Format]] = {
    "vec": VecFormat,
    "vec16": VecFormat,
    "amx": AmxFormat,
}
_LOGICAL_BACKENDS = frozenset({"FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "FLEX_ATTENTION"})


def format_of(name: str, layer: AttentionLayer) -> Format:
    """The format of one attention layer; `UnsupportedError` if it is not one listed here."""
    backend = layer.attn_backend.get_name()
    if backend in _LOGICAL_BACKENDS:
        return LogicalFormat()
    isa = getattr(layer, "isa", None)
    if backend != "CPU_ATTN" or isa not in _CPU_FORMATS:
        kernel = f"{backend}, isa {isa}" if isa else backend
        raise UnsupportedError(f"{name}: KVShare does not know the KV layout of {kernel}")
    return _CPU_FORMATS[isa]()
