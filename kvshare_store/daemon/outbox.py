"""The outbox: a memory file of the client, from which the daemon copies the rows of a save.

The client never writes to memory that others read. The daemon does not map the outbox but reads it
with `preadv`. So a client that truncates the file, or goes on writing, damages only its own save.
"""

from __future__ import annotations

import os
from typing import Any

from kvshare_store.errors import PlanError, StorageError


class Outbox:
    """The client's side. It holds the rows of one prompt at a time."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("kvshare-outbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def write(self, offset: int, data: Any) -> int:
        """Put bytes at an offset; returns how many. `StorageError` if there is no memory left."""
        left = memoryview(data).cast("B")
        total = len(left)
        try:
            while len(left):
                written = os.pwrite(self.descriptor, left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise StorageError(f"no memory for rows to be saved: {error.strerror}") from error
        return total

    def clear(self) -> None:
        """Return the memory to the system."""
        os.ftruncate(self.descriptor, 0)

    def close(self) -> None:
        """Close the file; a daemon that is still reading from it keeps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Received:
    """The daemon's side, a `RowSource`. `descriptor`: of the memory file, or -1 for none."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_into(self, offset: int, target: memoryview) -> None:
        """As `RowSource`."""
        while len(target):
            try:
                count = os.preadv(self._descriptor, [target], offset)
            except OSError as error:
                raise PlanError(f"the client's outbox cannot be read: {error.strerror}") from error
            if not count:
                raise PlanError(f"the client's outbox ends at byte {offset}, before its last row")
            target, offset = target[count:], offset + count
