"""A block as bytes: magic, msgpack header, payload. Self-describing and self-verifying."""

from __future__ import annotations

import struct
from typing import Any, Literal

import blake3
import msgspec
import zstandard

from kvshare_store.errors import CorruptBlockError
from kvshare_store.tensors.layout import KVLayout

MAGIC = b"KVSB"
VERSION = 1
Codec = Literal["none", "zstd"]
_PREFIX = struct.Struct("<4sI")
_MAX_HEADER = 1 << 16


class Block(msgspec.Struct, frozen=True):
    """Rows of one namespace. `data` is a bytes-like object in canonical order."""

    namespace: str
    layout: KVLayout
    data: Any

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.layout.rows_in(len(self.data))


class FrameHeader(msgspec.Struct, frozen=True, array_like=True):
    """What precedes the payload."""

    version: int
    name: str
    namespace: str
    layout: KVLayout
    codec: Codec
    raw_bytes: int


def block_name(block: Block) -> str:
    """BLAKE3 of namespace, layout and rows, as 64 hex digits.

    The namespace is part of the name, so that equal rows of two tenants never share bytes and the
    wall can be checked from the name alone.
    """
    hasher = blake3.blake3(msgspec.msgpack.encode((block.namespace, block.layout)))
    hasher.update(block.data)
    return hasher.hexdigest()


def encode_frame(name: str, block: Block, codec: Codec = "none") -> tuple[bytes, Any]:
    """`(head, payload)` of a block; the payload is the block's own buffer when not compressed."""
    payload = block.data if codec == "none" else zstandard.compress(block.data, 1)
    header = FrameHeader(VERSION, name, block.namespace, block.layout, codec, len(block.data))
    encoded = msgspec.msgpack.encode(header)
    return _PREFIX.pack(MAGIC, len(encoded)) + encoded, payload


def decode_frame(frame: bytes | memoryview, name: str) -> Block:
    """The verified block in `frame`; `CorruptBlockError` unless it is exactly block `name`."""
    header, body = split_frame(frame)
    data = _decompress(header, body)
    block = Block(header.namespace, header.layout, data)
    if header.name != name or block_name(block) != name:
        raise CorruptBlockError(f"block {name[:12]} holds other bytes than its name says")
    return block


def split_frame(frame: bytes | memoryview) -> tuple[FrameHeader, memoryview]:
    """Header and payload of a frame, not yet verified."""
    view = memoryview(frame)
    if len(view) < _PREFIX.size:
        raise CorruptBlockError(f"a frame of {len(view)} bytes is too short")
    magic, length = _PREFIX.unpack_from(view)
    if magic != MAGIC or length > _MAX_HEADER or len(view) < _PREFIX.size + length:
        raise CorruptBlockError("not a block frame")
    try:
        header = msgspec.msgpack.decode(
            view[_PREFIX.size : _PREFIX.size + length], type=FrameHeader
        )
    except (msgspec.DecodeError, ValueError) as error:
        raise CorruptBlockError(f"unreadable frame header: {error}") from error
    if header.version != VERSION:
        raise CorruptBlockError(f"frame version {header.version} is not {VERSION}")
    return header, view[_PREFIX.size + length :]


def _decompress(header: FrameHeader, body: memoryview) -> memoryview:
    if header.codec == "none":
        data = body
    else:
        try:
            # asked first: a damaged length must not make the decompressor allocate that much
            if zstandard.frame_content_size(body) != header.raw_bytes:
                raise CorruptBlockError("payload and header disagree about its size")
            whole = zstandard.ZstdDecompressor()
            data = memoryview(whole.decompress(body, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise CorruptBlockError(f"payload does not decompress: {error}") from error
    if len(data) != header.raw_bytes:
        raise CorruptBlockError(f"payload has {len(data)} bytes, header says {header.raw_bytes}")
    return data
