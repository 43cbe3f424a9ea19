"""Unfinished files: written under names of their own, then renamed.

The home has one owner, so what is under `tmp/` when the tier opens was left by one that is gone.
"""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path

from kvshare_store.blocks.tiers.disk import files


class Scratch:
    """The unfinished files of one disk tier. Thread-safe once it is open."""

    def __init__(self, folder: Path) -> None:
        self._tmp = str(folder / "tmp")
        self._writer = uuid.uuid4().hex
        self._numbers = itertools.count()

    def open(self) -> None:
        """Remove what was left; `OSError` if refused."""
        files.make_folder(self._tmp)
        for name in files.names(self._tmp):
            files.remove(f"{self._tmp}/{name}")

    def path(self) -> str:
        """A name that no other unfinished file has or had."""
        return f"{self._tmp}/{self._writer}.{next(self._numbers)}"
