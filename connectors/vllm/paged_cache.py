"""Reads and writes rows of vLLM's paged KV cache, over all layers of a model.

A slot is `block_id * block_size + offset`. `paged_formats` knows what lies inside a block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

import torch
from kvshare_connectors.vllm.joined_caches import JoinedCaches, join
from kvshare_connectors.vllm.paged_formats import Format, format_of
from kvshare_connectors.vllm.raw_blocks import RawBlocks, SpareBuffers, check_range
from kvshare_connectors.vllm.snapshots import Copied, SnapshotRing
from kvshare_connectors.vllm.types import AttentionLayer
from torch import Tensor

from kvshare_store.errors import NamespaceError, UnsupportedError
from kvshare_store.tensors.dtypes import NAMES
from kvshare_store.tensors.layout import KVLayout

_SPARE_BYTES = 256 << 20


class PagedCache:
    """The paged KV cache of all attention layers of a model, addressed by slots and block ids.

    Build it with `from_context`. `write` and `snapshot` belong on the engine's thread, between
    its forward passes; what `snapshot` returns may be unpacked anywhere, at any time.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        form: Format,
        *,
        block_size: int | None = None,
        spare_bytes: int = _SPARE_BYTES,
        ring: SnapshotRing | None = None,
    ) -> None:
        self.layers = list(layers)
        self._format = form
        cache = self.layers[0].kv_cache
        blocks, heads, self._kernel_block_size, width = cache.shape
        self.layout = KVLayout(len(self.layers), heads, width // 2, NAMES[cache.dtype])
        self.device = cache.device
        self.slots = blocks * self._kernel_block_size
        self.block_size = block_size or self._kernel_block_size
        if self.block_size % self._kernel_block_size:
            raise UnsupportedError(
                f"blocks of {self.block_size} tokens are not made of whole kernel blocks of"
                f" {self._kernel_block_size}"
            )
        self._joined = join([layer.kv_cache for layer in self.layers])
        if ring is None and self.device.type != "cpu":
            ring = SnapshotRing(self.device)
        self._ring = ring
        self.spare = SpareBuffers(spare_bytes, pinned=self.device.type != "cpu")

    @classmethod
    def from_context(
        cls,
        static_forward_context: dict[str, Any],
        kv_caches: dict[str, Tensor],
        *,
        block_size: int | None = None,
        blocks: int | None = None,
        spare_bytes: int = _SPARE_BYTES,
    ) -> Self:
        """From vLLM's attention layers, once their caches are bound (`register_kv_caches`).

        `static_forward_context`: layer name → attention layer, of the compilation config.
        `kv_caches`: what vLLM registered; only its names are used, the tensors are taken from
        the layers. `block_size`: tokens of a scheduler block, where a backend's kernel blocks
        are smaller; `blocks`: how many of them there are. `spare_bytes`: snapshot buffers kept
        between snapshots, in bytes.

        Raises `UnsupportedError` for a layout or an attention KVShare does not serve.
        """
        names = sorted(kv_caches, key=_layer_index)
        if not names:
            raise UnsupportedError("the model has no KV cache")
        if len({_layer_index(name) for name in names}) < len(names):
            raise UnsupportedError(f"a layer has several KV caches: {names}")
        layers: list[AttentionLayer] = []
        for name in names:
            layer = static_forward_context.get(name)
            if layer is None:
                raise UnsupportedError(f"{name} has a KV cache but is no attention layer")
            _refuse_unserved(name, layer)
            layers.append(layer)
        kinds = {
            (layer.kv_cache.shape, layer.kv_cache.dtype, type(format_of(name, layer)))
            for name, layer in zip(names, layers, strict=True)
        }
        if len(kinds) > 1:
            raise UnsupportedError(f"the layers' KV caches differ: {sorted(map(str, kinds))}")
        form = format_of(names[0], layers[0])
        cache = cls(layers, form, block_size=block_size, spare_bytes=spare_bytes)
        if blocks is not None and cache.slots != blocks * cache.block_size:
            raise UnsupportedError(
                f"kernel blocks hold {cache.slots:,} tokens, {blocks:,} blocks of"
                f" {cache.block_size} tokens are scheduled: they do not follow one another"
            )
        return cache

    def write(self, rows: Tensor, slots: Tensor) -> None:
        """Put canonical rows `[L, 2, T, H, D]` of this layout into slots (int64 `[T]`).

        Rows whose slot is -1 are skipped. Raises `NamespaceError` if the rows are of another
        layout, `PlanError` if a slot is outside the cache; nothing is written then.
        """
        if rows.shape != self.layout.shape(len(slots)) or NAMES.get(rows.dtype) != (
            self.layout.dtype
        ):
            raise NamespaceError(
                f"rows {list(rows.shape)} {rows.dtype} for {len(slots)} slots do not fit"
                f" {self.layout}"
            )
        if not len(slots):
            return
        check_range("slot", slots, -1, self.slots)  # the kernels do not check
        if self._joined is not None and self.device.type == "cpu" and rows.is_contiguous():
            self._write_joined(self._joined, rows, slots)
            return
        rows, slots = rows.to(self.device), slots.to(self.device)
        for layer, (keys, values) in zip(self.layers, rows, strict=True):
            layer.impl.do_kv_cache_update(
                layer, keys.contiguous(), values.contiguous(), layer.kv_cache, slots
            )

    def _write_joined(self, joined: JoinedCaches, rows: Tensor, slots: Tensor) -> None:
        """Write all layers in one call, as if their caches were one.

        Canonical rows are read as `2 * L * T` tokens: for each layer first K, then V. So V of the
        token at i is K of the "token" at i + T. The slots of the V part are -1, which skips them.
        """
        tokens = len(slots)
        every = torch.full((len(self.layers), 2, tokens), -1)
        first_slots = joined.first_blocks[:, None] * self._kernel_block_size
        every[:, 0] = torch.where(slots < 0, -1, first_slots + slots)
        flat = rows.flatten(0, 2)
        layer = self.layers[0]
        layer.impl.do_kv_cache_update(
            layer, flat[:-tokens], flat[tokens:], joined.cache, every.flatten()[:-tokens]
        )

    def snapshot(self, block_ids: Sequence[int]) -> RawBlocks:
        """Copy these blocks of all layers to host memory as they are, to be unpacked later.

        On a GPU the copy runs after all work queued on the current stream, and this returns before
        it is done. Raises `PlanError` if a block id is outside the cache, `NoSpaceError`
        if snapshots that are not in host memory yet fill the device memory kept for them.
        """
        ids = torch.tensor(block_ids, dtype=torch.int64)
        if len(ids):
            check_range("block id", ids, 0, self.slots // self.block_size)
        split = self.block_size // self._kernel_block_size
        ids = (ids[:, None] * split + torch.arange(split)).flatten()
        cache = self.layers[0].kv_cache
        shape = (len(self.layers), len(ids), *cache.shape[1:])
        nbytes = cache[0].numel() * cache.itemsize * len(self.layers) * len(ids)
        buffer = self.spare.take(nbytes)
        copies = buffer[:nbytes].view(cache.dtype).view(shape)
        try:
            copied = self._copy_to_host(ids, copies)
        except Exception:
            self.spare.give_back(buffer)
            raise
        return RawBlocks(copies, self._format, self.layout, buffer, self.spare, copied)

    def _copy_to_host(self, ids: Tensor, copies: Tensor) -> Copied | None:
        if not len(ids):
            return None
        if self._ring is None:
            self._copy_blocks(ids, copies)
            return None
        if self.device.type != "cpu":  # without waiting for what the stream still has to do
            ids = ids.pin_memory().to(self.device, non_blocking=True)
        return self._ring.pass_through(lambda part, to: self._copy_blocks(ids[part], to), copies)

    def _copy_blocks(self, ids: Tensor, copies: Tensor) -> None:
        """Copy kernel blocks of every layer to `copies` `[L, len(ids), H, N, 2 * D]`."""
        if self._joined is not None:
            self._joined.copy_blocks(ids, copies)
            return
        for layer, copy in zip(self.layers, copies, strict=True):
            torch.index_select(layer.kv_cache, 0, ids, out=copy)


def _layer_index(name: str) -> int:
    """The index of a layer in the model: the one number in its name."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if len(numbers) != 1:
        raise UnsupportedError(f"cannot tell the place of layer {name!r} in the model")
    return int(numbers[0])


def _refuse_unserved(name: str, layer: AttentionLayer) -> None:
    """Raise `UnsupportedError` unless the layer's rows are plain K and V of every token.

    `capability` has judged the model's configuration; this checks the layer that was built.
    """
    cache = layer.kv_cache
    if not isinstance(cache, Tensor) or cache.ndim != 4:
        raise UnsupportedError(f"{name}: the KV cache is no [blocks, heads, tokens, K | V] tensor")
    if cache.dtype not in NAMES:
        raise UnsupportedError(f"{name}: KV cache dtype {cache.dtype} is not supported")
    if cache.shape[3] != 2 * layer.head_size or cache.shape[1] != layer.num_kv_heads:
        raise UnsupportedError(
            f"{name}: KV cache {list(cache.shape)} is not K and V of {layer.num_kv_heads} heads"
            f" of dimension {layer.head_size}"
        )
    if layer.sliding_window is not None:
        raise UnsupportedError(f"{name}: sliding-window attention is not supported")
    if layer.kv_sharing_target_layer_name is not None:
        raise UnsupportedError(f"{name}: KV shared between layers is not supported")
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        raise UnsupportedError(f"{name}: ALiBi is not supported")
    if layer.attn_type != "decoder":
        raise UnsupportedError(f"{name}: {layer.attn_type} attention is not supported")
