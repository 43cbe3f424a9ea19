"""Text vectors: loaded late, asked for only when they cost little beside what they may save."""

from __future__ import annotations

import logging
import threading

from kvshare_store.config import StoreConfig
from kvshare_store.errors import UnsupportedError
from kvshare_store.lookup.embedders import (
    SentenceEmbedder,
    TextEmbedder,
    Vector,
    text_embeddings_installed,
)
from kvshare_store.lookup.text import decode
from kvshare_store.namespace import Namespace
from kvshare_store.tree.edits import Tokens

log = logging.getLogger("kvshare")


class Semantic:
    """The configured text embedder, or none. Thread-safe."""

    def __init__(self, config: StoreConfig) -> None:
        self._model = config.embedder
        self._always = config.semantic == "always"
        self._wanted = self._always or (config.semantic == "auto" and text_embeddings_installed())
        if self._always and not text_embeddings_installed():
            raise UnsupportedError("semantic: always needs `pip install kvshare-store[semantic]`")
        self._lock = threading.Lock()
        self._embedder: TextEmbedder | None = None

    def of_node(self, namespace: Namespace, tokens: Tokens) -> Vector | None:
        """A stored prompt's vector, in the background; the first call loads the model."""
        if not self._wanted:
            return None
        with self._lock:
            if self._embedder is None:
                self._load()
        return self._embed(namespace, tokens)

    def _load(self) -> None:
        try:
            self._embedder = SentenceEmbedder(self._model)
        except (UnsupportedError, OSError, ValueError) as error:
            self._wanted = False
            log.warning("kvshare: no text embeddings (%s): %s", self._model, error)

    def _embed(self, namespace: Namespace, tokens: Tokens) -> Vector | None:
        text = decode(namespace.tokenizer, tokens) if self._embedder is not None else None
        if text is None or self._embedder is None:
            return None
        try:
            vector = self._embedder.embed(text)
        except (RuntimeError, ValueError) as error:
            log.warning("kvshare: no text embedding of a prompt: %s", error)
            return None
        return vector if vector.any() else None
