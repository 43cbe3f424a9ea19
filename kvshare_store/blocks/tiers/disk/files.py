"""Every call that the disk tier makes to the file system.

All calls go through `os` and `fcntl` of this module, so that `tests.support.faulty_files` can
replace them and make any one fail. All errors are `OSError`s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvshare_store.errors import CorruptBlockError


def make_folder(path: str) -> bool:
    """Make a folder that only its owner can read; False if there is one."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    return True


def make_durable_folder(path: str) -> None:
    """Make a folder and its missing parents, durably: a power cut loses none of them."""
    above = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(above):
        make_durable_folder(above)
    if make_folder(path):
        sync_folder(above)


def names(folder: str) -> list[str]:
    """Names in a folder, in no order; none if there is no such folder."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def measure(path: str) -> tuple[int, int] | None:
    """Bytes and time of last change in nanoseconds; None if there is no such file or folder."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _open_to_read(path: str) -> int:
    """Open a regular file. `CorruptBlockError` for anything else of that name (a pipe, whose reader
    would wait for ever, a link, a device, a folder); `FileNotFoundError` if there is nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise CorruptBlockError(f"{path} is no regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptBlockError(f"{path} is no regular file")
    return descriptor


def read(path: str) -> memoryview:
    """Read a whole file into memory that belongs to the caller; shorter than the file if reading
    ended early. `FileNotFoundError` if there is none, `CorruptBlockError` if it is no regular
    file."""
    descriptor = _open_to_read(path)
    try:
        # not zeroed first: every byte that is returned has been read
        view = np.empty(os.fstat(descriptor).st_size, np.uint8).data
        at = 0
        while at < len(view):
            got = os.preadv(descriptor, [view[at:]], at)
            if got == 0:
                break
            at += got
        return view[:at]
    finally:
        os.close(descriptor)


def read_beginning(path: str, nbytes: int) -> bytes:
    """The first bytes of a file, at most `nbytes`; errors as `read`."""
    descriptor = _open_to_read(path)
    try:
        return os.read(descriptor, nbytes)
    finally:
        os.close(descriptor)


def write(path: str, parts: Sequence[Any]) -> None:
    """Write a new file, which is durable when this returns. After an error no file is left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            _write_all(descriptor, [memoryview(part).cast("B") for part in parts])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        discard(path)
        raise


def _write_all(descriptor: int, views: list[memoryview]) -> None:
    while views:
        done = os.writev(descriptor, views)
        while views and done >= len(views[0]):
            done -= len(views.pop(0))
        if views:
            views[0] = views[0][done:]


def rename(source: str, target: str) -> None:
    """Give a file its final name, atomically: readers of `target` find the old file or the new
    one."""
    os.replace(source, target)


def remove(path: str) -> bool:
    """Remove a file; False if there was none."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def discard(path: str) -> None:
    """Remove a file if possible. It is not wanted, but nothing relies on its absence."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable. Without this a power cut may lose a rename although the
    file's bytes are durable."""
    sync_file(path)


def sync_file(path: str) -> None:
    """Make the bytes of a file durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
