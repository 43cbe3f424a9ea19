"""Huge pages for the arena, where the system has them. Nothing here fails: without, it is slower.

A file in shared memory gets them when its file system is mounted with `huge=advise` (or more), or
when the system forces them: `mount -o remount,huge=advise /dev/shm`.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_MOUNTS = Path("/proc/self/mountinfo")
_POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE` of Linux 5.14: backs pages as a write would, with an error, no signal."""


def offered(folder: Path) -> bool:
    """Whether files in a folder may have huge pages."""
    chosen = _chosen(_SYSTEM)
    return chosen == "force" or (chosen not in ("", "deny") and _mounted_with_huge(folder))


def _chosen(path: Path) -> str:
    """The word in brackets: `always within_size [advise] never`."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _mounted_with_huge(folder: Path) -> bool:
    try:
        mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return False
    holding = [m for m in mounts if folder.resolve().is_relative_to(Path(m[4]))]
    if not holding:
        return False
    innermost = max(enumerate(holding), key=lambda found: (len(found[1][4]), found[0]))[1]
    options = innermost[-1].split(",")
    return any(f"huge={mode}" in options for mode in ("always", "within_size", "advise"))


def advise(mapped: mmap.mmap) -> bool:
    """Ask for huge pages; False if the system cannot."""
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
        populate(mapped, 0, 1)  # an older kernel has no such call
    except (OSError, AttributeError):  # no such advice on this platform
        return False
    return True


def populate(mapped: mmap.mmap, offset: int, nbytes: int) -> None:
    """Back bytes of a mapping with memory now; `OSError` if there is none left."""
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(_POPULATE_WRITE, start, offset + nbytes - start)
