"""Huge pages for the arena, where the system has them. Nothing here fails: without them the arena
is only slower.

An anonymous memory file gets them only by a setting of the system: `echo advise >
/sys/kernel/mm/transparent_hugepage/shmem_enabled`.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE` of Linux 5.14: backs pages as a write would, with an error, no signal."""


def offered() -> bool:
    """Whether anonymous memory files may have huge pages."""
    try:  # the word in brackets: `always within_size [advise] never deny force`
        chosen = _SYSTEM.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return False
    return chosen in ("always", "within_size", "advise", "force")


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
