"""Grouped attention equals plain attention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kvshare_connectors.transformers.attention import NAME, attending, grouped_attention
from kvshare_connectors.transformers.engine import RowEngine
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.transformers.tiny import prompt_of, tiny_model


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("new", [1, 5, 130])
def test_it_equals_transformers_own(heads: int, kv_heads: int, new: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, heads, new, 8)
    key, value = torch.randn(2, 140, 2, kv_heads, 8).unbind(2)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    mask = torch.zeros(2, 1, new, 140).masked_fill_(torch.rand(2, 1, new, 140) < 0.5, -1e9)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_model_is_given_back_its_own_attention_after_an_error(llama: RowEngine) -> None:
    def fails() -> None:
        with attending(llama.model, NAME):
            assert llama.model.config._attn_implementation == NAME
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert llama.model.config._attn_implementation == "sdpa"


def test_another_choice_of_attention_is_kept() -> None:
    model = tiny_model("LlamaConfig")
    expected = RowEngine(model).prefill(prompt_of(30))[1]
    model.config._attn_implementation = "eager"
    used: list[str] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda *_: used.append(model.config._attn_implementation)
    )
    found = RowEngine(model).prefill(prompt_of(30))[1]
    hook.remove()
    assert used == ["eager"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
