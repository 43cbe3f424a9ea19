"""Names for unfinished files, and which unfinished files are garbage.

Several processes may write to one folder. Each holds a lock on a file of its own under `writers/`
for as long as it lives, and begins the names of its unfinished files under `tmp/` with that file's
name. The kernel lets go of the lock of a process that dies, in whatever way it dies and whatever
its process id is called in another container.
"""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path

from kvshare_store.blocks.tiers.disk import files

_GATE = "gate"
"""Held while a writer comes: nobody takes its lock for a dead one's before it has it."""


class Scratch:
    """The unfinished files of one writer. Thread-safe once it is open."""

    def __init__(self, folder: Path) -> None:
        self._tmp, self._writers = str(folder / "tmp"), str(folder / "writers")
        self._writer = uuid.uuid4().hex
        self._lock: int | None = None
        self._numbers = itertools.count()

    def open(self) -> None:
        """Say that this writer lives and remove what dead ones left; `OSError` if refused."""
        files.make_folder(self._tmp)
        files.make_folder(self._writers)
        gate = files.lock(f"{self._writers}/{_GATE}")
        try:
            self._lock = files.lock(f"{self._writers}/{self._writer}")
            self._sweep()
        finally:
            files.unlock(gate)

    def _sweep(self) -> None:
        alive = {self._writer}
        for writer in files.names(self._writers):
            if writer in (_GATE, self._writer):
                continue
            path = f"{self._writers}/{writer}"
            held = files.try_lock(path)
            if held is None:
                alive.add(writer)
                continue
            files.remove(path)
            files.unlock(held)
        for name in files.names(self._tmp):
            if name.partition(".")[0] not in alive:
                files.remove(f"{self._tmp}/{name}")

    def path(self) -> str:
        """A name that no other unfinished file has or had."""
        return f"{self._tmp}/{self._writer}.{next(self._numbers)}"

    def close(self) -> None:
        """This writer has no unfinished files any more."""
        if self._lock is not None:
            files.discard(f"{self._writers}/{self._writer}")
            files.unlock(self._lock)
            self._lock = None
