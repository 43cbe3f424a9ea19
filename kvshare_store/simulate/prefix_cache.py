"""A model of vLLM's prefix cache: full blocks of 16 tokens, matched from the start of a prompt.

One request after another. vLLM gives a request blocks for all of its tokens, and takes those that
were used longest ago. When the request ends, its full blocks go to the end of the queue, the last
one first. A last block that is not full cannot be found: it goes to the front, for whoever comes
next (`BlockPool.free_blocks`).
"""

from __future__ import annotations

import math

from kvshare_store.blocks.eviction import LRU
from kvshare_store.plan.spans import Reused
from kvshare_store.simulate.prompts import Prompt
from kvshare_store.simulate.replay import Shelf
from kvshare_store.simulate.traces import chunks

BLOCK_TOKENS = 16
"""vLLM's default."""


class PrefixCache:
    """Finds blocks that earlier prompts and answers have filled. Evicts the blocks used longest
    ago, of one prompt the last one first."""

    def __init__(self, row_bytes: int, budget: float = math.inf) -> None:
        """`budget`: bytes of rows, of `row_bytes` each."""
        self._shelf = Shelf(LRU(), budget)
        self._row_bytes = row_bytes
        self._unfinished = ""
        """The last block of the last request, if it is not full."""

    def serve(self, prompt: Prompt) -> Reused:
        """Find and keep a prompt with its answer; returns what was found. The last token is always
        computed, because the first token of the answer comes from it."""
        blocks = chunks(prompt.computed, BLOCK_TOKENS, prompt.tenant)
        found, most = 0, max(0, len(prompt.tokens) - 1) // BLOCK_TOKENS
        while found < most and blocks[found].name in self._shelf:
            found += 1
        self._shelf.remove(self._unfinished)
        for block in reversed(blocks):
            if block.name in self._shelf:
                self._shelf.touch(block.name)
            else:
                self._shelf.add(block.name, BLOCK_TOKENS * self._row_bytes, BLOCK_TOKENS)
        full = len(prompt.computed) // BLOCK_TOKENS
        self._unfinished = "".join(block.name for block in blocks[full:])
        return Reused(exact=BLOCK_TOKENS * found)
