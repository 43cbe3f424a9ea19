"""Temporary folders in memory: on a disk every second test waits for fsync."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in there
_ROOM_BYTES = 4 << 30
"""More than what tests have there at one time."""


def keep_in_memory() -> None:
    """Let what this process and its children make with `tempfile` lie in memory, unless `TMPDIR`
    says where, there is little room, or nothing there may be executed, as in some containers. No
    test needs a disk: none cuts the power, and a file system in memory outlives a killed process as
    a disk does."""
    if "TMPDIR" in os.environ or not os.access(_MEMORY, os.W_OK):
        return
    found = os.statvfs(_MEMORY)
    if found.f_bavail * found.f_frsize < _ROOM_BYTES or found.f_flag & os.ST_NOEXEC:
        return
    folder = _MEMORY / f"kvs-{os.getuid()}"  # the names of sockets must not be long
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
