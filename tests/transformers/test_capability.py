"""What the reference engine declines, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from kvshare_connectors.transformers.capability import decline_reason
from kvshare_connectors.transformers.engine import RowEngine

from kvshare_store.errors import UnsupportedError
from tests.transformers.tiny import FAMILIES, TINY, tiny_model

SLIDING = ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Gemma2Config", {"layer_types": SLIDING, "sliding_window": 16}, "sliding_window"),
        ("Gemma3TextConfig", {"layer_types": SLIDING, "sliding_window": 16}, "sliding_window"),
        ("MistralConfig", {"sliding_window": 16}, "sliding_window"),
        (
            "Qwen2Config",
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": SLIDING},
            "sliding_window",
        ),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_unknown",
        ),
        ("GPT2Config", {}, "architecture_unlisted"),
    ],
)
def test_what_would_not_be_exact_is_declined(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    config = getattr(transformers, family)(**(TINY | FAMILIES.get(family, {}) | changes))
    assert decline_reason(config) == reason


def test_a_declined_model_makes_no_engine() -> None:
    with pytest.raises(UnsupportedError, match="sliding_window"):
        RowEngine(tiny_model("Gemma2Config", layer_types=SLIDING, sliding_window=16))


def test_the_table_is_the_models_own(engine: RowEngine) -> None:
    """Moving K by the table gives the K that the model itself computes at the new position."""
    tokens = [5, 6, 7]
    at, moved = engine.cache(40), engine.cache(40)
    batch = torch.tensor([tokens])
    engine.compute(at, batch, torch.tensor([[0, 1, 2]]))
    engine.compute(moved, batch, torch.tensor([[30, 31, 32]]))
    keys = at.rows[:1, 0, 0, :3].clone()  # the first layer's K depends on token and position only
    engine.rope.move(keys, torch.tensor([0, 1, 2]), torch.tensor([30, 31, 32]))
    torch.testing.assert_close(keys[0], moved.rows[0, 0, 0, 30:33], atol=1e-5, rtol=0)
