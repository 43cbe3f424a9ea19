"""A block as bytes: magic, msgpack header, payload. It describes and verifies itself."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import blake3
import msgspec

from kvshare_store.errors import CorruptBlockError, NamespaceError, ShortBlockError
from kvshare_store.errors.wording import short
from kvshare_store.keys import SEAL_BYTES, seal, unseal
from kvshare_store.tensors.codecs import LOSSY, Codec, decode, encode
from kvshare_store.tensors.layout import KVLayout

__all__ = ["Block", "Codec", "Key", "block_name", "decode_frame", "encode_frame", "split_frame"]

MAGIC = b"KVSB"
VERSION = 2
_PREFIX = struct.Struct("<4sI")
MOST_HEADER = 1 << 12
"""The largest size of a frame's magic and header together."""

Key = Callable[[str], bytes]
"""Gives the AES-256 key of a namespace digest; `NamespaceError` if there is none."""


class Block(msgspec.Struct, frozen=True):
    """Rows of one namespace. `data` is a bytes-like object in canonical order."""

    namespace: str
    layout: KVLayout
    data: Any
    lossy: bool = False
    """A lossy codec has changed the rows: they are not the bytes that the name was computed
    from."""

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.layout.rows_in(len(self.data))


class FrameHeader(msgspec.Struct, frozen=True, array_like=True):
    """What precedes the payload. All of it is in clear but `contents` of an encrypted frame."""

    version: int
    name: str
    namespace: str
    encrypted: bool
    contents: bytes
    """`Contents` as msgpack, sealed in an encrypted frame."""
    payload_bytes: int


class Contents(msgspec.Struct, frozen=True, array_like=True):
    """What the payload is."""

    layout: KVLayout
    codec: Codec
    raw_bytes: int
    lossy: bool
    check: bytes = b""
    """BLAKE3 of all fields above and the payload. Empty where something else verifies every bit:
    the tag of an encrypted frame, or the block's name if the payload is the unchanged rows."""


def block_name(block: Block) -> str:
    """BLAKE3 of namespace, layout and rows, as 64 hex digits.

    Because the namespace is part of the name, equal rows of two tenants never share bytes, and a
    block can be checked to belong to a namespace by its name alone.
    """
    hasher = blake3.blake3(msgspec.msgpack.encode((block.namespace, block.layout)))
    hasher.update(block.data)
    return hasher.hexdigest()


def encode_frame(
    name: str, block: Block, codec: Codec = "none", key: Key | None = None
) -> tuple[bytes, Any]:
    """`(head, payload)` of a block, encrypted if there is a key.

    The payload is the block's own buffer if it is neither packed nor encrypted. For rows that are
    not finite, `none` is used in place of a lossy codec.
    """
    codec, body = encode(codec, block.data, block.layout)
    lossy = block.lossy or codec in LOSSY
    contents = Contents(block.layout, codec, len(block.data), lossy)
    if key is None:
        if lossy or codec != "none":
            check = check_of(name, block.namespace, contents, body)
            contents = msgspec.structs.replace(contents, check=check)
        about = msgspec.msgpack.encode(contents)
        header = FrameHeader(VERSION, name, block.namespace, False, about, len(body))
        return packed_header(header), body
    secret = key(block.namespace)
    sealed = seal(secret, msgspec.msgpack.encode(contents), _whose(name, block.namespace))
    size = len(body) + SEAL_BYTES
    head = packed_header(FrameHeader(VERSION, name, block.namespace, True, bytes(sealed), size))
    return head, seal(secret, body, head)


def decode_frame(frame: bytes | memoryview, name: str, key: Key | None = None) -> Block:
    """Decode and verify a frame.

    `ShortBlockError` if it is cut off. `CorruptBlockError` if it is not exactly block `name`, or if
    it is encrypted and there is no key, or the other way round.
    """
    header, payload = split_frame(frame)
    if header.name != name:
        raise CorruptBlockError(f"frame of block {short(header.name)} is not of {short(name)}")
    if header.encrypted != (key is not None):
        state = "encrypted" if header.encrypted else "not encrypted"
        raise CorruptBlockError(f"block {short(name)} is {state}; the store's setting differs")
    contents, body = _plain(header, payload) if key is None else _opened(header, payload, key)
    data = decode(contents.codec, body, contents.layout, contents.raw_bytes)
    block = Block(header.namespace, contents.layout, data, contents.lossy)
    if not block.lossy and block_name(block) != name:
        raise CorruptBlockError(f"block {short(name)} holds other bytes than its name says")
    return block


def split_frame(frame: bytes | memoryview) -> tuple[FrameHeader, memoryview]:
    """Header and payload of a frame, complete but not yet verified."""
    header, start = read_header(frame)
    payload = memoryview(frame)[start:]
    if len(payload) < header.payload_bytes:
        raise ShortBlockError(f"{len(payload)} of {header.payload_bytes} bytes of payload are here")
    if len(payload) > header.payload_bytes:
        raise CorruptBlockError(f"the payload goes on after {header.payload_bytes} bytes")
    return header, payload


def read_header(frame: bytes | memoryview) -> tuple[FrameHeader, int]:
    """The header of a frame of which only the beginning may be there, and where the payload
    starts."""
    view = memoryview(frame)
    if len(view) < _PREFIX.size:
        raise _cut(view, MAGIC.startswith(view[: len(MAGIC)]))
    magic, length = _PREFIX.unpack_from(view)
    if magic != MAGIC or _PREFIX.size + length > MOST_HEADER:
        raise CorruptBlockError("not a block frame")
    raw = view[_PREFIX.size : _PREFIX.size + length]
    if len(raw) < length:
        raise _cut(view, True)
    try:
        header = msgspec.msgpack.decode(raw, type=FrameHeader)
    except (msgspec.DecodeError, ValueError) as error:
        _check_version(raw)
        raise CorruptBlockError(f"unreadable frame header: {error}") from error
    if header.version != VERSION:
        raise CorruptBlockError(f"frame version {header.version} is not {VERSION}")
    return header, _PREFIX.size + length


def _check_version(raw: memoryview) -> None:
    """Raise an error with the version if this is a header of another version with other fields."""
    with contextlib.suppress(msgspec.DecodeError, ValueError):
        fields = msgspec.msgpack.decode(raw, type=list[Any])
        if fields and isinstance(fields[0], int) and fields[0] != VERSION:
            raise CorruptBlockError(f"frame version {fields[0]} is not {VERSION}")


def _cut(view: memoryview, begins_well: bool) -> CorruptBlockError:
    kind = ShortBlockError if begins_well else CorruptBlockError
    return kind(f"{len(view)} bytes are too few for a frame")


def packed_header(header: FrameHeader) -> bytes:
    """What a frame begins with: magic bytes, the length of the header, the header."""
    encoded = msgspec.msgpack.encode(header)
    return _PREFIX.pack(MAGIC, len(encoded)) + encoded


def _plain(header: FrameHeader, payload: memoryview) -> tuple[Contents, memoryview]:
    contents = _contents(header.contents)
    if contents.lossy or contents.codec != "none":
        check = check_of(header.name, header.namespace, contents, payload)
        if contents.check != check:
            raise CorruptBlockError(f"block {short(header.name)} is damaged")
    return contents, payload


def _opened(header: FrameHeader, payload: memoryview, key: Key) -> tuple[Contents, bytearray]:
    try:
        secret = key(header.namespace)
    except NamespaceError as error:
        raise CorruptBlockError(f"block {short(header.name)} cannot be opened: {error}") from error
    about = unseal(secret, header.contents, _whose(header.name, header.namespace))
    return _contents(about), unseal(secret, payload, packed_header(header))


def _contents(encoded: bytes | bytearray) -> Contents:
    try:
        return msgspec.msgpack.decode(encoded, type=Contents)
    except (msgspec.DecodeError, ValueError) as error:
        raise CorruptBlockError(f"unreadable frame contents: {error}") from error


def check_of(name: str, namespace: str, contents: Contents, body: Any) -> bytes:
    """The checksum of a frame that is not sealed: of its contents and its payload."""
    covered = msgspec.structs.replace(contents, check=b"")
    hasher = blake3.blake3(msgspec.msgpack.encode((name, namespace, covered)))
    hasher.update(body)
    return hasher.digest()


def _whose(name: str, namespace: str) -> bytes:
    return msgspec.msgpack.encode((name, namespace))
