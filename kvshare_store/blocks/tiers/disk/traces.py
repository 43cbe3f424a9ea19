"""Finds files of a disk tier with bytes of a namespace by reading them, not by what is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvshare_store.blocks.tiers.disk import files
from kvshare_store.errors import CorruptBlockError
from kvshare_store.tensors.frame import MOST_HEADER, read_header


def blocks_of(folder: Path, namespace: str) -> list[str]:
    """Names of the block files whose header names the namespace; `OSError` if refused."""
    blocks = folder / "blocks"
    return [
        Path(entry).stem
        for prefix in files.names(str(blocks))
        for entry in files.names(str(blocks / prefix))
        if _is_of(str(blocks / prefix / entry), namespace)
    ]


def leftovers_of(folder: Path, namespace: str) -> Iterator[str]:
    """Unfinished files of a namespace, and all files in quarantine: a damaged file cannot be
    trusted to name its namespace."""
    for entry in files.names(str(folder / "tmp")):
        path = str(folder / "tmp" / entry)
        if _is_of(path, namespace):
            yield path
    for entry in files.names(str(folder / "quarantine")):
        yield str(folder / "quarantine" / entry)


def _is_of(path: str, namespace: str) -> bool:
    try:
        header, _ = read_header(files.read_beginning(path, MOST_HEADER))
    except (FileNotFoundError, CorruptBlockError):
        return False
    return header.namespace == namespace
