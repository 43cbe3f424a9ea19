"""The KV caches of all layers as one tensor, where vLLM allocated them together (CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WORD = torch.int64


class JoinedCaches(NamedTuple):
    """The caches of all layers as one.

    One operation replaces one for each layer. That matters on a busy machine, where each operation
    waits for all of PyTorch's threads.
    """

    cache: Tensor
    """`[blocks of all layers, H, N, 2 * D]`."""
    first_blocks: Tensor
    """int64 `[L]`: where the blocks of every layer begin."""

    def copy_blocks(self, ids: Tensor, copies: Tensor) -> None:
        """Copy these blocks of every layer to `copies` `[L, len(ids), H, N, 2 * D]`.

        By (block, head) and in wide words: for rows of 2**15 elements and more `index_select`
        splits every single row over the threads and waits for them.
        """
        heads = self.cache.shape[1]
        blocks = (self.first_blocks[:, None] + ids).flatten()
        wanted = (blocks[:, None] * heads + torch.arange(heads, device=ids.device)).flatten()
        matrix, out = (
            side.view(-1, side.shape[-2] * side.shape[-1]).view(_WORD)
            for side in (self.cache, copies)
        )
        torch.index_select(matrix, 0, wanted, out=out)


def join(caches: Sequence[Tensor]) -> JoinedCaches | None:
    """None unless the caches are dense parts of one allocation, as vLLM makes them for the CPU."""
    first = min(caches, key=Tensor.storage_offset)
    start, block = int(first.storage_offset()), first[0].numel()
    apart = [int(cache.storage_offset()) - start for cache in caches]
    if (
        not all(cache.is_contiguous() for cache in caches)
        or len({cache.untyped_storage().data_ptr() for cache in caches}) > 1
        or any(distance % block for distance in apart)
        or any(size * first.itemsize % _WORD.itemsize for size in (start, first[0, 0].numel()))
    ):
        return None
    blocks = max(apart) // block + len(first)
    cache = first.as_strided((blocks, *first.shape[1:]), first.stride())
    first_blocks = torch.tensor([distance // block for distance in apart], device=cache.device)
    return JoinedCaches(cache, first_blocks)
