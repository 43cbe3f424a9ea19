"""A model of vLLM's prefix cache: full blocks of 16 tokens, matched from the start of a prompt."""

from __future__ import annotations

import math

from kvshare_store.blocks.eviction import LRU
from kvshare_store.plan import Reused
from kvshare_store.simulate.prompts import Prompt
from kvshare_store.simulate.replay import Shelf
from kvshare_store.simulate.traces import Request, chunks

BLOCK_TOKENS = 16
"""vLLM's default."""


class PrefixCache:
    """Finds blocks that earlier prompts and answers have filled. Evicts the blocks used longest
    ago, of one prompt the last one first."""

    def __init__(self, row_bytes: int, budget: float = math.inf) -> None:
        """`budget`: bytes of rows, of `row_bytes` each."""
        self._shelf = Shelf(LRU(), budget)
        self._row_bytes = row_bytes

    def serve(self, prompt: Prompt) -> Reused:
        """Find and keep a prompt with its answer; returns what was found. The last token is always
        computed, because the first token of the answer comes from it."""
        blocks = _full(chunks(prompt.computed, BLOCK_TOKENS, prompt.tenant))
        found, most = 0, max(0, len(prompt.tokens) - 1) // BLOCK_TOKENS
        while found < most and blocks[found].name in self._shelf:
            found += 1
        for block in reversed(blocks):
            if block.name in self._shelf:
                self._shelf.touch(block.name)
            else:
                self._shelf.add(block.name, BLOCK_TOKENS * self._row_bytes, BLOCK_TOKENS)
        return Reused(exact=BLOCK_TOKENS * found)


def _full(blocks: Request) -> Request:
    return blocks[:-1] if blocks and blocks[-1].tokens < BLOCK_TOKENS else blocks
