"""Archives: nodes and their blocks in one file, to keep or to move to another store.

After the magic come records: kind (1 byte), length (8 bytes, little-endian), body. A namespace and
a node are MessagePack, a block is a frame as in the disk tier. The last record is the BLAKE3 hash
of all bytes before it. Nothing is read as code. An archive is read twice: first all of it is
verified, then nodes are taken from it, so a damaged one changes nothing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import blake3
import msgspec

from kvshare_store.config import policy_names
from kvshare_store.errors import (
    ConfigError,
    CorruptBlockError,
    KVShareError,
    PlanError,
    ShortBlockError,
)
from kvshare_store.errors.wording import short
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import MOST_GENERATIONS, NODE_FORMAT, Node, check_node, decode_node
from kvshare_store.tensors.frame import Block, decode_frame, split_frame

MAGIC = b"KVSHARE ARCHIVE 1\n"
_RECORD = struct.Struct("<cQ")
NAMESPACE, BLOCK, NODE, _END = b"S", b"B", b"N", b"E"
_LONGEST = 1 << 32
"""Bytes of the largest record that a sound archive can have."""
_HASHED = 1 << 20


class Writer:
    """Writes an archive into a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = blake3.blake3()
        self._write(MAGIC)

    def _write(self, data: bytes | memoryview | bytearray) -> None:
        self._hash.update(data)
        self._file.write(data)

    def put(self, kind: bytes, *parts: bytes | memoryview | bytearray) -> None:
        """Write a record made of several parts."""
        self._write(_RECORD.pack(kind, sum(len(part) for part in parts)))
        for part in parts:
            self._write(part)

    def end(self) -> None:
        """Write the last record, without which an archive counts as cut off."""
        digest = self._hash.digest()
        self._file.write(_RECORD.pack(_END, len(digest)) + digest)


# --- reading --------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a verified archive holds, and where each block begins."""

    namespaces: dict[str, Namespace]
    nodes: list[Node]
    blocks: dict[str, tuple[int, int]]
    facts: dict[str, tuple[str, int]]
    """By block: its namespace, and the bytes of its rows."""


def verified(file: BinaryIO, path: Path) -> Contents:
    """Read and verify a whole archive.

    `ConfigError` for a file that is no archive, `ShortBlockError` for one that is cut off,
    `CorruptBlockError` for one that is damaged.
    """
    contents = Contents({}, [], {}, {})
    for kind, at, body in _records(file, path):
        try:
            _take(contents, kind, at, body)
        except (msgspec.DecodeError, ValueError, RecursionError, KVShareError) as error:
            raise CorruptBlockError(f"archive {path} is damaged at byte {at}: {error}") from error
    for node in contents.nodes:
        _check(contents, node, path)
    return contents


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int, bytes]]:
    """Kind, place and body of each record; the last record has the hash of all before it."""
    if file.read(len(MAGIC)) != MAGIC:
        raise ConfigError(f"{path} is no archive of this release; `kvshare export` writes one")
    hasher = blake3.blake3(MAGIC)
    cut = ShortBlockError(f"archive {path} is cut off: copy it again")
    while True:
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            raise cut
        kind, length = _RECORD.unpack(head)
        if length > _LONGEST:
            raise CorruptBlockError(f"archive {path} is damaged at byte {file.tell()}")
        at = file.tell()
        body = _exactly(file, length)
        if body is None:
            raise cut
        if kind == _END:
            if body != hasher.digest() or file.read(1):
                raise CorruptBlockError(f"archive {path} is damaged: its hash does not match")
            return
        hasher.update(head)
        hasher.update(body)
        yield kind, at, body


def _exactly(file: BinaryIO, length: int) -> bytes | None:
    """So many bytes, read piece by piece: a damaged length must not allocate that much memory."""
    pieces = []
    while length:
        piece = file.read(min(length, _HASHED))
        if not piece:
            return None
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _take(contents: Contents, kind: bytes, at: int, body: bytes) -> None:
    if kind == NAMESPACE:
        namespace = msgspec.msgpack.decode(body, type=Namespace)
        contents.namespaces[namespace.digest] = namespace
    elif kind == BLOCK:
        name = split_frame(body)[0].name
        block = decode_frame(body, name)
        if block.lossy:  # no namespace says whose rows these are
            raise PlanError("rows that a codec changed cannot be verified by their name")
        contents.blocks[name] = (at, len(body))
        contents.facts[name] = block.namespace, len(block.data)
    elif kind == NODE:
        contents.nodes.append(decode_node(body))
    else:
        raise PlanError(f"unknown record {kind!r}")


def _check(contents: Contents, node: Node, path: Path) -> None:
    """Check that a node is complete, and that its blocks are of its namespace and of the sizes that
    it says."""
    namespace = contents.namespaces.get(node.namespace)
    if namespace is None:
        raise CorruptBlockError(f"archive {path} lacks the namespace of node {short(node.id)}")
    if node.format > NODE_FORMAT:
        raise ConfigError(f"archive {path} is of a later release: update kvshare-store")
    try:
        check_node(node, namespace.layout.row_bytes)
    except PlanError as error:
        raise CorruptBlockError(f"archive {path}: node {short(node.id)}: {error}") from error
    lacking = [name for name in node.blocks if name not in contents.blocks]
    if lacking:
        raise CorruptBlockError(
            f"archive {path} lacks block {short(lacking[0])} of {short(node.id)}"
        )
    facts = [(node.namespace, nbytes) for nbytes in node.block_bytes]
    moved = any(s.source != s.start for s in node.segments if s.start < node.exact_rows)
    if facts != [contents.facts[name] for name in node.blocks] or moved or not _sane(node):
        raise CorruptBlockError(f"archive {path}: node {short(node.id)} is not what it says")


def _sane(node: Node) -> bool:
    policies = ("", *policy_names()) if node.generation else ("",)
    return (
        node.policy in policies
        and math.isfinite(node.created)
        and node.generation <= MOST_GENERATIONS
    )


def block_at(file: BinaryIO, contents: Contents, name: str) -> Block:
    """A block of a verified archive."""
    at, length = contents.blocks[name]
    file.seek(at)
    return decode_frame(file.read(length), name)
