"""How much memory this process may still take: what the machine has, and what its cgroups allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_bytes() -> int:
    """Bytes that can be had without swapping and without reaching the limit of any cgroup."""
    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_rooms()]))


def _cgroup_rooms() -> Iterator[int]:
    """The bytes that each limit of this process's cgroups leaves. A file that is missing sets no
    limit."""
    for folder in _folders():
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            yield limit - used + _reclaimable(folder)


def _folders() -> Iterator[Path]:
    """The cgroups of this process that account for memory, version 2 and 1, and those above."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUPS if not controllers else _CGROUPS / "memory"
        if not controllers or "memory" in controllers.split(","):
            own = root / path.lstrip("/")
            yield from (at for at in (own, *own.parents) if at == root or root in at.parents)


def _number(*files: Path) -> int | None:
    """The number in the first file that has one; `max` is none."""
    for file in files:
        try:
            return int(file.read_text())
        except (OSError, ValueError):
            continue
    return None


def _reclaimable(folder: Path) -> int:
    """Bytes of cached files, which the kernel drops before it refuses memory."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(found.get("total_inactive_file", found.get("inactive_file", "0")))
