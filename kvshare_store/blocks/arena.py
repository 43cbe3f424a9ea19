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
from pathlib import Path

from kvshare_store.blocks import huge_pages
from kvshare_store.errors import HomeError, LeaseError, NoSpaceError
from kvshare_store.plan import BlockRef

ALIGN = 64
LABEL_BYTES = 64
_NAME_BYTES = 32
_NO_LABEL = bytes(_NAME_BYTES)
_ZEROS = bytes(1 << 20)


def slot_bytes(nbytes: int) -> int:
    """What a slot for `nbytes` bytes of rows takes, label and padding included."""
    return LABEL_BYTES + -(-nbytes // ALIGN) * ALIGN


class Arena:
    """A mapped arena file. `create` owns it, `attach` shares it."""

    def __init__(self, path: Path, descriptor: int, nbytes: int, *, huge: bool = False) -> None:
        self.path = path
        self.nbytes = nbytes
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, nbytes)
        self._view = memoryview(self._map)
        self.huge_pages = huge and huge_pages.advise(self._map)
        """Whether the system was asked for huge pages and did not refuse."""

    @classmethod
    def create(cls, path: Path, nbytes: int, *, huge: bool = False) -> Arena:
        """A new arena readable by its owner only; `HomeError` when memory is too small for it.

        `huge`: in huge pages where the file system has them; without them it is slower, no more.
        """
        try:
            path.unlink(missing_ok=True)  # what a killed owner left would count as taken
            room = os.statvfs(path.parent)
            free = room.f_bavail * room.f_frsize
            if free >= nbytes:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # says that the owner lives
                os.ftruncate(descriptor, nbytes)
                return cls(path, descriptor, nbytes, huge=huge and huge_pages.offered(path.parent))
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
    def descriptor(self) -> int:
        """The file, for whoever is to map it."""
        return self._descriptor

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
            if self.huge_pages:  # a file's allocation knows nothing of what the mapping was advised
                huge_pages.populate(self._map, offset, slot_bytes(nbytes))
            else:
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

    def move(self, source: int, target: int, nbytes: int) -> None:
        """Label and rows of a slot go to a lower offset; the two places may overlap.

        The old label goes first, so a reader whose lease has ended finds out that it is too late.
        """
        self.ensure(target, nbytes)
        name = self.label(source)
        self.set_label(source, "")
        self.set_label(target, "")
        self.rows(target, nbytes)[:] = self.rows(source, nbytes)
        self.set_label(target, name)

    def wipe(self, offset: int, nbytes: int) -> None:
        """Zero a range that no slot holds; the system gets whole pages back where it takes them."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            if first < last:
                self._map.madvise(mmap.MADV_REMOVE, first, last - first)
            else:
                last = first = offset
        except (OSError, AttributeError):  # a file system or a platform that cannot
            last = first = offset
        for start, stop in ((offset, first), (last, offset + nbytes)):
            for at in range(start, stop, len(_ZEROS)):
                self._view[at : min(at + len(_ZEROS), stop)] = _ZEROS[: stop - at]

    def wipe_edges(self, offset: int, nbytes: int) -> None:
        """Zero what rows of `nbytes` bytes leave of their slot, before and after them."""
        for start, stop in (
            (offset + _NAME_BYTES, offset + LABEL_BYTES),
            (offset + LABEL_BYTES + nbytes, offset + slot_bytes(nbytes)),
        ):
            self._view[start:stop] = bytes(stop - start)

    def check(self, ref: BlockRef) -> None:
        """`LeaseError` unless the slot still holds the block that the plan named."""
        if ref.offset < 0 or ref.offset + slot_bytes(ref.nbytes) > self.nbytes:
            raise LeaseError(f"block {ref.name[:12]} is not in the arena")
        if self.label(ref.offset) != ref.name:
            raise LeaseError(f"block {ref.name[:12]} left the arena before it was read")

    def close(self, *, unlink: bool = False) -> None:
        """Let go of the mapping; views handed out keep their memory until they are dropped."""
        if unlink and self.current:
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
