"""For rewritten prompts it is known where each token comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.data.rewritten_prompts import REWRITES, History, Texts


class Made(Texts):
    """Texts that need no data set."""

    def __init__(self) -> None:
        super().__init__(Path("none"))
        draws = np.random.default_rng(0)
        self.system = draws.integers(10, 500, 900).astype(np.int32)
        self.spoken = draws.integers(10, 5_000, 20_000).astype(np.int32)
        roles = ("user", "assistant", "tool", "assistant")
        self.recorded = [
            (roles[at % 4], draws.integers(10, 5_000, int(size)).astype(np.int32))
            for at, size in enumerate(draws.integers(5, 120, 200))
        ]


@pytest.mark.parametrize("name", REWRITES)
def test_every_token_comes_from_where_it_is_said_to(name: str) -> None:
    history = History(Made(), 4_000, 1)
    stored = history.tokens()
    request = REWRITES[name](history)
    known = request.source_of >= 0
    assert len(request.source_of) == len(request.tokens)
    assert (stored[request.source_of[known]] == request.tokens[known]).all()
    assert 0.3 < np.mean(known) < 1
    assert request.tokens.tolist() != stored.tolist()


def test_words_get_the_numbers_in_which_they_came() -> None:
    tokens = Made().tokens("A cat, a cat.")
    assert tokens.tolist() == [10, 11, 12, 13, 11, 14, 11, 12, 15]
