"""Vectors that nominate donors. They never decide: alignment does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kvshare_store.nodes.edits import Tokens

Vector = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]
T = TypeVar("T", bound=np.generic)

VECTOR_DIMENSIONS = 384
MIX = np.uint64(0x9E3779B97F4A7C15)
"""Multiplying by it spreads the bits of a token's number over a word."""
_GRAMS = (2, 3)
_AT_ONCE = 1 << 13
"""Tokens whose grams are hashed in one go: what is computed stays in the processor's cache."""
_UNIT = 1e-3
"""How far the length of a vector may be from 1."""


def joined(arrays: Sequence[npt.NDArray[T]]) -> npt.NDArray[T]:
    """Arrays of one kind, one behind the other: at least one. numpy would let other threads have
    the interpreter for each of them, and wait until it has it back."""
    return np.frombuffer(b"".join([array.data for array in arrays]), arrays[0].dtype)


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
    by_sign = np.zeros(2 * VECTOR_DIMENSIONS, np.int64)
    for start in range(0, len(tokens), _AT_ONCE):
        ids = tokens[start : start + _AT_ONCE + max(_GRAMS) - 1].astype(np.uint64) + np.uint64(1)
        hashed = _spread(ids)
        for length in _GRAMS:  # each gram's hash goes on from that of its beginning
            last = ids[length - 1 :]
            hashed = _spread(hashed[: len(last)] ^ last)
            by_sign += np.bincount(_places(hashed[:_AT_ONCE]), minlength=len(by_sign))
    counts = by_sign[VECTOR_DIMENSIONS:] - by_sign[:VECTOR_DIMENSIONS]
    return (counts / (math.sqrt(counts.dot(counts)) or 1.0)).astype(np.float32)


def _spread(words: Words) -> Words:
    words = words * MIX
    words ^= words >> np.uint64(29)
    return words


def _places(hashed: Words) -> npt.NDArray[np.int64]:
    """A dimension for each hash; those with a positive sign come behind all others."""
    dimensions = np.uint64(VECTOR_DIMENSIONS)
    places = hashed - hashed // dimensions * dimensions  # several times as fast as %
    places += (hashed >> np.uint64(63)) * dimensions
    return places.view(np.int64)
