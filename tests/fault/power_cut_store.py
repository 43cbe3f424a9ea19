"""A store that saves, pins, forgets and compacts; run under strace by `test_power_cut.py`.

python -m tests.fault.power_cut_store FOLDER: the home is `FOLDER/disk/home`. At every moment at
which the power may be cut the disk is copied to `FOLDER/copies/N` and `MARK/N/KIND/SEEDS` is
recorded: the prompts that a flush has covered by then.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvshare_store.catalog.table import Table
from kvshare_store.store import Store
from tests.fault.test_power_cut import NAMESPACE, settings
from tests.support.oracle import Driver, prompt
from tests.support.power_cut import MARK


class Moments:
    """A moment at which the power may be cut."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.covered: list[int] = []

    def cut(self, kind: str) -> None:
        """Make the copy and the mark now."""
        target = self._folder / "copies" / str(self._count)
        shutil.copytree(self._folder / "disk", target)
        seeds = ",".join(map(str, self.covered))
        os.access(f"{MARK}{self._count}/{kind}/{seeds}", os.F_OK)
        self._count += 1

    def before(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """The function, with a possible power cut right before it."""

        def wrapped(*args: Any) -> Any:
            self.cut(kind)
            return function(*args)

        return wrapped


def main(folder: Path) -> None:
    """Save, pin, forget, compact; a flush after each."""
    moments = Moments(folder)
    Table.sync = moments.before(Table.sync, "commit")  # type: ignore[method-assign]
    with Store(settings(folder / "disk" / "home")) as store:
        engine = Driver(store, NAMESPACE)
        nodes = {}
        for seeds in ([1], [2, 3], [4]):
            saved = threading.Event()
            store.repository.queue.call(saved.wait)  # so that one commit has all of them
            nodes |= {seed: engine.save(prompt(seed, 24)) for seed in seeds}
            saved.set()
            store.flush()
            moments.covered += seeds
            moments.cut("flush")
        store.pin(str(nodes[1]))
        store.flush()
        moments.cut("flush")
        moments.covered.remove(3)
        store.nodes.remove([str(nodes[3])])
        store.flush()
        moments.cut("flush")
        store.collect()
        moments.cut("flush")
        engine.save(prompt(5, 24))
        store.flush()
        moments.covered.append(5)
        moments.cut("flush")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
