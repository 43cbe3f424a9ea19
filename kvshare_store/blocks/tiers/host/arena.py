"""The arena: one anonymous memory file that the daemon allocates from and its clients map.

It has no name, so nobody can open it by guessing: the daemon hands its descriptor to clients that
have said hello. It is sealed: its size never changes, and once the daemon has mapped it nobody can
write to it any more, through any descriptor or new mapping. Only the daemon's own mapping can.

Every slot starts with a label: the name of the block in it, a sequence number that is never used
again, and whether its rows are lossy. The owner clears the label before it reuses the slot, so a
reader that finds the same label before and after copying has the very rows that were planned.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import secrets
import struct
from collections.abc import Iterator
from typing import NamedTuple

from kvshare_store.blocks.tiers.host import huge_pages
from kvshare_store.blocks.tiers.host.memory import available_bytes
from kvshare_store.errors import HomeError, LeaseError, NoSpaceError, StorageError
from kvshare_store.errors.wording import short
from kvshare_store.plan import BlockRef

ALIGN = 64
LABEL_BYTES = 64
_LABEL = struct.Struct("<32sQ?")
_NO_LABEL = bytes(_LABEL.size)
_ZEROS = bytes(1 << 20)
_SEAL_FUTURE_WRITE = 0x0010
"""Linux 5.1: no new writable mapping and no write call. Python 3.11 has no name for it."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class Label(NamedTuple):
    """What a slot holds; the empty name means nothing that anybody may read."""

    name: str = ""
    seq: int = 0
    lossy: bool = False


def slot_bytes(nbytes: int) -> int:
    """What a slot for `nbytes` bytes of rows takes, label and padding included."""
    return LABEL_BYTES + -(-nbytes // ALIGN) * ALIGN


class ArenaView:
    """A mapping that reads: rows and labels. `attach` makes one from a descriptor."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._map = mapped
        self._view = memoryview(mapped)
        self.nbytes = len(mapped)

    @classmethod
    def attach(cls, descriptor: int) -> ArenaView:
        """Map a daemon's arena read-only; the descriptor stays the caller's.

        `StorageError` if it is no arena: too small, or a file that could shrink under its readers.
        """
        try:
            nbytes = os.fstat(descriptor).st_size
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if nbytes <= LABEL_BYTES or not seals & fcntl.F_SEAL_SHRINK:
                raise StorageError(
                    f"the daemon's shared memory has {nbytes} bytes and seals {seals:#x}; "
                    "restart the daemon"
                )
            return cls(mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ))
        except StorageError:  # which is an OSError too
            raise
        except (OSError, ValueError) as error:
            raise StorageError(f"the daemon's shared memory cannot be mapped: {error}") from error

    def rows(self, offset: int, nbytes: int) -> memoryview:
        """The rows of the slot at `offset`: live shared memory, valid while leased or reserved."""
        start = offset + LABEL_BYTES
        return self._bytes(start, start + nbytes)

    def _bytes(self, start: int, stop: int) -> memoryview:
        try:
            return self._view[start:stop]
        except ValueError as error:  # its owner has released it
            raise StorageError("the shared memory is closed; open the store again") from error

    def label(self, offset: int) -> Label:
        """The label of the slot at `offset`."""
        raw = bytes(self._bytes(offset, offset + _LABEL.size))
        if raw == _NO_LABEL:
            return Label()
        name, seq, lossy = _LABEL.unpack(raw)
        return Label(name.hex(), seq, lossy)

    def check(self, ref: BlockRef) -> None:
        """`LeaseError` unless the slot holds what the plan named: the same block, placed there by
        the same copy, and as exact as it was then."""
        if ref.offset < 0 or ref.offset + slot_bytes(ref.nbytes) > self.nbytes:
            raise LeaseError(f"block {short(ref.name)} is not in the arena")
        if self.label(ref.offset) != (ref.name, ref.seq, ref.lossy):
            raise LeaseError(f"block {short(ref.name)} left the arena before it was read")


class Arena(ArenaView):
    """The owner's side: `create` makes the file, and only this mapping can write to it."""

    def __init__(self, descriptor: int, mapped: mmap.mmap, *, huge: bool = False) -> None:
        super().__init__(mapped)
        self.id = secrets.token_hex(16)
        """Identifies this arena; plans name it."""
        self.descriptor = descriptor
        """For clients that are to map it; closed by `close`."""
        self._seqs = itertools.count(1)
        self.huge_pages = huge and huge_pages.advise(mapped)
        """Whether the system was asked for huge pages and did not refuse."""

    @classmethod
    def create(cls, nbytes: int, *, huge: bool = False) -> Arena:
        """A new arena; `HomeError` if the machine does not have that much memory to give. `huge`:
        use huge pages where the system has them; without them the arena is only slower."""
        room = available_bytes()
        if nbytes > room:
            raise HomeError(
                f"{room:,} bytes of memory are available, host_bytes asks for {nbytes:,}: "
                "lower host_bytes, or raise the memory limit of this container or service"
            )
        try:
            descriptor = os.memfd_create("kvshare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (OSError, AttributeError) as error:
            raise HomeError(f"this system has no anonymous memory files: {error}") from error
        try:
            os.ftruncate(descriptor, nbytes)
            mapped = mmap.mmap(descriptor, nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except (OSError, ValueError) as error:
            os.close(descriptor)
            raise _refused(nbytes, error) from error
        return cls(descriptor, mapped, huge=huge and huge_pages.offered())

    def ensure(self, offset: int, nbytes: int) -> None:
        """Back the slot with real memory now: running out is an error here, and a signal later."""
        try:
            if self.huge_pages:  # a file's allocation knows nothing of what the mapping was advised
                huge_pages.populate(self._map, offset, slot_bytes(nbytes))
            else:
                os.posix_fallocate(self.descriptor, offset, slot_bytes(nbytes))
        except OSError as error:
            raise NoSpaceError(f"shared memory is full: {error.strerror}") from error

    def set_label(self, offset: int, name: str, *, lossy: bool = False) -> int:
        """Label a slot whose rows are complete as block `name`; returns the sequence number."""
        seq = next(self._seqs)
        self._write_label(offset, Label(name, seq, lossy))
        return seq

    def clear_label(self, offset: int) -> None:
        """Clear the label: the slot belongs to no block."""
        self._bytes(offset, offset + _LABEL.size)[:] = _NO_LABEL

    def _write_label(self, offset: int, label: Label) -> None:
        raw = _LABEL.pack(bytes.fromhex(label.name), label.seq, label.lossy)
        self._bytes(offset, offset + _LABEL.size)[:] = raw

    def move(self, source: int, target: int, nbytes: int) -> None:
        """Move label and rows of a slot to a lower offset; the two ranges may overlap. The old
        label is cleared first, so a reader whose lease has ended notices that it is too late."""
        self.ensure(target, nbytes)
        label = self.label(source)
        self.clear_label(source)
        self.clear_label(target)
        self.rows(target, nbytes)[:] = self.rows(source, nbytes)
        self._write_label(target, label)

    def wipe(self, offset: int, nbytes: int) -> None:
        """Zero a range that no slot holds. Pages that were never written are zero and stay without
        memory; the others keep their memory, because the seal forbids to return it."""
        for start, stop in self._written(offset, offset + nbytes):
            for at in range(start, stop, len(_ZEROS)):
                self._bytes(at, min(at + len(_ZEROS), stop))[:] = _ZEROS[: stop - at]

    def _written(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that are backed by memory."""
        while start < stop:
            try:
                start = os.lseek(self.descriptor, start, os.SEEK_DATA)
            except OSError:  # nothing but holes from here on
                return
            end = min(stop, os.lseek(self.descriptor, start, os.SEEK_HOLE))
            if start < end:
                yield start, end
            start = end

    def wipe_edges(self, offset: int, nbytes: int) -> None:
        """Zero the unused bytes before and after `nbytes` bytes of rows in their slot."""
        for start, stop in (
            (offset + _LABEL.size, offset + LABEL_BYTES),
            (offset + LABEL_BYTES + nbytes, offset + slot_bytes(nbytes)),
        ):
            self._bytes(start, stop)[:] = bytes(stop - start)

    def close(self) -> None:
        """Let go of the file and of this mapping: the memory is free once no client maps it.

        Rows that were handed out keep their memory until they are dropped.
        """
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self._view.release()
            with contextlib.suppress(BufferError):
                self._map.close()


class Arenas:
    """Arenas that daemons have handed to this process, by id. A restarted daemon has a new one."""

    def __init__(self) -> None:
        self._mapped: dict[str, ArenaView] = {}

    def add(self, arena_id: str, descriptor: int) -> None:
        """Map an arena that a daemon has handed over, replacing the previous one; closes the
        descriptor. `StorageError` if it cannot be mapped."""
        try:
            if arena_id not in self._mapped:
                self._mapped = {arena_id: ArenaView.attach(descriptor)}
        finally:
            os.close(descriptor)

    def at(self, arena_id: str) -> ArenaView:
        """The arena with that id; `LeaseError` if it is not the present daemon's."""
        arena = self._mapped.get(arena_id)
        if arena is None:
            raise LeaseError("the rows lie in the memory of another daemon than the one of now")
        return arena

    def __contains__(self, arena_id: str) -> bool:
        return arena_id in self._mapped


def _refused(nbytes: int, error: OSError | ValueError) -> HomeError:
    """What to do about an arena that the system refuses. A kernel without the last seal says that
    it is invalid."""
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return HomeError("shared memory cannot be sealed: Linux 5.1 or later is needed")
    return HomeError(
        f"{nbytes:,} bytes of shared memory cannot be had ({error}): raise this process's limits "
        "(ulimit -f and -v, LimitFSIZE= and LimitAS=), or lower host_bytes"
    )
