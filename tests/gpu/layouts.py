"""Rows read from and written to paged caches on a GPU, and K moved there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvshare_store.plan.editor import Editor
from kvshare_store.plan.spans import Span
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.tensors.rope import Rope
from tests.gpu.model import DEVICE, HEAD_DIM, HEADS, LAYERS, ORDERS, paged_cache
from tests.support.paged import rows_at

TOKENS = 500
SPLITS = {"16": (16, 16), "64 of 16": (16, 64)}
"""Name → tokens of a kernel block, tokens of a scheduled block."""


def round_trips() -> dict[str, Any]:
    """Rows written to slots are read back bit for bit, in every layout and block size."""
    found = {
        f"{order}, blocks of {name}": round_trip(order, *split)
        for order in ORDERS
        for name, split in SPLITS.items()
        if order.startswith("L") or len(set(split)) == 1  # vLLM splits no other block sizes
    }
    return {"ok": all(how == "right" for how in found.values()), **found}


def round_trip(order: str, kernel_block: int, block_size: int) -> str:
    """ "right", or what is wrong."""
    cache = paged_cache(order, blocks=64, kernel_block=kernel_block, block_size=block_size)
    rows = torch.randn(cache.layout.shape(TOKENS)).to(torch.bfloat16)
    slots = torch.randperm(cache.slots)[:TOKENS]
    cache.write(rows, slots)
    if not torch.equal(rows_at(cache, slots), rows):
        return "what was written is not what is read"
    block, offset = slots // kernel_block, slots % kernel_block
    for index, layer in enumerate(cache.layers):
        stored = layer.kv_cache[block.to(DEVICE), :, offset.to(DEVICE)].cpu()
        if not torch.equal(stored, torch.cat([rows[index, 0], rows[index, 1]], dim=-1)):
            return f"layer {index} holds other rows"
    ids = [5, 0, 63]
    wanted = (torch.tensor(ids)[:, None] * block_size + torch.arange(block_size)).flatten()
    found = cache.snapshot(ids).rows(torch.arange(len(wanted)))
    return "right" if torch.equal(found, logical(cache, wanted)) else "a snapshot holds others"


def logical(cache: Any, slots: Tensor) -> Tensor:
    """Canonical rows by plain indexing of kernel blocks, to compare with."""
    size = cache.layers[0].kv_cache.shape[2]
    at, offset = (slots // size).to(DEVICE), (slots % size).to(DEVICE)
    layers = [layer.kv_cache[at, :, offset].cpu() for layer in cache.layers]
    return torch.stack([torch.stack(layer.chunk(2, dim=-1)) for layer in layers])


def rotation() -> dict[str, Any]:
    """The editor's result on the GPU equals that on the CPU: exact rows bit for bit, moved K within
    one rounding of its dtype."""
    found = {name: edited(name) for name in ("bfloat16", "float16", "float32")}
    return {"ok": all(one["ok"] for one in found.values()), **found}


def edited(dtype: str) -> dict[str, Any]:
    """Both editors on the same spans: exact, moved forward, moved backward."""
    layout = KVLayout(LAYERS, HEADS, HEAD_DIM, dtype)
    own = getattr(torch, dtype)
    stored = torch.randn(layout.shape(256)).to(own)
    raw = stored.contiguous().view(torch.uint8).numpy().tobytes()
    spans = [Span(0, 50, 0, 0, 0, True), Span(60, 90, 55, 0, 50), Span(150, 100, 300, 0, 140)]
    block: Any = SimpleNamespace(name="block", rows=256, lossy=False)
    results = [
        Editor(layout, rope(own), device).edit(spans, [block], lambda _: raw).rows.cpu().clone()
        for device in ("cpu", DEVICE)
    ]
    here, there = (rows.float() for rows in results)
    difference = (here - there).abs()
    keys = difference[:, 0, 50:]
    # one unit in the last place of the larger value
    allowed = torch.finfo(own).eps * torch.maximum(here.abs(), there.abs())[:, 0, 50:]
    exact = bool((difference[:, 0, :50] == 0).all() and (difference[:, 1] == 0).all())
    return {
        "ok": exact and bool((keys <= allowed + 1e-6).all()),
        "exact_rows_and_values_equal": exact,
        "moved_keys_largest_difference": float(keys.max()),
        "moved_keys_that_differ": float((keys > 0).float().mean()),
    }


def rope(dtype: torch.dtype) -> Rope:
    """A plain table of 1,024 positions, as a model with that dtype keeps it."""
    frequencies = 1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(1024)[:, None] * frequencies
    return Rope.from_cache(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype), True)
