"""Vectors that nominate donors. They never decide: alignment does.

`kvshare_store.testing.embedders.EmbedderTests` has the contract tests of this interface.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvshare_store.errors import UnsupportedError
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS, Vector, unit

_WINDOW_CHARACTERS = 900
_WINDOW_STEP = 700
_MAX_WINDOWS = 8


class TextEmbedder(ABC):
    """Text to a unit vector of 384 float32. Thread-safe."""

    @abstractmethod
    def embed(self, text: str) -> Vector:
        """The vector of `text`; of zeros for text without content. Deterministic."""


class SentenceEmbedder(TextEmbedder):
    """Any sentence-transformers model; models of another width are projected to 384.

    Long prompts: overlapping windows over the text, evenly chosen, mean-pooled.
    """

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise UnsupportedError(
                "text embeddings need `pip install kvshare-store[semantic]`, or semantic: never"
            ) from error
        self._lock = threading.Lock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model: Any = SentenceTransformer(str(packaged_model(model)), device="cpu")
        self.projection = projection(self._encode(["width"]).shape[1])

    def embed(self, text: str) -> Vector:
        vector: Vector = self.embed_many([text])[0]
        return vector

    def embed_many(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The vectors of several texts, float32 [texts, 384], encoded in batches of like length."""
        pieces = [windows(text) if text.strip() else [] for text in texts]
        rows = np.zeros((len(texts), VECTOR_DIMENSIONS), np.float32)
        encoded = iter(self._encode([piece for each in pieces for piece in each]))
        for row, each in zip(rows, pieces, strict=True):
            if each:
                pooled = unit(np.stack([next(encoded) for _ in each]).mean(axis=0))
                row[:] = pooled if self.projection is None else unit(pooled @ self.projection)
        return rows

    def _encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        with self._lock:
            encoded = self._model.encode(
                texts,
                show_progress_bar=False,
                normalize_embeddings=True,
                convert_to_numpy=True,
            )
        return np.asarray(encoded, np.float32)


def windows(text: str) -> list[str]:
    """Up to 8 overlapping windows that together span the text."""
    starts = list(range(0, max(1, len(text) - (_WINDOW_CHARACTERS - _WINDOW_STEP)), _WINDOW_STEP))
    if len(starts) > _MAX_WINDOWS:
        picked = np.linspace(0, len(starts) - 1, _MAX_WINDOWS).round().astype(int)
        starts = [starts[at] for at in picked]
    return [text[start : start + _WINDOW_CHARACTERS] for start in starts]


def projection(width: int) -> npt.NDArray[np.float32] | None:
    """A fixed random projection to 384 dimensions: cosines survive it well enough to nominate."""
    if width == VECTOR_DIMENSIONS:
        return None
    generator = np.random.default_rng(384)
    return generator.standard_normal((width, VECTOR_DIMENSIONS)).astype(np.float32)


def packaged_model(name: str) -> str | Path:
    """The folder of a model that a Python package ships, or the name itself."""
    spec = importlib.util.find_spec(name.replace("-", "_")) if "/" not in name else None
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "model"
        if folder.is_dir():
            return folder
    return name


def text_embeddings_installed() -> bool:
    """Whether the `semantic` extra is there."""
    return importlib.util.find_spec("sentence_transformers") is not None
