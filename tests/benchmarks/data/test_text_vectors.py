"""Text vectors are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def test_vectors_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.data import text_vectors

    asked: list[list[str]] = []

    class Lengths:
        def __init__(self, model: str) -> None:
            pass

        def embed_many(self, texts: list[str]) -> Any:
            asked.append(texts)
            return np.stack([np.full(384, len(text), np.float32) for text in texts])

    monkeypatch.setattr(text_vectors, "SentenceEmbedder", Lengths)
    assert text_vectors.text_vectors(["aa", "b", "aa"], "m", tmp_path)[:, 0].tolist() == [2, 1, 2]
    with next(tmp_path.glob("*.vectors")).open("ab") as file:
        file.write(b"a torn record")
    assert text_vectors.text_vectors(["ccc", "b"], "m", tmp_path)[:, 0].tolist() == [3, 1]
    assert text_vectors.text_vectors(["ccc", "aa"], "m", tmp_path)[:, 0].tolist() == [3, 2]
    assert asked == [["b", "aa"], ["ccc"]]
