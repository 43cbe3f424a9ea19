"""Raw copies of paged blocks: copied on the critical path, unpacked to canonical rows later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple, Self

import torch
from kvshare_connectors.vllm.paged_formats import Format
from kvshare_connectors.vllm.snapshots import Copied
from torch import Tensor

from kvshare_store.errors import LeaseError, PlanError
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.tensors.rope import SERIAL_ELEMENTS


class RawBlocks:
    """Copies of some blocks, in the order of the request, not yet unpacked.

    `release` (or leaving `with`) hands the memory to the next snapshot; without it the memory is
    freed as usual. `copied`: the event to wait for before reading, where a GPU copies.
    """

    def __init__(
        self,
        copies: Tensor,
        form: Format,
        layout: KVLayout,
        buffer: Tensor,
        spare: SpareBuffers,
        copied: Copied | None = None,
    ) -> None:
        self._copies: Tensor | None = copies
        self._format = form
        self._layout = layout
        self.buffer = buffer
        self._spare = spare
        self._copied = copied
        self._released = threading.Lock()

    def rows(self, positions: Tensor, out: Tensor | None = None) -> Tensor:
        """Canonical rows `[L, 2, T, H, D]` of the tokens at `positions` (int64 `[T]`).

        In host memory, from any thread; waits until a GPU's copy is complete. Positions count
        tokens through the snapshot's blocks: the k-th block starts at `k * block_size`. Ascending
        positions are fastest. `out`: where to put the rows, contiguous in D; else a new tensor.
        Raises `PlanError` for a position outside the snapshot, `LeaseError` after `release`.
        """
        copies = self._copies
        if copies is None:
            raise LeaseError("the snapshot was released")
        if self._copied is not None:
            self._copied.synchronize()
        shape = self._layout.shape(len(positions))
        if out is None:
            out = torch.empty(shape, dtype=copies.dtype, device=copies.device)
        if out.shape != shape or out.dtype != copies.dtype:
            raise PlanError(f"{len(positions)} rows need {list(shape)}, got {list(out.shape)}")
        if not len(positions):
            return out
        tokens = copies.shape[3]
        check_range("position", positions, 0, copies.shape[1] * tokens)
        halves = (self._format.keys, self._format.values)
        stored = [_by_layer(half(copies.flatten(0, 1)), len(copies)) for half in halves]
        for piece in _pieces(positions.cpu(), copies):
            for half, tiles in enumerate(stored):
                _unpack(piece, tiles, out[:, half, piece.rows])
        return out

    def release(self) -> None:
        """Give the memory back; only the first call counts. `rows` must not be running."""
        if self._released.acquire(blocking=False):
            self._copies = None
            self._spare.give_back(self.buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class SpareBuffers:
    """Byte buffers in host memory, kept for reuse: page faults of fresh memory cost more than the
    copy. `pinned`: memory that a GPU can copy to asynchronously."""

    def __init__(self, limit: int, *, pinned: bool = False) -> None:
        self._limit = limit
        self._pinned = pinned
        self._spare: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Tensor:
        """The smallest spare buffer of at least `nbytes` bytes, or a new one."""
        with self._lock:
            for index, buffer in enumerate(self._spare):
                if len(buffer) >= nbytes:
                    return self._spare.pop(index)
        # Sizes are powers of two, so that buffers fit later prompts of about the same length.
        size = 1 << max(0, nbytes - 1).bit_length()
        with torch.inference_mode(False):  # it is written again outside of that mode
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(map(len, self._spare))

    def give_back(self, buffer: Tensor) -> None:
        """Keep `buffer` if the limit allows it."""
        with self._lock:
            if len(buffer) + self.nbytes <= self._limit:
                self._spare.append(buffer)
                self._spare.sort(key=len)


class _Piece(NamedTuple):
    """A part of the snapshot that is unpacked at once."""

    blocks: slice
    """Which blocks of the snapshot."""
    tokens: slice
    """Which tokens of each of them, in multiples of 16."""
    wanted: Tensor
    """int64: which of all these tokens, in order."""
    rows: slice
    """Where those go."""


def _pieces(positions: Tensor, copies: Tensor) -> Iterator[_Piece]:
    """How to unpack `positions`.

    On the CPU a piece is a few blocks, which a core's cache holds; elsewhere it is everything.
    """
    blocks, heads, tokens, width = copies.shape[1:]
    at_once = blocks
    if copies.device.type == "cpu":
        at_once = max(1, SERIAL_ELEMENTS // (heads * tokens * width // 2))
    group = positions // (at_once * tokens)
    borders = (group.diff().nonzero().flatten() + 1).tolist()
    for start, end in pairwise([0, *borders, len(positions)]):
        low, high = (int(bound) for bound in positions[start:end].aminmax())
        first, last = low // tokens, high // tokens
        used = slice(0, tokens)
        if first == last:
            used = slice(low % tokens // 16 * 16, min(tokens, high % tokens // 16 * 16 + 16))
        wanted = positions[start:end] - (first * tokens + used.start)
        yield _Piece(slice(first, last + 1), used, wanted, slice(start, end))


def _by_layer(tiles: Tensor, layers: int) -> Tensor:
    return tiles.view(layers, -1, *tiles.shape[1:])


def _unpack(piece: _Piece, tiles: Tensor, rows: Tensor) -> None:
    """Copy the tokens of a piece out of a format's view of all layers.

    `tiles`: `[L, B, N/n, n, H, D/d, d]`; `rows`: `[L, T, H, D]`.
    """
    width = tiles.shape[3]
    tiles = tiles[:, piece.blocks, piece.tokens.start // width : piece.tokens.stop // width]
    found = tiles[0, ..., 0, 0, 0].numel()
    if torch.equal(piece.wanted, torch.arange(found)):
        for layer, target in zip(tiles, rows.view(tiles.dtype).view(tiles.shape), strict=True):
            _copy(layer, target)
        return
    scratch = rows.new_empty((found, *rows.shape[2:]))
    target = scratch.view(tiles.dtype).view(tiles.shape[1:])
    wanted = piece.wanted.to(rows.device)
    for layer, to in zip(tiles, rows, strict=True):
        _copy(layer, target)
        torch.index_select(scratch, 0, wanted, out=to)


def _copy(tiles: Tensor, target: Tensor) -> None:
    """Copy `[B, N/n, n, H, D/d, d]`, on the CPU without other threads."""
    heads = tiles.shape[3]
    step = heads
    if tiles.device.type == "cpu":
        step = max(1, SERIAL_ELEMENTS * heads // tiles.numel())
    if step >= heads:
        target.copy_(tiles)
        return
    for part, to in zip(torch.split(tiles, step, 3), torch.split(target, step, 3), strict=True):
        to.copy_(part)


def check_range(what: str, numbers: Tensor, low: int, end: int) -> None:
    least, most = (int(bound) for bound in numbers.aminmax())
    if least < low or most >= end:
        raise PlanError(f"{what}s {least}..{most} are outside {low}..{end - 1}")
