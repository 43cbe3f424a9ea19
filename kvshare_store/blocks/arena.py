"""The shared-memory arena: one file that the daemon allocates from and its clients map.

Every slot starts with a label, the name of the block in it. The owner clears the label before it
reuses the slot, so a reader that finds the same name before and after copying has the right rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
from bisect import bisect_left
from pathlib import Path

from kvshare_store.errors import HomeError, LeaseError, NoSpaceError
from kvshare_store.plan import BlockRef

ALIGN = 64
LABEL_BYTES = 64
_NAME_BYTES = 32
_NO_LABEL = bytes(_NAME_BYTES)


def slot_bytes(nbytes: int) -> int:
    """What a slot for `nbytes` bytes of rows takes, label and padding included."""
    return LABEL_BYTES + -(-nbytes // ALIGN) * ALIGN


class Arena:
    """A mapped arena file. `create` owns it, `attach` shares it."""

    def __init__(self, path: Path, descriptor: int, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._descriptor = descriptor
        self._view = memoryview(mmap.mmap(descriptor, nbytes))

    @classmethod
    def create(cls, path: Path, nbytes: int) -> Arena:
        """A new arena readable by its owner only; `HomeError` when memory is too small for it."""
        try:
            path.unlink(missing_ok=True)  # what a killed owner left would count as taken
            room = os.statvfs(path.parent)
            free = room.f_bavail * room.f_frsize
            if free >= nbytes:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # says that the owner lives
                os.ftruncate(descriptor, nbytes)
                return cls(path, descriptor, nbytes)
        except OSError as error:
            raise HomeError(f"arena {path} cannot be made: {error.strerror}") from error
        raise HomeError(
            f"{path.parent} has {free:,} bytes free, host_bytes asks for {nbytes:,}: "
            "lower host_bytes or enlarge it (docker: --shm-size)"
        )

    @classmethod
    def attach(cls, path: Path) -> Arena:
        """Map another process's arena; `HomeError` if it is not there or not this user's."""
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise HomeError(f"arena {path} cannot be mapped: {error.strerror}") from error
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            os.close(descriptor)
            raise HomeError(f"arena {path} is open to other users; remove it and restart")
        return cls(path, descriptor, status.st_size)

    @property
    def current(self) -> bool:
        """Whether the path still names this very file: a new owner makes a new one."""
        try:
            there, ours = os.stat(self.path), os.fstat(self._descriptor)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def ensure(self, offset: int, nbytes: int) -> None:
        """Back the slot with real memory now, where running out is an error and not a signal."""
        try:
            os.posix_fallocate(self._descriptor, offset, slot_bytes(nbytes))
        except OSError as error:
            raise NoSpaceError(f"shared memory is full: {error.strerror}") from error

    def rows(self, offset: int, nbytes: int) -> memoryview:
        """The rows of the slot at `offset`: live shared memory, valid while leased or reserved."""
        start = offset + LABEL_BYTES
        return self._view[start : start + nbytes]

    def label(self, offset: int) -> str:
        """Name of the block in the slot, or the empty string."""
        raw = bytes(self._view[offset : offset + _NAME_BYTES])
        return "" if raw == _NO_LABEL else raw.hex()

    def set_label(self, offset: int, name: str) -> None:
        """Name the slot; the empty name marks it as nobody's."""
        self._view[offset : offset + _NAME_BYTES] = bytes.fromhex(name) if name else _NO_LABEL

    def check(self, ref: BlockRef) -> None:
        """`LeaseError` unless the slot still holds the block that the plan named."""
        if ref.offset < 0 or ref.offset + slot_bytes(ref.nbytes) > self.nbytes:
            raise LeaseError(f"block {ref.name[:12]} is not in the arena")
        if self.label(ref.offset) != ref.name:
            raise LeaseError(f"block {ref.name[:12]} left the arena before it was read")

    def close(self, *, unlink: bool = False) -> None:
        """Let go of the mapping; views handed out keep their memory until they are dropped."""
        if unlink:
            self.path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Delete arenas whose owner died before it could: nobody holds their lock any more."""
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # its owner lives, or it is gone already
            descriptor = os.open(path, os.O_RDWR)
            try:
                if os.fstat(descriptor).st_size:  # an arena in the making has no size yet
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)


class Arenas:
    """Arenas mapped by path. A restarted daemon makes a new file under the same path."""

    def __init__(self) -> None:
        self._mapped: dict[str, Arena] = {}

    def at(self, path: str) -> Arena:
        """The arena at `path` as it is now; `HomeError` if it cannot be mapped."""
        arena = self._mapped.get(path)
        if arena is None or not arena.current:
            if arena is not None:
                arena.close()
            arena = self._mapped[path] = Arena.attach(Path(path))
        return arena

    def close(self) -> None:
        """Let go of every mapping."""
        for arena in self._mapped.values():
            arena.close()


class Allocator:
    """First fit over a sorted free list that joins neighbours. Offsets and sizes in bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used = 0
        self._starts = [0]
        self._sizes = [nbytes]
        self._taken: dict[int, int] = {}

    def allocate(self, size: int) -> int | None:
        """Offset of a free range of `size` bytes, or None."""
        for index, free in enumerate(self._sizes):
            if free >= size:
                offset = self._starts[index]
                self._shrink(index, size)
                self._taken[offset] = size
                self.used += size
                return offset
        return None

    def _shrink(self, index: int, size: int) -> None:
        if self._sizes[index] == size:
            del self._starts[index], self._sizes[index]
        else:
            self._starts[index] += size
            self._sizes[index] -= size

    def free(self, offset: int) -> None:
        """Give a range back; `KeyError` if it is not allocated."""
        size = self._taken.pop(offset)
        self.used -= size
        at = bisect_left(self._starts, offset)
        if at < len(self._starts) and offset + size == self._starts[at]:
            size += self._sizes[at]
            del self._starts[at], self._sizes[at]
        if at > 0 and self._starts[at - 1] + self._sizes[at - 1] == offset:
            self._sizes[at - 1] += size
        else:
            self._starts.insert(at, offset)
            self._sizes.insert(at, size)

    @property
    def largest(self) -> int:
        """The largest range that can still be allocated."""
        return max(self._sizes, default=0)
