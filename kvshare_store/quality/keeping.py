"""What was learned, in a file of the home: written whole, renamed into place, checked when read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import blake3
import msgspec

from kvshare_store.blocks.tiers.disk import files
from kvshare_store.errors import CorruptBlockError
from kvshare_store.keys import seal, unseal
from kvshare_store.quality.evidence import Evidence, Learned

NAME = "quality"
"""Of the file in the home, and of its key."""
_DIGEST = 32
_PURPOSE = b"quality"
_MOST_BYTES = 16 << 20
"""Of a file that is read: almost a quarter more than the 12.9 MiB that the most classes and
namespaces take when each has scores of every policy and every part."""


class Kept(msgspec.Struct):
    """The file's content."""

    ladder: str
    """Names what the policies of the ladder mean. What was learned under others does not count."""
    classes: dict[str, dict[str, Learned]] = msgspec.field(default_factory=dict)
    """By namespace and traffic, least recently used first."""
    floors: dict[str, Evidence] = msgspec.field(default_factory=dict)
    """By namespace: of controls."""


class Packed(msgspec.Struct):
    """As `Kept`, for writing: each part is encoded already, so that nobody changes it meanwhile."""

    ladder: str
    classes: dict[str, dict[str, msgspec.Raw]]
    floors: dict[str, msgspec.Raw]


def pack(part: Learned | Evidence) -> msgspec.Raw:
    """One part of a `Packed`."""
    return msgspec.Raw(msgspec.msgpack.encode(part))


class File:
    """One file. Errors are `OSError`s; what is no such file, or damaged, is `CorruptBlockError`."""

    def __init__(self, path: Path, key: bytes | None = None) -> None:
        """`key`: of AES-256; None writes in clear."""
        self._path = str(path)
        self._key = key

    def read(self) -> Kept | None:
        """None if there is none."""
        size = files.measure(self._path)
        if size is None:
            return None
        if size[0] > _MOST_BYTES:
            raise CorruptBlockError(f"{self._path} has {size[0]:,} bytes, which is too large")
        raw = bytes(files.read(self._path))
        text = bytes(unseal(self._key, raw, _PURPOSE)) if self._key else raw
        digest, body = text[:_DIGEST], text[_DIGEST:]
        if blake3.blake3(body).digest() != digest:
            raise CorruptBlockError(f"{self._path} is torn")
        try:
            return msgspec.msgpack.decode(body, type=Kept)
        except msgspec.DecodeError as error:
            raise CorruptBlockError(f"{self._path} is of another release: {error}") from error

    def encode(self, kept: Kept | Packed) -> bytes | bytearray:
        """The bytes of the file."""
        body = msgspec.msgpack.encode(kept)
        text = blake3.blake3(body).digest() + body
        return seal(self._key, text, _PURPOSE) if self._key else text

    def write(self, encoded: bytes | bytearray) -> None:
        """Durable when this returns."""
        unfinished = self._path + ".new"
        files.discard(unfinished)
        files.write(unfinished, [encoded])
        files.rename(unfinished, self._path)
        files.sync_folder(os.path.dirname(self._path))

    def reseal(self, key: bytes) -> None:
        """Seal the file with another key. One that cannot be read, which it cannot if it has that
        key already, stays as it is."""
        with contextlib.suppress(CorruptBlockError):
            kept = self.read()
            if kept is not None:
                other = File(Path(self._path), key)
                other.write(other.encode(kept))
