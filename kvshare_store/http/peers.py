"""Which user's process is at the other end of a TCP connection of this machine."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

End = tuple[str, int]
"""IP address and port."""

_TABLES = {Path("/proc/net/tcp"): b"", Path("/proc/net/tcp6"): bytes(10) + b"\xff\xff"}
"""And what is written there before an IPv4 address: a socket of either family may have one."""
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
    for table, prefix in _TABLES.items():
        local, remote = _written(client, prefix), _written(server, prefix)
        for row in _rows(table):
            if row.local == local and row.remote == remote and row.inode:
                return row.uid
    return None


def _written(end: End, prefix: bytes) -> str:
    """As the kernel writes it: 32-bit words in the byte order of the machine, then the port."""
    address = ipaddress.ip_address(end[0])
    address = getattr(address, "ipv4_mapped", None) or address
    packed = (prefix if address.version == 4 else b"") + address.packed
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
