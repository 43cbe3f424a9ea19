"""Simulated crashes: the home is copied after each step, and every copy must open."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvshare_store.config import StoreConfig
from kvshare_store.maintenance.check import check_blocks, check_tree
from kvshare_store.store import Store
from tests.support.oracle import Driver, prompt

Config = Callable[..., StoreConfig]
OLD, NEW = prompt(1, 40), prompt(2, 24)


class Copy(NamedTuple):
    """A copy of the home, as a crash right after `step` would have left it."""

    step: str
    home: Path


def _copied(source: str, target: str) -> None:
    """Copy a file if it is still there: other threads may remove files while the home is copied."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(source, target)


class Crashes:
    """Copies the home after every step that changes it."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.copies: list[Copy] = []
        self._over = False
        self._alone = threading.Lock()
        self._home, self._folder = home, folder

    def copy(self, step: str) -> None:
        """Copy the home now."""
        with self._alone:
            if self._over:
                return
            target = self._folder / f"{len(self.copies):02d}"
            shutil.copytree(self._home, target, copy_function=_copied)
            self.copies.append(Copy(step, target))

    def after(self, function: Callable[..., Any], step: str) -> Callable[..., Any]:
        """The function, with a copy right after each call."""

        def wrapped(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            self.copy(step)
            return result

        return wrapped

    def around(self, function: Callable[..., Any], step: str) -> Callable[..., Any]:
        """The function, with a copy before and after each call."""

        def wrapped(*args: Any, **options: Any) -> Any:
            self.copy(f"before {step}")
            result = function(*args, **options)
            self.copy(f"after {step}")
            return result

        return wrapped

    def end(self) -> list[Copy]:
        """Stop copying; returns all copies so far."""
        self._over = True
        return self.copies

    @property
    def steps(self) -> list[str]:
        """Names of the steps after which a copy was made, each once."""
        return list(dict.fromkeys(copy.step for copy in self.copies))


def opened(copy: Copy, config: Config, original: Driver, **changes: Any) -> Iterator[Driver]:
    """Open a store on the copy. Afterwards files, tree and catalogue must agree."""
    with Store(config(home=str(copy.home), **changes)) as store:
        yield Driver(store, original.namespace, original.book)
        store.collect()
        store.flush()
        files = {file.stem for file in (copy.home / "blocks").glob("*/*")}
        assert files == store.tree.blocks(), copy.step
        assert not list((copy.home / "tmp").iterdir()), copy.step
        assert store.stats()["errors"] == {}, copy.step
        tree = check_tree(store.repository, repair=False)
        assert (tree.problems, tree.garbage) == ((), 0), copy.step
        assert check_blocks(store.repository, tree.blocks, repair=False).problems == (), copy.step


def remote_of(home: Path) -> dict[str, Any]:
    """Settings of a remote that lies in the home and is copied with it, while calls of it wait."""
    return {"remote": f"file://{home / 'remote'}", "remote_timeout_ms": 60_000.0}
