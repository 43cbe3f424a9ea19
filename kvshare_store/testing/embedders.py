"""Contract tests of text embedders, and an embedder that needs no model."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest

from kvshare_store.lookup.embedders import TextEmbedder
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS, Vector, lexical_vector

REPORT = (
    "The patient, a man of {age}, was admitted on Tuesday with chest pain that had started in the "
    "night. His blood pressure was {pressure}; the electrocardiogram showed no acute changes."
)
CONTRACT = (
    "The supplier shall deliver the goods within thirty days of the order. Late deliveries entitle "
    "the buyer to a reduction of the price, unless the delay is due to force majeure."
)
RECIPE = "Beat the eggs with the sugar until pale, fold in the flour, bake for forty minutes."


class WordEmbedder(TextEmbedder):
    """The lexical vector of a text's words: for tests that need some embedder and no model."""

    def embed(self, text: str) -> Vector:
        words = [zlib.crc32(word.encode()) & 0x7FFFFFFF for word in text.split()]
        return lexical_vector(np.asarray(words, np.int32))


@functools.lru_cache(maxsize=4)
def make(factory: str, arguments: tuple[Any, ...]) -> TextEmbedder:
    """Call `module:callable` with arguments, once: models take long to load."""
    module, _, name = factory.partition(":")
    made: TextEmbedder = getattr(importlib.import_module(module), name)(*arguments)
    return made


class EmbedderTests:
    """Every `TextEmbedder` passes these. Set `factory` in a subclass; it runs in two processes."""

    factory: str
    """`module:callable`."""
    arguments: tuple[Any, ...] = ()
    tolerance = 1e-5

    @pytest.fixture
    def embedder(self) -> TextEmbedder:
        """The embedder under test, the same one for every test."""
        return make(self.factory, self.arguments)

    def test_384_float32_of_length_one(self, embedder: TextEmbedder) -> None:
        for text in (RECIPE, "word another", CONTRACT * 50):
            vector = embedder.embed(text)
            assert (vector.shape, vector.dtype) == ((VECTOR_DIMENSIONS,), np.dtype(np.float32))
            assert np.isfinite(vector).all()
            assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-4)

    @pytest.mark.parametrize("text", ["", "   ", "\n\t "])
    def test_text_without_content_is_zeros(self, embedder: TextEmbedder, text: str) -> None:
        vector = embedder.embed(text)
        assert (vector.shape, vector.dtype) == ((VECTOR_DIMENSIONS,), np.dtype(np.float32))
        assert not vector.any()

    def test_similar_is_closer_than_unrelated(self, embedder: TextEmbedder) -> None:
        first = embedder.embed(REPORT.format(age="54", pressure="140 over 90"))
        second = embedder.embed(REPORT.format(age="61", pressure="155 over 95"))
        for other in (CONTRACT, RECIPE):
            assert first @ second > 0.2 + first @ embedder.embed(other)

    def test_the_end_of_a_long_text_counts(self, embedder: TextEmbedder) -> None:
        long = CONTRACT * 40
        assert embedder.embed(long) @ embedder.embed(long + RECIPE * 40) < 0.999

    def test_the_same_text_has_the_same_vector(self, embedder: TextEmbedder) -> None:
        np.testing.assert_allclose(
            embedder.embed(RECIPE), embedder.embed(RECIPE), atol=self.tolerance
        )

    def test_another_process_agrees(self, embedder: TextEmbedder) -> None:
        texts = [RECIPE, REPORT.format(age="54", pressure="140 over 90")]
        command = [sys.executable, "-m", __name__, self.factory, json.dumps(self.arguments)]
        answer = subprocess.run(
            command, input=json.dumps(texts), capture_output=True, text=True, check=True
        )
        for text, there in zip(texts, json.loads(answer.stdout.splitlines()[-1]), strict=True):
            np.testing.assert_allclose(embedder.embed(text), there, atol=self.tolerance)


def _answer() -> None:
    """The other process: texts on standard input, vectors on standard output."""
    embedder = make(sys.argv[1], tuple(json.loads(sys.argv[2])))
    print(json.dumps([embedder.embed(text).tolist() for text in json.load(sys.stdin)]))


if __name__ == "__main__":
    _answer()
