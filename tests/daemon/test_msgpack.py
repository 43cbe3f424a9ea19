"""What we write with msgspec is MessagePack: the widely used package `msgpack` reads it."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest

from kvshare_store.daemon import protocol
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Span
from kvshare_store.tensors import frame
from kvshare_store.tensors.layout import KVLayout
from tests.daemon.test_protocol import MESSAGES, NAMESPACE

LAYOUT = KVLayout(2, 1, 4, "float32")
BLOCK = frame.Block("0" * 64, LAYOUT, bytes(range(64)) * 3)
NAME = frame.block_name(BLOCK)


def builtins(value: Any) -> Any:
    """A struct in the types that MessagePack has."""
    return msgspec.to_builtins(value, builtin_types=(bytes,))


def listed(value: Any) -> Any:
    """Turn tuples into lists: MessagePack has one type for both."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_requests(message: Any) -> None:
    read = msgpack.unpackb(protocol.encode(message))
    assert read == listed(builtins(message))
    assert read["type"] == type(message).__struct_config__.tag
    # and the other way round: we read what others pack
    assert protocol.decode_request(msgpack.packb(read)) == message


def test_replies() -> None:
    plan = ReusePlan(namespace=NAMESPACE.digest, tokens=9, spans=(Span(0, 8, 0, 0, 0, True),))
    read = msgpack.unpackb(protocol.encode(protocol.Reply(result=plan)))
    assert read["result"]["spans"] == [[0, 8, 0, 0, 0, True, False]]
    assert protocol.decode_reply(msgpack.packb(read)).result == read["result"]


@pytest.mark.parametrize("codec", ["none", "zstd", "planes"])
def test_frames(codec: frame.Codec) -> None:
    """A frame is the magic, the length of the header, the header as MessagePack, and the
    payload."""
    head, payload = frame.encode_frame(NAME, BLOCK, codec)
    assert head[:4] == frame.MAGIC
    length = int.from_bytes(head[4:8], "little")
    version, name, namespace, encrypted, contents, nbytes = msgpack.unpackb(head[8:])
    assert len(head) == 8 + length
    assert (version, name, namespace) == (frame.VERSION, NAME, BLOCK.namespace)
    assert (encrypted, nbytes) == (False, len(payload))
    layout, written, raw_bytes, lossy, check = msgpack.unpackb(contents)
    assert layout == listed(builtins(LAYOUT))
    assert (written, raw_bytes, lossy) == (codec, len(BLOCK.data), False)
    assert bool(check) == (codec != "none")
    # a frame whose header another library packed is read like ours
    header = [version, name, namespace, encrypted, contents, nbytes]
    packed = msgpack.packb(header)
    theirs = frame.MAGIC + len(packed).to_bytes(4, "little") + packed + bytes(payload)
    assert frame.decode_frame(theirs, NAME).data == BLOCK.data


def test_namespaces() -> None:
    assert msgpack.unpackb(msgspec.msgpack.encode(NAMESPACE)) == builtins(NAMESPACE)
