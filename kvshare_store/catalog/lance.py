"""LanceDB's errors and files: what is damage, what only bars the way to them. And its SQL."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvshare_store.errors import FullDiskError, KVShareError, StorageError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_MANIFEST = re.compile(r"(\d+)\.manifest")
_COUNTED_DOWN = 20
"""Digits of a manifest's name that begins with the highest number, so that the newest is first."""


@contextmanager
def lance_errors() -> Iterator[None]:
    """Turn LanceDB's errors into ours. It also raises panics of its Rust code, as `Exception`s of a
    type that no module exports, so all exceptions are caught."""
    try:
        yield
    except KVShareError:
        raise
    except Exception as error:
        full = _os_errors(error) & {errno.ENOSPC, errno.EDQUOT}
        kind = FullDiskError if full else StorageError
        raise kind(f"catalogue refused: {error}") from error


def is_damage(error: StorageError, *, shared: bool) -> bool:
    """Whether a file of a table is damaged. Too many open files, missing permissions or a network
    failure are not damage: then nothing is given up."""
    bad_medium = () if shared else (errno.EIO, errno.EUCLEAN)
    return _os_errors(error) <= {errno.ENOENT, *bad_medium}


def _os_errors(error: Exception) -> set[int]:
    return {int(code) for code in _OS_ERROR.findall(str(error))}


def newest_version(folder: Path) -> Path | None:
    """The manifest of the newest version of a table, the folder itself where there is none; None
    if there is no such table."""
    if not folder.is_dir():
        return None
    found = manifests(folder)
    return found[-1] if found else folder


def manifests(folder: Path) -> list[Path]:
    """The manifests of a table, the oldest version first."""
    versions = folder / "_versions"
    names = os.listdir(versions) if versions.is_dir() else []
    found = [match for name in names if (match := _MANIFEST.fullmatch(name))]
    return [versions / match[0] for match in sorted(found, key=_number)]


def _number(manifest: re.Match[str]) -> int:
    """Names of one table are all of one kind: numbers, or numbers counted down."""
    number = int(manifest[1])
    return -number if len(manifest[1]) == _COUNTED_DOWN else number


def quoted(ids: Iterable[str]) -> str:
    """Ids as a list in SQL."""
    return ", ".join(f"'{hex_only(each)}'" for each in ids)


def hex_only(digits: str) -> str:
    """Ids go into SQL text, so nothing but hex digits may pass."""
    return f"{int(digits, 16):0{len(digits)}x}"
