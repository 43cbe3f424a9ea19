"""How codecs change rows and the next token."""

from __future__ import annotations

import pytest
import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.store import codecs
from kvshare_store.tensors.layout import KVLayout
from tests.transformers.tiny import prompt_of, tiny_model


def test_a_lossless_codec_changes_no_row_and_a_lossy_one_little() -> None:
    layout = KVLayout(2, 2, 8, "bfloat16")
    rows = torch.randn(layout.shape(100), dtype=torch.bfloat16)
    for codec in ("none", "zstd", "planes"):
        assert torch.equal(codecs.rounded(rows, layout, codec), rows)  # type: ignore[arg-type]
    for codec, most in (("int8", 0.03), ("fp8", 0.2)):
        changed = codecs.rounded(rows, layout, codec)  # type: ignore[arg-type]
        difference = (changed - rows).abs().max()
        assert 0 < difference < most


def test_a_lossy_codec_costs_more_than_no_codec() -> None:
    engine, tokens = RowEngine(tiny_model("LlamaConfig")), prompt_of(60)
    assert codecs.kl_of_next(engine, tokens, None) == pytest.approx(0, abs=1e-5)
    assert codecs.kl_of_next(engine, tokens, "fp8") > 1e-6
