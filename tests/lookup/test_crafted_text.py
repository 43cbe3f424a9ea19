"""Text that repeats itself costs no more than other text."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kvshare_store.lookup.align import align
from kvshare_store.lookup.effort import Effort
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.grams import GRAM, gram_hashes

LENGTH = 1 << 16


def sampled_token() -> int:
    """A token whose repetition has a gram that every table of a long prompt takes."""
    for token in range(100_000):
        if int(gram_hashes(np.full(GRAM, token, np.int32))[0]) % 64 == 0:
            return token
    raise AssertionError("there is none")


def repeated(edit: int) -> Tokens:
    """One token many times, with another in a place of its own."""
    tokens = np.full(LENGTH, sampled_token(), np.int32)
    tokens[edit] = 1 + tokens[0]
    return tokens


@pytest.mark.parametrize("least", [2, 8, 64])
def test_one_token_again_and_again(least: int) -> None:
    """What is found is equal, and the work is bounded: it took seconds."""
    request, donor = repeated(LENGTH // 3), repeated(LENGTH // 2)
    spent = time.process_time()
    found = align(request, donor, Effort(), least=least)
    assert time.process_time() - spent < 1.0, "a generous deadline against quadratic work"
    for start, source, length in found:
        assert np.array_equal(request[start : start + length], donor[source : source + length])
    assert sum(match.length for match in found) >= LENGTH // 3
