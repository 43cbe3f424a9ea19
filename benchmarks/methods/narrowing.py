"""A forward that loses rows on the way: every row enters, only chosen ones go on.

CacheBlend and its kin compute the first layer for all rows, compare fresh with reused K and V, and
let only the rows that deviate go on. Nothing of the model is rewritten for that: a hook before each
layer drops the rows that were not chosen, and an attention function in transformers' registry sees
queries, keys and values and makes the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from kvshare_connectors.transformers.attention import attending, grouped_attention
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.rows import RowCache
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvshare_store.errors import UnsupportedError

_NAME = "kvshare_narrowing"


class Seen(NamedTuple):
    """What a rule sees of the rows that reached a layer, n of them, at the end the last one."""

    query: Tensor
    """`[heads, n, head_dim]`, rotated."""
    keys: Tensor
    """`[kv_heads, slots, head_dim]`: of all positions, fresh where a row reached this layer."""
    fresh: Tensor
    """`[2, n, kv_heads, head_dim]`: K and V just computed."""
    stored: Tensor
    """The same rows as the donor had them."""
    positions: Tensor
    """int64 `[n]`, ascending."""
    scaling: float


Rule = Callable[[Seen], Tensor]
"""A score `[n]`; the highest go on."""


class Narrowing(AbstractContextManager["Narrowing"]):
    """While entered, one forward over every row of `cache`'s prompt narrows to what `rule` picks.

    `forced` bool `[slots]`: rows that go on at every layer (placeholders, the last position).
    `counts`: for a layer's index, how many rows that are not forced go on from there.
    What is not chosen keeps its stored rows from that layer on. `computed` says afterwards how many
    rows each layer needed; the queries of a choosing layer that are dropped after it are not
    counted, since a choice needs no more than K and V (and, for rules that look at attention, the
    last queries).
    """

    def __init__(
        self,
        engine: RowEngine,
        cache: RowCache,
        forced: Tensor,
        counts: Mapping[int, int],
        rule: Rule,
    ) -> None:
        if engine.model.config._attn_implementation != "sdpa":
            raise UnsupportedError("narrowing needs a model with the attention function `sdpa`")
        self._engine, self._cache, self._forced = engine, cache, forced
        self._counts, self._rule = dict(counts), rule
        self._stored = cache.rows.clone()
        self.rows = torch.arange(cache.slots)
        self._undo = ExitStack()
        self.computed: list[int] = []

    def __enter__(self) -> Narrowing:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, self._attend)
        self._undo.enter_context(attending(self._engine.model, _NAME))
        for layer in self._engine.model.model.layers:
            hook = layer.register_forward_pre_hook(self._drop, with_kwargs=True)
            self._undo.callback(hook.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    @property
    def mean_computed(self) -> float:
        """Rows computed, averaged over the layers."""
        return sum(self.computed) / len(self.computed)

    def _drop(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer: leave the rows behind that were not chosen at the one before."""
        hidden, rows = args[0], self.rows
        if hidden.shape[1] != len(rows):
            hidden = hidden[:, self._going]
        cos, sin = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = cos[:, rows], sin[:, rows]
        kwargs["attention_mask"] = kwargs["attention_mask"][:, :, rows]
        kwargs["position_ids"] = kwargs["position_ids"][:, rows]
        self._cache.aim(rows[None])
        return (hidden, *args[1:]), kwargs

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
    ) -> Any:
        """The layer's attention, after the choice: rows not chosen lie there as stored again."""
        layer = module.layer_idx
        wanted = self._counts.get(layer)
        if wanted is not None:
            self._going = self.choose(layer, query[0], key[0], wanted, module.scaling)
            dropped = torch.ones(len(self.rows), dtype=torch.bool)
            dropped[self._going] = False
            at = self.rows[dropped]
            self._cache.rows[layer, :, 0, at] = self._stored[layer, :, 0, at]
            self.rows = self.rows[self._going]
        self.computed.append(len(self.rows))
        return grouped_attention(module, query, key, value, mask, **kwargs)

    def choose(
        self, layer: int, query: Tensor, keys: Tensor, wanted: int, scaling: float
    ) -> Tensor:
        """Indices, ascending, of the rows that go on."""
        rows = self.rows
        seen = Seen(
            query,
            keys,
            self._cache.rows[layer, :, 0, rows],
            self._stored[layer, :, 0, rows],
            rows,
            scaling,
        )
        forced = self._forced[rows]
        scores = self._rule(seen).float().cpu().masked_fill(forced, torch.inf)
        count = min(len(rows), wanted + int(forced.sum()))
        return scores.topk(count).indices.sort().values
