"""Timing at the shapes of larger models, on a stand-in without weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.harness.result import Options
from benchmarks.latency import model_shapes

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_followers_have_what_they_should_in_common(share: float) -> None:
    donor = list(range(100))
    made = model_shapes.follower(donor, share, random.Random(0), 10**6)
    assert len(made) == 100
    assert made[:25] == donor[:25]
    assert len(set(made) & set(donor)) == round(share * 100)


def test_each_row_is_what_was_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(model_shapes, "SHAPES", {"tiny": ("qwen2", TINY)})
    monkeypatch.setattr(model_shapes, "LENGTHS", {"cpu": (128,), "cuda": (128,)})
    monkeypatch.setattr(model_shapes, "HOST_BYTES", {"cpu": 1 << 24, "cuda": 1 << 24})
    result = model_shapes.measure(Options(data=tmp_path, short=True, n=2))
    # the new tokens, and the last one, which the engine must compute to sample
    assert [row[:4] for row in result.rows] == [
        ["tiny", 128, "50%", "50.8%"],
        ["tiny", 128, "90%", "10.9%"],
    ]
    assert all(float(row[4]) > 0 and float(row[6]) > 0 for row in result.rows)  # type: ignore[arg-type]
    assert len(model_shapes.draw(result).axes) == 1
