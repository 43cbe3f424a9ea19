"""Files that are read from disk, not from the system's memory."""

from __future__ import annotations

import os
from pathlib import Path


def forget(folder: Path) -> None:
    """Have the system drop the files of a folder from its cache; they are durable already."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
