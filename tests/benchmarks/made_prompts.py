"""Prompts made by hand, with text vectors at known angles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.data.sharegpt import Prompts

LENGTH = 96
NEW = 1_000_000


def numbers(start: int = NEW) -> Iterator[list[int]]:
    """Documents of ten tokens each, all different."""
    while True:
        yield list(range(start, start + 10))
        start += 10


def fresh(seed: int, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40_000, length).astype(np.int32)


def towards(angle: float, dimensions: int = 384) -> np.ndarray:
    vector = np.zeros(dimensions, np.float32)
    vector[0], vector[1] = np.cos(angle), np.sin(angle)
    return vector


def prompts_of(texts: list[str], angles: list[float], length: int = LENGTH) -> Prompts:
    seeds = {text: at for at, text in enumerate(dict.fromkeys(texts))}
    tokens = [fresh(seeds[text], length) for text in texts]
    return Prompts(texts, tokens, np.stack([towards(angle) for angle in angles]))
