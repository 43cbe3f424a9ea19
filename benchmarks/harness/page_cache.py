"""Drop files from the page cache, so that the next read comes from disk."""

from __future__ import annotations

import os
from pathlib import Path


def forget(folder: Path) -> None:
    """Drop all files of a folder from the page cache. They must be durable already."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
