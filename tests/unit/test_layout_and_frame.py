"""Rows as bytes: canonical order, and frames that notice every change."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.errors import CorruptBlockError, NamespaceError
from kvshare_store.tensors import frame
from kvshare_store.tensors.frame import Block, block_name, decode_frame, encode_frame, split_frame
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.oracle import row_keys, rows_for

LAYOUT = KVLayout(2, 1, 4, "float32")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
layouts = st.builds(
    KVLayout,
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6]),
    st.sampled_from(sorted(DTYPES)),
)
codecs = pytest.mark.parametrize("codec", ["none", "zstd"])


def make_block(rows: int = 3, layout: KVLayout = LAYOUT, namespace: str = "ab" * 32) -> Block:
    return Block(namespace, layout, rows_for(range(rows), layout).tobytes())


def frame_of(block: Block, codec: frame.Codec = "none") -> bytes:
    head, payload = encode_frame(block_name(block), block, codec)
    return head + bytes(payload)


# --- layout -------------------------------------------------------------------------------------


@given(layouts, st.integers(1, 9))
def test_rows_and_bytes(layout: KVLayout, rows: int) -> None:
    element = torch.empty(0, dtype=DTYPES[layout.dtype]).element_size()
    assert layout.itemsize == element
    assert layout.row_bytes * rows == element * int(np.prod(layout.shape(rows)))
    assert layout.rows_in(layout.row_bytes * rows) == rows
    for wrong in (0, layout.row_bytes * rows + 1, layout.row_bytes * rows - 1):
        with pytest.raises(NamespaceError):
            layout.rows_in(wrong)


@given(layouts, st.integers(1, 5))
def test_words_are_a_view_in_canonical_order(layout: KVLayout, rows: int) -> None:
    """Layer, then K or V, then token, then head, then dimension: checked against torch."""
    tensor = torch.arange(int(np.prod(layout.shape(rows)))).to(DTYPES[layout.dtype])
    tensor = tensor.view(layout.shape(rows))
    buffer = bytearray(tensor.view(torch.uint8).numpy().tobytes())
    words = layout.words(buffer, rows)
    integer = torch.int32 if layout.itemsize == 4 else torch.int16
    assert (words.view(f"i{layout.itemsize}") == tensor.view(integer).numpy()).all()
    words[0, 1, rows - 1] = 0
    at = (1 * rows + rows - 1) * layout.kv_heads * layout.head_dim * layout.itemsize
    assert not any(buffer[at : at + layout.kv_heads * layout.head_dim * layout.itemsize])


# --- names --------------------------------------------------------------------------------------


def test_a_name_is_of_namespace_layout_and_bytes() -> None:
    block = make_block()
    others = [
        msgspec.structs.replace(block, namespace="cd" * 32),
        msgspec.structs.replace(block, layout=KVLayout(1, 2, 4, "float32")),
        msgspec.structs.replace(block, layout=KVLayout(2, 2, 4, "float16")),
        msgspec.structs.replace(block, data=block.data[:-1] + b"\0"),
    ]
    names = {block_name(other) for other in [block, *others]}
    assert len(names) == 5
    assert all(len(name) == 64 and int(name, 16) for name in names)
    assert block_name(msgspec.structs.replace(block, data=bytearray(block.data))) in names


def test_names_are_the_same_in_every_release() -> None:
    """Golden: a release that names blocks otherwise finds nothing in older homes."""
    block = Block("00" * 32, LAYOUT, bytes(range(64)))
    known = "9c030c0826c6ed9ec8a33fd9716e4a2815d4d7f4a3b068db4c8ad4a8bda6630b"
    assert block_name(block) == known


# --- frames -------------------------------------------------------------------------------------


@codecs
@given(layout=layouts, rows=st.integers(1, 9), namespace=st.text(max_size=64))
def test_frames_round_trip(codec: frame.Codec, layout: KVLayout, rows: int, namespace: str) -> None:
    block = make_block(rows, layout, namespace)
    name = block_name(block)
    back = decode_frame(frame_of(block, codec), name)
    assert (back.namespace, back.layout, back.rows) == (namespace, layout, rows)
    assert bytes(back.data) == block.data
    assert row_keys(layout.words(back.data, rows)) == row_keys(layout.words(block.data, rows))


@codecs
def test_every_flipped_bit_is_noticed(codec: frame.Codec) -> None:
    block = make_block()
    name, good = block_name(block), frame_of(block, codec)
    for at in range(len(good)):
        for bit in (0, 3, 7):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            with pytest.raises(CorruptBlockError):
                decode_frame(bytes(bad), name)


@codecs
def test_every_truncation_is_noticed(codec: frame.Codec) -> None:
    block = make_block()
    name, good = block_name(block), frame_of(block, codec)
    for length in range(len(good)):
        with pytest.raises(CorruptBlockError):
            decode_frame(good[:length], name)


@codecs
def test_bytes_after_the_rows_are_noticed(codec: frame.Codec) -> None:
    block = make_block()
    with pytest.raises(CorruptBlockError):
        decode_frame(frame_of(block, codec) + b"\0", block_name(block))


@given(st.binary(max_size=200))
def test_rubbish_is_corrupt_and_nothing_else(rubbish: bytes) -> None:
    for data in (rubbish, frame.MAGIC + rubbish, frame.MAGIC + b"\x04\0\0\0" + rubbish):
        with pytest.raises(CorruptBlockError):
            decode_frame(data, "ab" * 32)


def test_another_blocks_frame_is_corrupt() -> None:
    with pytest.raises(CorruptBlockError, match="other bytes than its name"):
        decode_frame(frame_of(make_block(3)), block_name(make_block(4)))


def test_rows_of_another_namespace_do_not_pass_under_a_forged_header() -> None:
    """The wall holds on disk too: the header cannot claim a namespace that the name is not of."""
    mine, theirs = make_block(), make_block(namespace="cd" * 32)
    name = block_name(mine)
    head, _ = encode_frame(name, mine)
    with pytest.raises(CorruptBlockError):
        decode_frame(head + bytes(theirs.data[::-1]), name)
    forged, payload = encode_frame(name, theirs)
    with pytest.raises(CorruptBlockError):
        decode_frame(forged + bytes(payload), name)


def test_a_later_version_is_refused() -> None:
    block = make_block()
    header, payload = split_frame(frame_of(block))
    encoded = msgspec.msgpack.encode(msgspec.structs.replace(header, version=2))
    later = frame._PREFIX.pack(frame.MAGIC, len(encoded)) + encoded + bytes(payload)
    with pytest.raises(CorruptBlockError, match="version 2"):
        decode_frame(later, block_name(block))


def test_a_small_frame_cannot_ask_for_much_memory() -> None:
    block = make_block()
    header, _ = split_frame(frame_of(block, "zstd"))
    encoded = msgspec.msgpack.encode(msgspec.structs.replace(header, raw_bytes=1 << 50))
    bomb = frame._PREFIX.pack(frame.MAGIC, len(encoded)) + encoded + b"(\xb5/\xfd"
    with pytest.raises(CorruptBlockError):
        decode_frame(bomb, block_name(block))
