"""Text vectors in a Store: made in the background, kept in the catalogue, asked for in lookup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.errors import UnsupportedError
from kvshare_store.lookup import semantic as semantic_module
from kvshare_store.lookup.embedders import TextEmbedder, Vector, text_embeddings_installed
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.embedders import WordEmbedder
from kvshare_store.testing.oracle import Driver

Config = Callable[..., StoreConfig]
Require = Callable[[bool, str], None]
NAMESPACE = Namespace("m", KVLayout(2, 1, 4, "float32"), tokenizer="words")

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


class Broken(TextEmbedder):
    """An embedder that loads and then fails."""

    name = "broken"

    def embed(self, text: str) -> Vector:
        raise RuntimeError("out of memory")


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model: tokens are their own words."""
    monkeypatch.setattr(semantic_module, "text_embeddings_installed", lambda: True)
    monkeypatch.setattr(semantic_module, "SentenceEmbedder", lambda model: WordEmbedder())
    monkeypatch.setattr(
        semantic_module, "decode", lambda space, tokens: " ".join(map(str, tokens.tolist()))
    )


def test_vectors_are_made_kept_and_found_again(words: None, config: Config) -> None:
    with Store(config(semantic="always")) as store:
        engine = Driver(store, NAMESPACE)
        engine.save(range(100, 140))
        store.flush()
        index = store.shelf.index(NAMESPACE.digest)
        assert len(index.semantic) == len(index.lexical) == 1
    with Store(config(semantic="never")) as store:
        index = store.shelf.index(NAMESPACE.digest)
        assert len(index.semantic) == 1
        store.evict(nodes=1)
        assert store.shelf.index(NAMESPACE.digest) is None


def test_an_embedder_that_fails_stops_nothing(
    words: None, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semantic_module, "SentenceEmbedder", lambda model: Broken())
    with Store(config(semantic="always")) as store:
        engine = Driver(store, NAMESPACE)
        for start in (100, 200):
            engine.save(range(start, start + 40))
        store.flush()
        assert engine.serve(range(100, 140)).exact == 39
        assert engine.serve([1, *range(100, 140)]).generation == 1
    with Store(config()) as store:
        assert store.stats()["nodes"] == 2


def test_a_model_that_cannot_be_loaded_is_done_without(
    words: None, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def refuse(model: str) -> TextEmbedder:
        loads.append(model)
        raise OSError("no such model")

    monkeypatch.setattr(semantic_module, "SentenceEmbedder", refuse)
    with Store(config(semantic="auto", embedder="nobody/knows")) as store:
        engine = Driver(store, NAMESPACE)
        for start in (100, 200):
            engine.save(range(start, start + 40))
        store.flush()
        assert loads == ["nobody/knows"], "it is not tried for every prompt"
        assert engine.serve(range(100, 140)).exact == 39


def test_always_without_the_library_is_said_at_once(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semantic_module, "text_embeddings_installed", lambda: False)
    with pytest.raises(UnsupportedError, match=r"kvshare-store\[semantic\]"):
        Store(config(semantic="always"))
    with Store(config(semantic="auto")) as store:
        Driver(store, NAMESPACE).save(range(40))
        store.flush()
        assert store.stats()["nodes"] == 1


@pytest.mark.parametrize("content", [None, "not JSON", '{"version": "1.0"}'])
def test_without_a_tokenizer_there_is_no_text(
    config: Config, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    space = Namespace("m", KVLayout(2, 1, 4, "float32"), tokenizer=str(tmp_path))
    with Store(config(semantic="never", delimiters=True)) as store:
        engine = Driver(store, space)
        engine.save(range(40))
        assert engine.serve(range(40)).exact == 39


@pytest.mark.slow
def test_the_real_model_nominates_a_paraphrase(config: Config, require: Require) -> None:
    require(text_embeddings_installed(), "sentence-transformers")
    model = demo_model(require)
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    space = Namespace("m", KVLayout(2, 1, 4, "float32"), tokenizer=str(model))
    with Store(config(semantic="always", delimiters=True)) as store:
        engine = Driver(store, space)
        ids = {text: engine.save(tokenizer.encode(text).ids) for text in (REPORT, CONTRACT)}
        store.flush()
        request = tokenizer.encode(PARAPHRASE).ids
        vector = store.semantic.of_node(space, np.asarray(request, np.int32))
        assert vector is not None
        nearest = store.shelf.index(space.digest).semantic.nearest(vector, 2)
        assert [name for name, _ in nearest] == [ids[REPORT], ids[CONTRACT]]
        assert nearest[0][1] > 0.6 > nearest[1][1]
        engine.serve(request)


def demo_model(require: Require) -> Path:
    """The folder of the example's model."""
    try:
        from examples.demo.model import DemoModelError, prepare_model
    except ImportError:
        require(False, "the example")
        raise
    try:
        return prepare_model()
    except DemoModelError as error:
        require(False, str(error))
        raise
