"""Catalogues as a wrong clock leaves them. LanceDB reads the clock in its own code, where no test
can change it, so the times are changed in the files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lancedb

_SECONDS = b"\x08"
"""In a manifest, precedes the seconds of its time, a varint."""


def date_ahead(
    catalog: Path, seconds: int, tables: Iterable[str] = ("nodes", "namespaces")
) -> None:
    """Date every version of these tables so far ahead, as if the clock had been set back since, or
    as another machine writes them whose clock is ahead. No store may have them open."""
    for name in tables:
        made = lancedb.connect(str(catalog)).open_table(name).list_versions()
        times = {int(version["timestamp"].timestamp()) for version in made}
        for manifest in (catalog / f"{name}.lance" / "_versions").glob("*.manifest"):
            data = before = manifest.read_bytes()
            for at in times:
                data = data.replace(_SECONDS + _varint(at), _SECONDS + _varint(at + seconds))
            assert not seconds or data != before, "LanceDB writes times in another form now"
            manifest.write_bytes(data)


def _varint(number: int) -> bytes:
    groups = [number >> shift & 0x7F for shift in range(0, number.bit_length(), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])
