"""Copies of paged blocks on their way from a GPU to host memory, beside the engine's stream.

The engine's stream copies blocks into a slot of a small ring and goes on. A second stream waits
for that copy alone, moves the slot to pinned memory and records an event. A reader of the host's
copy waits for the event. So rows are never read before they are written, the engine's thread never
waits, and the ring is all the device memory that snapshots take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvshare_store.errors import NoSpaceError

_SLOTS = 8
_SLOT_BYTES = 32 << 20


class Copied(Protocol):
    """An event in a stream: reached once all work queued before it is done."""

    def query(self) -> bool:
        """Whether it was reached."""
        ...

    def synchronize(self) -> None:
        """Wait until it is reached."""
        ...


class Side(Protocol):
    """A second stream of a device."""

    def copy(self, source: Tensor, target: Tensor) -> Copied:
        """Copy `[L, ...]` layer by layer, after all work queued on the caller's stream so far.

        Returns at once. Copies run in the order of the calls.
        """
        ...

    def hold(self, copied: Copied) -> None:
        """Make the caller's stream wait for a copy; the thread goes on."""
        ...


class CudaSide:
    """A stream of its own on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, source: Tensor, target: Tensor) -> Copied:
        # Not the default stream: the engine's thread may have its own, as after graph capture.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for layer, to in zip(source, target, strict=True):
                to.copy_(layer, non_blocking=True)
        copied: Copied = self._stream.record_event(torch.cuda.Event(blocking=True))
        return copied

    def hold(self, copied: Copied) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)


class _Slot(NamedTuple):
    memory: Tensor
    copied: Copied


class SnapshotRing:
    """Device memory of a fixed size that snapshots pass through. For one thread.

    `slot_bytes`: size of a slot; raised to one block of all layers where that is larger.
    """

    def __init__(
        self,
        device: torch.device,
        side: Side | None = None,
        *,
        slots: int = _SLOTS,
        slot_bytes: int = _SLOT_BYTES,
    ) -> None:
        self._device = device
        self._side = CudaSide(device) if side is None else side
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._free: list[Tensor] | None = None
        self._busy: deque[_Slot] = deque()

    def pass_through(self, fill: Callable[[slice, Tensor], None], host: Tensor) -> Copied:
        """Copy blocks to `host` `[L, blocks, ...]`; wait for the result before reading that.

        `fill(blocks, target)` copies some of the blocks to device memory `target`, on the caller's
        stream. A snapshot larger than the ring makes that stream wait for its own copies.
        Raises `NoSpaceError` if other snapshots fill the ring, `torch.OutOfMemoryError` if the
        device has no room for a ring.
        """
        block_bytes = host[:, 0].numel() * host.itemsize
        free = self._retire(block_bytes)
        at_once = self._slot_bytes // block_bytes
        starts = range(0, host.shape[1], at_once)
        if self._busy and len(starts) > len(free):
            raise NoSpaceError("snapshots of other prompts fill the device memory kept for them")
        for start in starts:
            part = slice(start, min(start + at_once, host.shape[1]))
            slot = free.pop() if free else self._overtake()
            target = host[:, part]
            memory = slot[: target.numel() * host.itemsize].view(host.dtype).view(target.shape)
            fill(part, memory)
            self._busy.append(_Slot(slot, self._side.copy(memory, target)))
        return self._busy[-1].copied

    def _retire(self, block_bytes: int) -> list[Tensor]:
        """The free slots. Allocated at first use: earlier, vLLM's sleep mode would own them."""
        if self._free is None:
            self._slot_bytes = max(self._slot_bytes, block_bytes)
            size = self._slots * self._slot_bytes
            with torch.inference_mode(False):
                ring = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._free = list(torch.split(ring, self._slot_bytes))
        while self._busy and self._busy[0].copied.query():
            self._free.append(self._busy.popleft().memory)
        return self._free

    def _overtake(self) -> Tensor:
        """The slot whose copy ends first; the caller's stream writes to it only then."""
        slot = self._busy.popleft()
        self._side.hold(slot.copied)
        return slot.memory
