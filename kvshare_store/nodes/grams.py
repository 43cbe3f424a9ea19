"""Hashes of grams of tokens, in time that does not depend on their length. They nominate; tokens
decide."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.vectors import MIX

Hashes = npt.NDArray[np.uint64]

GRAM = 8
"""Tokens of a gram: text that shares none has no run worth a seam in common."""
ANCHORED = 64
"""Of so many grams about one is an anchor."""
_AT_ONCE = 1 << 13
_SHIFT = np.uint64(29)
_BASE = 0xD6E8FEB86659FD93
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)


class _Powers:
    """Powers of the base of the rolling hash and of its inverse."""

    def __init__(self) -> None:
        self._both = np.ones((2, 1), np.uint64)

    def __call__(self, count: int) -> npt.NDArray[np.uint64]:
        """uint64 [2, count]: of the base, of its inverse."""
        both = self._both
        if both.shape[1] < count:
            steps = np.ones((2, 1 << count.bit_length()), np.uint64)
            steps[:, 1:] = np.asarray([[_BASE], [_BASE_INVERSE]], np.uint64)
            both = self._both = np.cumprod(steps, axis=1)
        return both[:, :count]


_powers = _Powers()


def gram_hashes(tokens: Tokens) -> Hashes:
    """A hash of the gram from each position on; empty for shorter prompts."""
    count = max(0, len(tokens) - GRAM + 1)
    hashed = np.empty(count, np.uint64)
    for start in range(0, count, _AT_ONCE):  # so that what is computed stays in the cache
        stop = min(start + _AT_ONCE, count)
        _hash_into(hashed[start:stop], tokens[start : stop + GRAM - 1])
    return hashed


def _hash_into(hashed: Hashes, tokens: Tokens) -> None:
    base, inverse = _powers(len(tokens))
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * MIX
    mixed ^= mixed >> _SHIFT
    mixed *= base
    sums = np.empty(len(tokens) + 1, np.uint64)
    sums[0] = 0
    np.cumsum(mixed, out=sums[1:])
    np.subtract(sums[GRAM:], sums[: len(hashed)], out=hashed)
    hashed *= inverse[: len(hashed)]
    hashed ^= hashed >> np.uint64(32)
    hashed *= MIX


def anchors(hashes: Hashes) -> Hashes:
    """Of the hashes of some grams those that nominate prompts: one in `ANCHORED`, whatever stands
    around it, each once."""
    return np.unique(hashes[hashes & np.uint64(ANCHORED - 1) == 0])
