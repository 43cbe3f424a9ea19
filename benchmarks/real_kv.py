"""Real KV of the demo model: blocks as the store would keep them."""

from __future__ import annotations

from itertools import pairwise

import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.edited import long_texts
from benchmarks.prompts import tokenizer_folder
from benchmarks.result import Options
from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.frame import Block

_PROMPT_TOKENS = 2_048


def bf16_engine(options: Options) -> RowEngine:
    """The model in bf16, as engines serve it."""
    return RowEngine.load(tokenizer_folder(options), torch.bfloat16)


def real_blocks(options: Options, count: int, engine: RowEngine | None = None) -> list[Block]:
    """`count` full blocks of rows computed for real text, prompts of 2,048 tokens."""
    from transformers import AutoTokenizer

    folder = tokenizer_folder(options)
    engine = engine or bf16_engine(options)
    texts = long_texts(options.data, AutoTokenizer.from_pretrained(folder))
    digest = Namespace(model=str(folder), layout=engine.layout).digest
    step = StoreConfig().block_tokens
    blocks: list[Block] = []
    while len(blocks) < count:
        rows = engine.prefill(texts.take(_PROMPT_TOKENS))[0].rows[:, :, 0]
        for start, stop in pairwise(range(0, _PROMPT_TOKENS + 1, step)):
            part = rows[:, :, start:stop].contiguous().cpu()
            data = part.view(torch.uint8).numpy().reshape(-1).data
            blocks.append(Block(digest, engine.layout, data))
    return blocks[:count]
