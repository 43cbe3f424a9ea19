"""A Hugging Face causal LM that computes any rows of a prompt, by transformers' own modules."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from kvshare_connectors.transformers.attention import NAME as GROUPED
from kvshare_connectors.transformers.attention import attending
from kvshare_connectors.transformers.capability import decline_reason, layout_of, rope_of
from kvshare_connectors.transformers.rows import RowCache
from kvshare_connectors.transformers.types import Model
from torch import Tensor

from kvshare_store.errors import PlanError, UnsupportedError

Context = contextlib.AbstractContextManager[object]


class RowEngine:
    """Computes rows of prompts at any positions in one forward. Not thread-safe.

    `UnsupportedError` when partial prefill would not be exact with this model.
    """

    def __init__(self, model: Model) -> None:
        if reason := decline_reason(model.config):
            raise UnsupportedError(f"KVShare does not serve this model: {reason}")
        self.model = model.eval()
        # what else a user chose, such as eager attention for its soft cap, is left alone
        own = model.config._attn_implementation
        self._attention = GROUPED if own == "sdpa" else own
        self.layout = layout_of(model)
        self.rope = rope_of(model)
        self.device = model.device
        self.dtype = model.dtype

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype | None = None) -> RowEngine:
        """The model of a Hugging Face folder or name, on the first GPU or the CPU.

        Without `dtype` it is bf16 on a GPU and fp32 on a CPU, where few have fast bf16.
        """
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds

        on_gpu = torch.cuda.is_available()
        dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
        return cls(model.to("cuda" if on_gpu else "cpu"))

    def cache(self, slots: int, batch: int = 1) -> RowCache:
        """An empty cache for this model."""
        return RowCache.empty(self.layout, slots, batch=batch, device=self.device)

    @torch.inference_mode()
    def compute(
        self,
        cache: RowCache,
        tokens: Tensor,
        positions: Tensor,
        *,
        logits_at: Sequence[int] = (-1,),
        during: Context | None = None,
    ) -> Tensor:
        """One forward of `tokens` at `positions`, both int64 `[batch, new]`.

        In every layer all new rows are written to their slots before any query attends, and a query
        sees the slots up to its own position: what full prefill computes, if the other slots hold
        what full prefill would. Returns float32 logits `[batch, len(logits_at), vocab]` of the new
        rows with these indices. `during` is entered around the forward.
        """
        if tokens.shape != positions.shape or not tokens.numel():
            raise PlanError(f"{list(tokens.shape)} tokens for {list(positions.shape)} positions")
        if int(positions.max()) >= min(cache.slots, self.rope.positions):
            raise PlanError("positions beyond the cache or beyond the model's context")
        positions = positions.to(self.device)
        cache.aim(positions)
        at = torch.tensor(logits_at, device=self.device)
        with attending(self.model, self._attention), during or contextlib.nullcontext():
            output = self.model(
                input_ids=tokens.to(self.device),
                attention_mask=cache.mask(self.dtype),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=at,
            )
        return output.logits.float()

    def prefill(self, tokens: Sequence[int]) -> tuple[RowCache, Tensor]:
        """Every row of a prompt; its cache and the logits `[vocab]` of its last position."""
        cache = self.cache(len(tokens))
        logits = self.compute(cache, torch.tensor([list(tokens)]), torch.arange(len(tokens))[None])
        return cache, logits[0, 0]

    def partial(self, cache: RowCache, tokens: Sequence[int], positions: Tensor) -> Tensor:
        """The rows at `positions` (int64 `[new]`, ascending, the last one included) of one prompt.

        Returns the logits `[vocab]` of the last position.
        """
        if not len(positions) or int(positions[-1]) != len(tokens) - 1:
            raise PlanError("the last position of a prompt must be computed")
        prompt = torch.tensor(list(tokens))
        logits = self.compute(cache, prompt[positions.cpu()][None], positions[None])
        return logits[0, 0]
