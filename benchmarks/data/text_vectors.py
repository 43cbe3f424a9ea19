"""Text vectors by the store's own embedder, cached in the user's cache folder.

Thousands of texts take minutes on a CPU; the second measurement that needs them should not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.engines.small_model import user_cache_dir
from kvshare_store.cli.progress import track
from kvshare_store.config import StoreConfig
from kvshare_store.lookup.embedders import SentenceEmbedder
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS

Matrix = npt.NDArray[np.float32]

_TEXTS_AT_ONCE = 64
"""Texts encoded between two writes to the cache."""


_RECORD = np.dtype([("key", "V16"), ("row", np.float32, VECTOR_DIMENSIONS)])


class VectorCache:
    """Vectors on disk, keyed by the BLAKE2 of their text: one append-only file per model."""

    def __init__(self, model: str, folder: Path | None = None) -> None:
        folder = folder or user_cache_dir() / "kvshare" / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{model.replace('/', '_')}.vectors"

    def read(self) -> dict[bytes, Matrix]:
        """All vectors in the file, by key."""
        if not self._path.exists():
            return {}
        whole = self._path.stat().st_size // _RECORD.itemsize
        records = np.fromfile(self._path, _RECORD, whole)
        keys = [key.tobytes() for key in records["key"]]
        return dict(zip(keys, records["row"], strict=True))

    def append(self, keys: Sequence[bytes], rows: Matrix) -> None:
        """Add rows after the last whole record: an interrupted write leaves a part of one."""
        records = np.zeros(len(keys), _RECORD)
        records["key"], records["row"] = [np.void(key) for key in keys], rows
        with self._path.open("ab") as file:
            file.truncate(file.tell() // _RECORD.itemsize * _RECORD.itemsize)
            file.write(records.tobytes())


def key_of(text: str) -> bytes:
    """The 16-byte key of a text."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def text_vectors(
    texts: Sequence[str], model: str | None = None, folder: Path | None = None
) -> Matrix:
    """Unit vectors, float32 [texts, 384], in the order of `texts`; zeros for empty ones."""
    model = model or StoreConfig().embedder
    cache = VectorCache(model, folder)
    known = cache.read()
    missing = {key: text for text in texts if (key := key_of(text)) not in known}
    if missing:
        embedder = SentenceEmbedder(model)
        ordered = sorted(missing, key=lambda key: len(missing[key]))
        starts = range(0, len(ordered), _TEXTS_AT_ONCE)
        for start in track(starts, f"Embedding {len(ordered)} texts"):
            keys = ordered[start : start + _TEXTS_AT_ONCE]
            rows = embedder.embed_many([missing[key] for key in keys])
            cache.append(keys, rows)
            known |= dict(zip(keys, rows, strict=True))
    return np.stack([known[key_of(text)] for text in texts])
