"""The KV editor: a plan and its blocks become the request's rows (paper §4.2).

Spans are gathered from blocks; K of a row that moved is rotated once, from the position it was
computed at. Exact rows are copied and touched by no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from kvshare_store.errors import PlanError, UnsupportedError
from kvshare_store.plan import BlockRef
from kvshare_store.plan.spans import Span, of_used_blocks
from kvshare_store.tensors.dtypes import DTYPES
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.tensors.rope import Rope


class EditedRows(NamedTuple):
    """Rows of a request and where they go."""

    rows: torch.Tensor
    """`[layers, 2, T, kv_heads, head_dim]`. Belongs to the editor; its next edit overwrites it."""
    positions: torch.Tensor
    """int64 `[T]`, ascending request positions."""


class Editor:
    """Gathers rows of one layout and moves them on `device`. Not thread-safe: one buffer."""

    def __init__(
        self, layout: KVLayout, rope: Rope | None, device: torch.device | str = "cpu"
    ) -> None:
        self.layout = layout
        self._device = device
        self._rope = rope
        self._dtype = DTYPES[layout.dtype]
        self._words = torch.uint32 if layout.itemsize == 4 else torch.uint16
        self._scratch = torch.empty(0, dtype=self._dtype)

    def edit(
        self,
        spans: Sequence[Span],
        blocks: Sequence[BlockRef],
        rows_of: Callable[[BlockRef], Any],
        on_device: Callable[[BlockRef], torch.Tensor | None] = lambda ref: None,
    ) -> EditedRows:
        """Rows of all `spans`, side by side in ascending order.

        `rows_of` gives a block's bytes in canonical order; `on_device` its rows, where they are on
        the editor's device already. Neither is asked for a block that no span uses: its rows need
        not be there. `PlanError` if a span reaches beyond its block or says that lossy rows are
        exact; `UnsupportedError` if one moved and the model's rotary table is not known.
        """
        spans, used = of_used_blocks(spans)
        blocks = [blocks[index] for index in used]
        for span in spans:
            if span.row + span.length > blocks[span.block].rows:
                raise PlanError(f"span {span} reaches beyond its block")
            if span.exact and blocks[span.block].lossy:
                raise PlanError(f"span {span} is of lossy rows and cannot be exact")
        resident = [on_device(block) for block in blocks]
        rows = self.gathered(spans, blocks, rows_of, resident)
        rows = rows.to(self._device)  # rows move where they are used: a GPU does it in no time
        at = 0
        for span in spans:
            held = resident[span.block]
            if held is not None:
                rows[:, :, at : at + span.length] = held[:, :, span.row : span.row + span.length]
            at += span.length
        target = _positions((span.start, span.length) for span in spans)
        if any(span.source != span.start for span in spans):
            if self._rope is None:
                raise UnsupportedError("rows cannot move without the model's rotary table")
            sources = _positions((span.source, span.length) for span in spans)
            self._rope.move(rows[:, 0], sources, target)
        return EditedRows(rows, target)

    def gathered(
        self,
        spans: Sequence[Span],
        blocks: Sequence[BlockRef],
        rows_of: Callable[[BlockRef], Any],
        resident: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """Rows of all spans in host memory; those of resident blocks are left as they are."""
        rows = self._buffer(sum(span.length for span in spans))
        # plain copies by numpy: a parallel region for each span costs more than the copy
        words = rows.view(self._words).numpy()
        views = [
            self.layout.words(rows_of(block), block.rows) if held is None else None
            for block, held in zip(blocks, resident, strict=True)
        ]
        at = 0
        for span in spans:
            view = views[span.block]
            if view is not None:
                source = view[:, :, span.row : span.row + span.length]
                words[:, :, at : at + span.length] = source
            at += span.length
        return rows

    def tensor(self, buffer: Any, rows: int) -> torch.Tensor:
        """A canonical view of `rows` rows in a writable bytes-like object."""
        return torch.frombuffer(buffer, dtype=self._dtype).view(self.layout.shape(rows))

    def _buffer(self, rows: int) -> torch.Tensor:
        """Fresh pages cost as much as the copy itself, so the largest buffer so far is kept."""
        shape = self.layout.shape(rows)
        elements = self.layout.row_bytes // self.layout.itemsize * rows
        if self._scratch.numel() < elements:
            self._scratch = torch.empty(elements, dtype=self._dtype)
        return self._scratch[:elements].view(shape)


def _positions(runs: Any) -> torch.Tensor:
    pieces = [torch.arange(start, start + length) for start, length in runs]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
