"""The canonical order of rows: `[layer, K|V, token, kv_head, head_dim]`, K post-RoPE."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from kvshare_store.errors import ConfigError, NamespaceError

DTypeName = Literal["float32", "float16", "bfloat16"]
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and dtype of the rows of one model; independent of engine, device and block size."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: DTypeName

    def __post_init__(self) -> None:
        if min(self.layers, self.kv_heads, self.head_dim) < 1:
            raise ConfigError(f"a KV layout needs positive sizes, got {self}")
        if self.dtype not in _ITEMSIZE:
            raise ConfigError(f"KV dtype {self.dtype!r} is not one of {sorted(_ITEMSIZE)}")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.itemsize

    def shape(self, rows: int) -> tuple[int, int, int, int, int]:
        """Canonical shape of `rows` rows."""
        return (self.layers, 2, rows, self.kv_heads, self.head_dim)

    def rows_in(self, nbytes: int) -> int:
        """How many rows `nbytes` bytes hold; `NamespaceError` if not a whole number."""
        rows, rest = divmod(nbytes, self.row_bytes)
        if rest or rows == 0:
            raise NamespaceError(
                f"{nbytes} bytes are not a whole number of rows of {self.row_bytes} bytes"
            )
        return rows

    def words(self, buffer: Any, rows: int) -> np.ndarray:
        """View a buffer as canonical rows of unsigned words (numpy has no bfloat16).

        `buffer`: `rows * row_bytes` bytes. Returns uint16 or uint32, shape `self.shape(rows)`.
        """
        dtype = np.uint32 if self.itemsize == 4 else np.uint16
        return np.frombuffer(buffer, dtype).reshape(self.shape(rows))
