"""Moves K from one position to another.

K is stored after RoPE: in each frequency the pair `(x, y)` of K was rotated by the angle of its
position. Rotating it further by the difference of two angles moves it. The angles are rows of the
model's own cos/sin table and never computed from a formula, so every scaling whose table depends on
the position alone is covered (default, linear, llama3, YaRN with its magnitude).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from kvshare_store.errors import NamespaceError, PlanError

SERIAL_ELEMENTS = (1 << 15) - 1
"""The most elements of one operation on the CPU. From 2**15 elements on PyTorch splits an operation
over its threads. Each of the hundreds of small operations here would then wait for threads that
something else may be using: a third faster on an idle machine, ten to a hundred times slower on a
busy one. It also keeps the working set in a core's cache."""


class Rope:
    """The cos/sin table of one model.

    `cos`, `sin`: `[P, R/2]`, any float dtype; row p holds the angles of position p, times the
    scaling's magnitude if it has one. R is the rotary dimension, at most the head dimension.
    `neox`: pairs are `(i, i + R/2)` (rotate-half); otherwise `(2i, 2i + 1)` (GPT-J).
    """

    def __init__(self, cos: Tensor, sin: Tensor, *, neox: bool) -> None:
        if cos.ndim != 2 or cos.shape != sin.shape or not cos.numel():
            raise NamespaceError(
                f"a RoPE table needs cos and sin of one shape [positions, rotary_dim / 2],"
                f" got {list(cos.shape)} and {list(sin.shape)}"
            )
        self.cos = cos
        self.sin = sin
        self.neox = neox

    @classmethod
    def from_cache(cls, cos_sin_cache: Tensor, neox: bool) -> Self:
        """From vLLM's `RotaryEmbedding.cos_sin_cache`: `[P, R]`, cos in the first half of a row.

        Source: vllm/model_executor/layers/rotary_embedding/base.py. A linear-scaling table has
        one such part per scaling factor; the caller must see to it that there is only one.
        """
        if cos_sin_cache.ndim != 2 or cos_sin_cache.shape[1] % 2:
            raise NamespaceError(
                f"a cos/sin cache has shape [positions, rotary_dim],"
                f" got {list(cos_sin_cache.shape)}"
            )
        cos, sin = cos_sin_cache.chunk(2, dim=-1)
        return cls(cos, sin, neox=neox)

    @property
    def positions(self) -> int:
        """P: how many positions the table covers."""
        return self.cos.shape[0]

    @property
    def rotary_dim(self) -> int:
        """R: the leading dimensions of a head that are rotated; the others are not changed."""
        return 2 * self.cos.shape[1]

    def move(self, keys: Tensor, source: Tensor, target: Tensor) -> None:
        """Rotate K in place from `source` to `target` positions.

        `keys`: `[L, T, H, D]`, float, any strides (such as `rows[:, 0]` of canonical rows), K as
        computed at `source`; `source`, `target`: int64 `[T]`. The arithmetic is fp32 with one
        rounding at the end. Rows whose two positions are equal are not written at all.

        Raises `PlanError` if the shapes contradict each other, `NamespaceError` if the heads are
        smaller than the rotary dimension or a position is outside the table; `keys` is then
        unchanged.
        """
        self._check(keys, source, target)
        moved = (source != target).nonzero().flatten()
        rows = moved.numel()
        if not rows or not keys.numel():
            return
        first = int(moved[0])
        one_run = int(moved[-1]) - first + 1 == rows
        at_once = rows
        if keys.device.type == "cpu":
            at_once = max(1, SERIAL_ELEMENTS // (keys.shape[2] * self.rotary_dim))
        for start in range(0, rows, at_once):
            part = moved[start : start + at_once]
            turn = self._turn(keys, source[part], target[part])
            if one_run:
                for layer in keys[:, first + start : first + start + len(part)]:
                    turn.apply(layer)
                continue
            part = part.to(keys.device)
            for layer in keys:
                gathered = layer.index_select(0, part)
                turn.apply(gathered)
                layer.index_copy_(0, part, gathered)

    def _check(self, keys: Tensor, source: Tensor, target: Tensor) -> None:
        if keys.ndim != 4 or source.shape != (keys.shape[1],) or target.shape != source.shape:
            raise PlanError(
                f"keys {list(keys.shape)} are not [layers, tokens, heads, head_dim] with as many"
                f" positions as tokens ({list(source.shape)}, {list(target.shape)})"
            )
        if keys.shape[3] < self.rotary_dim:
            raise NamespaceError(
                f"keys of head dimension {keys.shape[3]} cannot have {self.rotary_dim} rotary"
                " dimensions; the table belongs to another model"
            )
        for positions in (source, target):
            if not positions.numel():
                continue
            low, high = positions.aminmax()
            if low < 0 or high >= self.positions:
                raise NamespaceError(
                    f"positions {int(low)}..{int(high)} are outside the model's RoPE table of"
                    f" {self.positions} positions"
                )

    def _turn(self, keys: Tensor, source: Tensor, target: Tensor) -> _Turn:
        """The rotation from `source` to `target`, for keys like `keys`.

        As complex numbers, `c_target * conj(c_source) / |c_source|^2`: dividing by the square
        takes out the magnitude that the table put into K, and the rounding of a bf16 table.
        """
        old_cos, old_sin = self._angles(source, keys.device)
        new_cos, new_sin = self._angles(target, keys.device)
        square = old_cos.square() + old_sin.square()
        cos = (new_cos * old_cos + new_sin * old_sin) / square
        sin = (new_sin * old_cos - new_cos * old_sin) / square
        return _Turn(cos, sin, heads=keys.shape[2], neox=self.neox)

    def _angles(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        at = positions.to(self.cos.device)
        cos, sin = self.cos.index_select(0, at), self.sin.index_select(0, at)
        return cos.to(device, torch.float32), sin.to(device, torch.float32)


class _Turn:
    """Factors and scratch space for rotating `[T, H, D]` keys of one layer after another.

    The factors are repeated for each head, so that every operand has the shape of the scratch
    tensors and none is broadcast; that halves the time.
    """

    def __init__(self, cos: Tensor, sin: Tensor, *, heads: int, neox: bool) -> None:
        tokens, half = cos.shape
        both = torch.cat([cos, cos], -1) if neox else cos.repeat_interleave(2, -1)
        self.cos = both[:, None].expand(tokens, heads, 2 * half).contiguous()
        self.sin = sin[:, None].expand(tokens, heads, half).contiguous()
        self.minus_sin = -self.sin
        self.old = torch.empty_like(self.cos)
        self.new = torch.empty_like(self.cos)
        self.old_x, self.old_y = _pair(self.old, neox)
        self.new_x, self.new_y = _pair(self.new, neox)

    def apply(self, keys: Tensor) -> None:
        """Rotate `keys` `[T, H, D]` in place."""
        rotary = keys[..., : self.old.shape[-1]]
        self.old.copy_(rotary)
        torch.mul(self.old, self.cos, out=self.new)
        self.new_x.addcmul_(self.old_y, self.minus_sin)
        self.new_y.addcmul_(self.old_x, self.sin)
        rotary.copy_(self.new)


def _pair(heads: Tensor, neox: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second coordinate of every pair, each `[T, H, R/2]`."""
    if neox:
        half = heads.shape[-1] // 2
        return heads[..., :half], heads[..., half:]
    return heads[..., 0::2], heads[..., 1::2]
