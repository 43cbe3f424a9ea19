"""Which user's process is at the other end of a TCP connection of this machine."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

End = tuple[str, int]
"""IP address and port."""

_TABLES = {4: Path("/proc/net/tcp"), 6: Path("/proc/net/tcp6")}
_LOCAL, _REMOTE, _UID, _INODE = 1, 2, 7, 9


class _Row(NamedTuple):
    local: str
    remote: str
    uid: int
    inode: int


def user_of(client: End, server: End) -> int | None:
    """The user id that owns the client's socket, by the kernel's own table; None if it has none.

    A socket that its process has closed is nobody's any more, though the table says 0 for it.
    """
    local, remote = _written(client), _written(server)
    for row in _rows(_TABLES[ipaddress.ip_address(client[0]).version]):
        if row.local == local and row.remote == remote and row.inode:
            return row.uid
    return None


def _written(end: End) -> str:
    """As the kernel writes it: 32-bit words in the byte order of the machine, then the port."""
    packed = ipaddress.ip_address(end[0]).packed
    words = (int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4))
    return "".join(f"{word:08X}" for word in words) + f":{end[1]:04X}"


def _rows(table: Path) -> Iterator[_Row]:
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        cells = line.split()
        yield _Row(cells[_LOCAL], cells[_REMOTE], int(cells[_UID]), int(cells[_INODE]))
