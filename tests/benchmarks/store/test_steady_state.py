"""Streams of requests through a store with a small budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.store import steady_state


def test_a_stream_of_edited_repeats_has_seen_every_text_once() -> None:
    texts = [np.full(200, at, np.int32) for at in range(5)]
    stream = steady_state.edited_repeats(texts, 20, seed=0)
    assert len(stream.prompts) == 20
    assert [int(np.bincount(p).argmax()) for p in stream.prompts[:5]] == [0, 1, 2, 3, 4]
    assert all(len(prompt) == 208 for prompt in stream.prompts)
    assert stream.working_set > 20 * 208 * steady_state.NAMESPACE.layout.row_bytes


def test_a_bounded_prefix_cache_forgets() -> None:
    texts = [np.arange(64 * at, 64 * at + 64, dtype=np.int32) for at in range(3)]
    stream = steady_state.Stream("s", [texts[0], texts[1], texts[0], texts[2], texts[1]])
    row = steady_state.NAMESPACE.layout.row_bytes
    assert steady_state.prefix_lru(stream, 1024 * row) == [0, 0, 0.75, 0, 0.75]
    assert steady_state.prefix_lru(stream, 128 * row) == [0, 0, 0.75, 0, 0]


def test_a_store_serves_a_stream(tmp_path: Path) -> None:
    texts = [np.random.default_rng(at).integers(0, 9000, 256).astype(np.int32) for at in range(4)]
    stream = steady_state.edited_repeats(texts, 12, seed=0)
    shares = steady_state.serve(stream, tmp_path / "home", 1 << 22, disk=False, name="all").shares
    assert shares[:4] == [0, 0, 0, 0]
    assert min(shares[4:]) > 0.5
