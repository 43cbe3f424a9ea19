"""A transformers cache whose rows are written at their positions, in any order.

transformers' own caches append. Partial prefill needs more: the rows of a prompt are there already,
and a forward replaces those at scattered positions. Slot and position are the same number here, so
causality is one comparison, and prompts of different lengths share a batch without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvshare_store.tensors.layout import KVLayout


class RowCache(Cache):
    """K and V of a batch of prompts, one slot for each position.

    `rows`: `[layers, 2, batch, slots, kv_heads, head_dim]`, K post-RoPE; `rows[:, :, b]` has the
    store's canonical order. `update` writes to the slots that `aim` named last.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self._batch = torch.arange(rows.shape[2], device=rows.device)[:, None]
        self._at = self._batch[:, :0]
        self._stop = 0

    @classmethod
    def empty(
        cls, layout: KVLayout, slots: int, *, batch: int = 1, device: torch.device | str = "cpu"
    ) -> RowCache:
        """A cache of zeros. No query sees a slot before its row is computed."""
        layers, two, rows, heads, dim = layout.shape(slots)
        dtype = getattr(torch, layout.dtype)
        return cls(torch.zeros((layers, two, batch, rows, heads, dim), dtype=dtype, device=device))

    @property
    def slots(self) -> int:
        """Number of positions that the cache has room for."""
        return self.rows.shape[3]

    def aim(self, positions: Tensor) -> None:
        """Write the next rows of every layer to `positions`, int64 `[batch, new]`."""
        self._at = positions.to(self.rows.device)
        self._stop = int(positions.max()) + 1

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive causal mask `[batch, 1, new, seen]` of the rows aimed at."""
        slots = torch.arange(self._stop, device=self._at.device)
        hidden = slots > self._at[:, None, :, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=self._at.device).masked_fill_(
            hidden, torch.finfo(dtype).min
        )

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Write K and V `[batch, kv_heads, new, head_dim]`; returns those of all slots seen."""
        keys, values = self.rows[layer_idx]
        keys[self._batch, self._at] = key_states.transpose(1, 2)
        values[self._batch, self._at] = value_states.transpose(1, 2)
        return keys[:, : self._stop].transpose(1, 2), values[:, : self._stop].transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots that the rows aimed at can see."""
        return self._stop

    def __len__(self) -> int:
        return self.rows.shape[0]
