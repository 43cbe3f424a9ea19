"""Vectors that nominate donors. They never decide: alignment does."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_store.nodes.edits import Tokens

Vector = npt.NDArray[np.float32]

VECTOR_DIMENSIONS = 384
MIX = np.uint64(0x9E3779B97F4A7C15)
"""Multiplying by it spreads the bits of a token's number over a word."""
_GRAMS = (2, 3)
_UNIT = 1e-3
"""How far the length of a vector may be from 1."""


class Vectors(NamedTuple):
    """What nominates a node: float32 unit vectors of 384 numbers; no semantic one may be known."""

    lexical: Vector
    semantic: Vector | None


def is_vector(vector: Vector) -> bool:
    """Of length 1, or all zeros: what a text or a prompt without content has."""
    if vector.shape != (VECTOR_DIMENSIONS,):
        return False
    exact = vector.astype(np.float64)  # which no square of a float32 overflows
    square = float(exact.dot(exact))
    return square == 0.0 or abs(square - 1.0) < _UNIT  # NaN is neither


def unit(vector: npt.NDArray[Any]) -> Vector:
    """Scaled to length 1; zeros stay zeros."""
    norm = float(np.linalg.norm(vector))
    return (vector / norm if norm else vector).astype(np.float32)


def lexical_vector(tokens: Tokens) -> Vector:
    """Signed feature hashing of token 2- and 3-grams into 384 dimensions, L2-normalised.

    `tokens`: int32 ids. Needs no model and gives the same vector in every process.
    """
    ids = tokens.astype(np.uint64) + np.uint64(1)
    hashed, grams = np.zeros(len(ids), np.uint64), []
    for length in range(1, max(_GRAMS) + 1):  # each gram's hash goes on from that of its beginning
        count = max(0, len(ids) - length + 1)
        hashed = (hashed[:count] ^ ids[length - 1 :]) * MIX
        hashed ^= hashed >> np.uint64(29)
        if length in _GRAMS:
            grams.append(hashed)
    every = np.concatenate(grams)
    places = (every % np.uint64(VECTOR_DIMENSIONS)).view(np.int64)
    signs = np.where(every >> np.uint64(63), 1.0, -1.0)
    return unit(np.bincount(places, signs, VECTOR_DIMENSIONS))
