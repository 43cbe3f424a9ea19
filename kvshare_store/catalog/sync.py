"""Makes durable what LanceDB writes, because LanceDB never calls fsync.

LanceDB writes a file under a temporary name, renames it, and never changes it again. So after a
commit the files to sync are those with new names or inodes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kvshare_store.blocks.tiers.disk import files

Known = dict[tuple[str, int], int]
"""Bytes of each entry of a folder, by its name and inode; a folder has none."""


class SyncedFolder:
    """A folder that only LanceDB writes to. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._known: dict[str, Known] = {}
        """What is durable in each folder."""

    def sync(self) -> None:
        """Return once everything in the folder is durable; `OSError` if that is refused."""
        fresh: dict[str, Known] = {}
        self._sync(self._root, fresh)
        self._known = fresh

    def bytes(self, inside: str = "") -> int:
        """Bytes of all files when they were last synced, or of those in one folder."""
        folders = [f"{self._root}/{inside}"] if inside else self._known
        return sum(size for folder in folders for size in self._known.get(folder, {}).values())

    def _sync(self, folder: str, fresh: dict[str, Known]) -> None:
        """Files come before the folder that names them, inner folders before outer ones."""
        known = self._known.get(folder, {})
        found: Known = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                self._sync_entry(entry, known, found, fresh)
            if found.keys() - known.keys():
                files.sync_folder(folder)
        fresh[folder] = found

    def _sync_entry(
        self, entry: os.DirEntry[str], known: Known, found: Known, fresh: dict[str, Known]
    ) -> None:
        name = entry.name, entry.inode()
        if entry.is_dir(follow_symlinks=False):
            self._sync(entry.path, fresh)
            found[name] = 0
        elif name in known:
            found[name] = known[name]
        else:
            with contextlib.suppress(FileNotFoundError):  # an unfinished or an old one: it may go
                files.sync_file(entry.path)
                found[name] = entry.stat(follow_symlinks=False).st_size
