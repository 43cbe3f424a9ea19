"""KV blocks as the store keeps them: computed by the model, or random."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.data.edited_prompts import long_texts
from benchmarks.harness.models import model_folder
from benchmarks.harness.result import Options
from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.frame import Block, block_name
from kvshare_store.tensors.layout import KVLayout

_PROMPT_TOKENS = 2_048
_LAYOUT = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")
"""SmolLM2-135M's: 1.47 MB a block of 64 rows."""
_ROWS = 64

Named = Sequence[tuple[str, Block]]
"""Blocks with their names."""


def random_blocks(count: int) -> Named:
    """`count` blocks of random rows, which do not compress."""
    chance = np.random.default_rng(0)
    blocks = [
        Block("0" * 64, _LAYOUT, chance.bytes(_ROWS * _LAYOUT.row_bytes)) for _ in range(count)
    ]
    return [(block_name(block), block) for block in blocks]


def described(named: Named) -> str:
    """Random blocks, as the `model` of a result."""
    size = len(named[0][1].data)
    return f"none (random rows of SmolLM2-135M's shape, {size:,} bytes a block)"


def bf16_engine(options: Options) -> RowEngine:
    """The model in bf16, as engines serve it."""
    return RowEngine.load(model_folder(options), torch.bfloat16)


def real_blocks(options: Options, count: int, engine: RowEngine | None = None) -> list[Block]:
    """`count` full blocks of rows computed for real text, prompts of 2,048 tokens."""
    engine = engine or bf16_engine(options)
    texts = long_texts(options)
    digest = Namespace(model=str(model_folder(options)), layout=engine.layout).digest
    step = StoreConfig().block_tokens
    blocks: list[Block] = []
    while len(blocks) < count:
        rows = engine.prefill(texts.take(_PROMPT_TOKENS))[0].rows[:, :, 0]
        for start, stop in pairwise(range(0, _PROMPT_TOKENS + 1, step)):
            part = rows[:, :, start:stop].contiguous().cpu()
            data = part.view(torch.uint8).numpy().reshape(-1).data
            blocks.append(Block(digest, engine.layout, data))
    return blocks[:count]
