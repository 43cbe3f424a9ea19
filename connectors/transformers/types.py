"""The parts of transformers that KVShare uses: its own annotations leave out the fields of
configurations.

Which fields a configuration has depends on the model's architecture. `capability` declines all but
a few architectures, and uses `getattr` for fields that only some of these have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Config(Protocol):
    """`transformers.PreTrainedConfig` of a decoder."""

    model_type: str
    name_or_path: str
    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    max_position_embeddings: int
    rope_parameters: Mapping[str, Any] | None
    _attn_implementation: str


class Decoder(Protocol):
    """The model without its head."""

    rotary_emb: Callable[..., tuple[Tensor, Tensor]]
    """`(like, positions [1, n])` → cos and sin `[1, n, head_dim]` in the dtype of `like`."""


class Output(Protocol):
    """`transformers.modeling_outputs.CausalLMOutputWithPast`."""

    logits: Tensor


class Model(Protocol):
    """`transformers.PreTrainedModel` with a language model head."""

    config: Config
    model: Decoder

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def eval(self) -> Self: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def __call__(self, **inputs: Any) -> Output: ...


class Tokenizer(Protocol):
    """`transformers.PreTrainedTokenizerBase`."""

    name_or_path: str
    chat_template: str | None
    eos_token_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        return_dict: bool,
    ) -> list[int]: ...
