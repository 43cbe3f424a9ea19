"""Text that repeats itself costs no more than other text."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvshare_store.lookup import align as align_module
from kvshare_store.lookup import equal_runs
from kvshare_store.lookup.effort import Effort
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.grams import GRAM, gram_hashes

LENGTH = 1 << 16
MOST_COMPARED = 1 << 21
"""Tokens. Without a limit to the work it is four times as many, and without one to the stretches
that are looked at each place with each other."""


def sampled_token() -> int:
    """A token whose repetition has a gram that every table of a long prompt takes."""
    for token in range(100_000):
        if int(gram_hashes(np.full(GRAM, token, np.int32))[0]) % 64 == 0:
            return token
    raise AssertionError("there is none")


def repeated(edit: int, ends: int = 0) -> Tokens:
    """One token many times, with another in a place of its own, and other `ends`."""
    tokens = np.full(LENGTH, sampled_token(), np.int32)
    tokens[edit] += 1
    tokens[[0, -1]] += ends
    return tokens


@pytest.mark.parametrize(("ends", "equal"), [(0, LENGTH // 3), (2, 1000)])
@pytest.mark.parametrize("least", [2, 8, 64])
def test_one_token_again_and_again(
    least: int, ends: int, equal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found is equal, and the work is bounded, not only the time that it may take. With
    equal ends most is found there; else each place of the request seems to be each of the donor."""
    request, donor = repeated(LENGTH // 3), repeated(LENGTH // 2, ends)
    compare, compared = equal_runs.common_prefix, list[int]()

    def counted(a: Tokens, b: Tokens) -> int:
        compared.append(compare(a, b))
        return compared[-1]

    for module in (align_module, equal_runs):
        monkeypatch.setattr(module, "common_prefix", counted)
    found = align_module.align(request, donor, Effort(seconds=math.inf), least=least)
    assert sum(compared) < MOST_COMPARED
    for start, source, length in found:
        assert np.array_equal(request[start : start + length], donor[source : source + length])
    assert sum(match.length for match in found) >= equal
