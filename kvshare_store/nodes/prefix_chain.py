"""The prefix chain: which nodes begin with the same tokens as a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.postings import Keys, Postings, factors
from kvshare_store.nodes.vectors import MIX, joined

Counts = npt.NDArray[np.int64]

CHAIN_RUN = 16
"""Tokens of a run of the prefix chain: as many as a block of vLLM has, so that a prefix which its
own cache would find is always nominated."""
_CHAIN_FANOUT = 8
"""Nodes looked at per chain entry: they share the run, only one of them can be the longest."""


class PrefixChain:
    """A hash chain over runs of `run` tokens: entry i stands for the first (i + 1) · run tokens.

    Its hashes have 64 bits and are fast, not strong: two prompts that collide cost a nomination,
    since donors are verified by their tokens. They are sums of products with numbers that each
    process draws, so nobody can make prompts that collide.
    """

    def __init__(self, run: int) -> None:
        self._run = run
        self._nodes = Postings()

    def hashes(self, tokens: Tokens) -> Keys:
        """The chain of a prompt: one hash for each whole run."""
        hashes = self._run_hashes(tokens[: len(tokens) // self._run * self._run])
        return _mixed((hashes * factors(len(hashes))).cumsum(dtype=np.uint64))

    def _run_hashes(self, whole: Tokens) -> Keys:
        """Of each of some whole runs."""
        runs = whole.reshape(-1, self._run)
        # converts a piece at a time: many prompts as 64-bit numbers would be fresh memory each time
        return _mixed(
            np.einsum("ij,j->i", runs, factors(self._run), dtype=np.uint64, casting="unsafe")
        )

    def _chains(self, prompts: Sequence[Tokens]) -> tuple[Keys, Counts]:
        """As `hashes`, of many prompts one behind the other, and how many each has."""
        counts = np.asarray([len(tokens) // self._run for tokens in prompts])
        starts = counts.cumsum() - counts
        whole = [tokens[: len(tokens) // self._run * self._run] for tokens in prompts]
        hashes = self._run_hashes(joined(whole))
        place = np.arange(len(hashes)) - starts.repeat(counts)
        sums = np.zeros(len(hashes) + 1, np.uint64)
        (hashes * factors(int(counts.max(initial=0)))[place]).cumsum(out=sums[1:])
        return _mixed(sums[1:] - sums[starts].repeat(counts)), counts

    def add(self, node_id: str, tokens: Tokens) -> None:
        """Index a node under these of its leading tokens."""
        if node_id not in self._nodes:
            self._nodes.add(node_id, self.hashes(tokens).tolist())

    def extend(self, nodes: Sequence[tuple[str, Tokens]]) -> None:
        """Index many nodes."""
        new = [entry for entry in nodes if entry[0] not in self._nodes]
        if not new:
            return
        keys, counts = self._chains([tokens for _, tokens in new])
        self._nodes.extend([node for node, _ in new], keys, np.arange(len(new)).repeat(counts))

    def settle(self) -> None:
        """Do now what the first question after `extend` would wait for."""
        self._nodes.settle()

    def remove(self, node_id: str) -> None:
        """Forget the node."""
        self._nodes.remove(node_id)

    def nominate(self, hashes: Keys) -> list[str]:
        """Nodes that share the longest part of a chain, the newest first. Not yet verified."""
        low, high = 1, len(hashes)  # an entry implies every shorter one of the same node
        if not high or not self._any(hashes[0]):
            return []
        while low < high:
            middle = (low + high + 1) // 2
            if self._any(hashes[middle - 1]):
                low = middle
            else:
                high = middle - 1
        return list(islice(self._nodes.find(int(hashes[low - 1])), _CHAIN_FANOUT))

    def _any(self, entry: np.uint64) -> bool:
        return next(self._nodes.find(int(entry)), None) is not None


def _mixed(words: Keys) -> Keys:
    """Every bit of a word changes the lower half of them."""
    return (words ^ (words >> np.uint64(32))) * MIX
