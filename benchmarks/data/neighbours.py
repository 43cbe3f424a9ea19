"""The nearest earlier prompt of each prompt, by cosine distance of text vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_store.cli.progress import track

Floats = npt.NDArray[np.float32]
_ROWS_AT_ONCE = 1024


class Neighbours(NamedTuple):
    """For each prompt, float32 [prompts]: cosine distance to the nearest; 2 where there is none."""

    earlier: Floats
    """To the nearest earlier prompt with another text."""
    any: Floats
    """To the nearest prompt, earlier or later, with another text."""
    duplicate: npt.NDArray[np.bool_]
    """Whether an earlier prompt has the very same text."""
    repeated: npt.NDArray[np.bool_]
    """Whether any other prompt has the very same text."""


def neighbours(texts: Sequence[str], vectors: Floats) -> Neighbours:
    """Brute force over all pairs. `vectors`: unit rows or zeros, float32 [prompts, dimensions]."""
    texts_at: dict[str, list[int]] = {}
    for at, text in enumerate(texts):
        texts_at.setdefault(text, []).append(at)
    copies = [np.asarray(texts_at[text]) for text in texts]
    count = len(texts)
    earlier, nearest = np.full(count, 2, np.float32), np.full(count, 2, np.float32)
    for start in track(range(0, count, _ROWS_AT_ONCE), "Comparing prompts"):
        stop = min(start + _ROWS_AT_ONCE, count)
        distances = 1 - vectors[start:stop] @ vectors.T
        for row, at in zip(distances, range(start, stop), strict=True):
            row[copies[at]] = 2
            earlier[at] = row[:at].min(initial=2)
            nearest[at] = row.min(initial=2)
    empty = ~vectors.any(axis=1)  # text without content is like nothing
    earlier[empty] = nearest[empty] = 2
    duplicate = np.asarray([same[0] < at for at, same in enumerate(copies)], np.bool_)
    repeated = np.asarray([len(same) > 1 for same in copies], np.bool_)
    return Neighbours(earlier, nearest, duplicate, repeated)
