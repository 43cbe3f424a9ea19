"""Which block files exist: updated by what this process does, corrected by listing folders.

Other processes may write to the same folder, and people delete files. So the folders under
`blocks/` are checked from time to time, and those that have changed are listed again. The first
check goes on while the first requests are served.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

from kvshare_store.blocks.tiers.base import Beside, TierUse
from kvshare_store.blocks.tiers.disk import files
from kvshare_store.errors import FullDiskError, StorageError

_SUFFIX = ".kvb"
_PREFIX = 2
"""Leading letters of a block's name that are the name of its folder."""
_EVERY = 1.0
"""Seconds between two looks at the folders, at least ..."""
_REST = 20
"""... and at least this many times as long as the last look took."""
_SETTLED_NS = 2 * 10**9
"""The resolution of times of change: a folder that changed this recently may change again without
getting a newer time."""

_GONE = (-1, 0)

_PACE = 256
"""Files that a first look in the background measures in one go …"""
_PAUSE = 0.005
"""… and the pause after these in seconds: whoever answers the first requests needs the
processor."""


class Inventory:
    """Names, bytes and order of use of the blocks in a folder, and the budget. Thread-safe.

    Bytes are file lengths: they are known before a file is written, and are the same on every file
    system, unlike the disk blocks that a file takes.
    """

    def __init__(self, folder: Path, budget: int, beside: Callable[[], Beside] = Beside) -> None:
        """`beside`: other files that count in the budget."""
        self._root = str(folder)
        self._budget = budget
        self._beside = beside
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """The least recently used first."""
        self._used = 0
        self._pending = 0
        self._inside: defaultdict[str, set[str]] = defaultdict(set)
        """By folder: the blocks known to be in it, measured or not."""
        self._unmeasured: set[str] = set()
        self._measured: dict[str, tuple[int, int]] = {}
        """Blocks that were asked for before the first look reached them."""
        self._seen: dict[str, int] = {}
        """Time of change of each folder when it was listed."""
        self._looking = threading.Lock()
        self._recent: set[str] = set()
        """Blocks that this process has added or removed since the current look began."""
        self._listed, self._looked = threading.Event(), threading.Event()
        self._wanted = threading.Event()
        """Somebody waits for the first look."""
        self._all_listed = self._complete = False
        self._next_look = 0.0

    def path(self, name: str) -> str:
        """The file of a block."""
        return f"{self._root}/{name[:_PREFIX]}/{name}{_SUFFIX}"

    # --- what this process does ---------------------------------------------------------------

    def reserve(self, nbytes: int) -> None:
        """Reserve bytes for a file that is being written; `FullDiskError` if the budget is full."""
        with self._lock:
            beside, kept_free = self._beside()
            used = self._used + beside
            if used + kept_free + self._pending + nbytes > self._budget:
                raise FullDiskError(f"disk tier holds {used:,} of {self._budget:,} bytes")
            self._pending += nbytes

    def settle(self, nbytes: int, name: str | None) -> None:
        """End a reservation: it has become block `name`, or nothing."""
        with self._lock:
            self._pending -= nbytes
            if name is not None:
                self._add(name, nbytes)

    def add(self, name: str, nbytes: int) -> None:
        """The block exists and was used just now."""
        with self._lock:
            self._add(name, nbytes)

    def _add(self, name: str, nbytes: int) -> None:
        self._used += nbytes - self._sizes.get(name, 0)
        self._sizes[name] = nbytes
        self._sizes.move_to_end(name)
        self._inside[name[:_PREFIX]].add(name)
        self._unmeasured.discard(name)
        self._recent.add(name)

    def forget(self, name: str) -> None:
        """The block does not exist any more."""
        with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._used -= self._sizes.pop(name, 0)
        self._inside[name[:_PREFIX]].discard(name)
        self._unmeasured.discard(name)
        self._recent.add(name)

    def touch(self, name: str) -> None:
        """The block was used just now; unknown names are ignored."""
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)

    # --- what is known ------------------------------------------------------------------------

    def size(self, name: str) -> int | None:
        """Bytes of the block, None if it is not here. Until the first look is over, unknown names
        are looked up one by one; `StorageError` if that fails."""
        size = self._sizes.get(name)
        if size is not None or self._complete:
            return size
        if self._all_listed and name not in self._inside.get(name[:_PREFIX], ()):
            return None
        try:
            found = self._measured.get(name) or files.measure(self.path(name))
        except OSError as error:
            raise StorageError(f"{self._root} cannot be read: {error.strerror}") from error
        if found is None:
            return None
        self._measured[name] = found  # the look need not measure it again
        return found[0]

    def has(self, name: str) -> bool:
        """Whether the block is here: known from the first listing of the folders, which this waits
        for, without a look at the file. `StorageError` as `size`."""
        if name in self._sizes:
            return True
        if not self._all_listed:
            self._listed.wait()
            if not self._all_listed:
                return self.size(name) is not None
        return name in self._inside.get(name[:_PREFIX], ())

    def names(self) -> list[str]:
        """Every block, the least recently used first; those that are not measured yet come first.

        Waits for the first listing of the folders; `StorageError` if that was refused.
        """
        self._listed.wait()
        if not self._all_listed:
            raise StorageError(f"{self._root} cannot be listed")
        with self._lock:
            return [*self._unmeasured, *self._sizes]

    def use(self) -> TierUse:
        """Bytes, budget and blocks; waits for the first look at the folders."""
        self.hurry()
        self._looked.wait()
        return self.counted()

    def counted(self) -> TierUse:
        """As `use`, of what has been looked at so far."""
        with self._lock:
            beside, kept_free = self._beside()
            blocks = len(self._sizes) + len(self._unmeasured)
            return TierUse(self._used + beside, self._budget, blocks, kept_free)

    # --- looking ------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Somebody waits for the first look from now on."""
        self._wanted.set()

    def look(self) -> None:
        """Learn what was added and removed, unless that was done just now; `OSError` if it fails.
        Waits while another look is going on."""
        with self._looking:
            if self._complete and time.monotonic() < self._next_look:
                return
            began = time.monotonic()
            try:
                self._list()
                self._measure()
                self._complete = True
            finally:
                self._looked.set()
                now = time.monotonic()
                self._next_look = now + max(_EVERY, _REST * (now - began))

    def _list(self) -> None:
        with self._lock:
            self._recent.clear()
            known = set(self._inside)
        try:
            for prefix in known.union(n for n in files.names(self._root) if len(n) == _PREFIX):
                self._list_folder(prefix)
            self._all_listed = True
        finally:
            self._listed.set()

    def _list_folder(self, prefix: str) -> None:
        folder = f"{self._root}/{prefix}"
        found = files.measure(folder)
        changed = 0 if found is None else found[1]
        if self._seen.get(prefix) == changed:
            return
        with self._lock:
            known = set(self._inside[prefix])
        there = {
            entry.removesuffix(_SUFFIX)
            for entry in files.names(folder)
            if entry.endswith(_SUFFIX) and entry.startswith(prefix)
        }
        if there - known:
            files.sync_folder(folder)  # another process's rename may not be durable yet
        with self._lock:
            new, gone = there - known - self._recent, known - there - self._recent
            self._inside[prefix] |= new
            self._unmeasured |= new
            for name in gone:
                self._forget(name)
        # nor if the clock was set back: then nothing says how long ago that was
        if time.time_ns() - changed > _SETTLED_NS:
            self._seen[prefix] = changed

    def _measure(self) -> None:
        """What the first look finds is older than what was used meanwhile; later it is newer."""
        first = not self._complete
        with self._lock:
            unmeasured = list(self._unmeasured)
        measured = []
        for count, name in enumerate(unmeasured, 1):
            found = self._measured.get(name) or files.measure(self.path(name)) or _GONE
            measured.append((found, name))
            if count % _PACE == 0:
                self._wanted.wait(_PAUSE)
        measured.sort(key=lambda found: (found[0][1], found[1]), reverse=first)
        for (size, _), name in measured:
            with self._lock:  # for each one anew: others need not wait for all of them
                if name not in self._unmeasured:
                    continue  # this process has added or removed it while it was measured
                if size < 0:
                    self._forget(name)
                    continue
                self._add(name, size)
                if first:
                    self._sizes.move_to_end(name, last=False)
        self._measured.clear()
