"""Rows as bytes: their canonical order, and frames in which every change is noticed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.errors import CorruptBlockError, NamespaceError, ShortBlockError
from kvshare_store.keys import Keyring
from kvshare_store.tensors import frame
from kvshare_store.tensors.codecs import CODECS, LOSSY, Codec
from kvshare_store.tensors.frame import Block, block_name, decode_frame, encode_frame, split_frame
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import row_keys, rows_for

LAYOUT = KVLayout(2, 1, 4, "float32")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def ring(
    namespace: str, master: bytes = b"\0", salt: bytes = bytes(32), namespaces: Sequence[str] = ()
) -> Keyring:
    """The keys of some namespaces."""
    keys = Keyring(master * 32)
    for one in (namespace, *namespaces):
        keys.learn(one, salt)
    return keys


layouts = st.builds(
    KVLayout,
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6]),
    st.sampled_from(sorted(DTYPES)),
)
codecs = pytest.mark.parametrize("codec", CODECS)
lossless = pytest.mark.parametrize("codec", [codec for codec in CODECS if codec not in LOSSY])
plain_or_not = pytest.mark.parametrize("key", [None, ring("ab" * 32)], ids=["plain", "encrypted"])


def make_block(rows: int = 3, layout: KVLayout = LAYOUT, namespace: str = "ab" * 32) -> Block:
    return Block(namespace, layout, rows_for(range(rows), layout).tobytes())


def finite_block(rows: int = 3, seed: int = 1) -> Block:
    """A block of ordinary floats, as lossy codecs need."""
    values = np.random.default_rng(seed).standard_normal(LAYOUT.shape(rows)).astype(np.float32)
    return Block("ab" * 32, LAYOUT, values.tobytes())


def frame_of(block: Block, codec: Codec = "none", key: Keyring | None = None) -> bytes:
    head, payload = encode_frame(block_name(block), block, codec, key)
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
    """Fixed values: a release that named blocks differently would find nothing in older homes."""
    block = Block("00" * 32, LAYOUT, bytes(range(64)))
    known = "9c030c0826c6ed9ec8a33fd9716e4a2815d4d7f4a3b068db4c8ad4a8bda6630b"
    assert block_name(block) == known


# --- frames -------------------------------------------------------------------------------------


@plain_or_not
@lossless
@given(layout=layouts, rows=st.integers(1, 9))
def test_frames_round_trip(codec: Codec, key: Keyring | None, layout: KVLayout, rows: int) -> None:
    block = make_block(rows, layout)
    name = block_name(block)
    back = decode_frame(frame_of(block, codec, key), name, key)
    assert (back.namespace, back.layout, back.rows) == (block.namespace, layout, rows)
    assert not back.lossy
    assert bytes(back.data) == block.data
    assert row_keys(layout.words(back.data, rows)) == row_keys(layout.words(block.data, rows))


@given(namespace=st.text(max_size=64))
def test_any_namespace_fits_a_frame(namespace: str) -> None:
    block = make_block(namespace=namespace)
    assert decode_frame(frame_of(block), block_name(block)).namespace == namespace


@plain_or_not
@codecs
def test_every_flipped_bit_is_noticed(codec: Codec, key: Keyring | None) -> None:
    block = finite_block()
    name, good = block_name(block), frame_of(block, codec, key)
    assert decode_frame(good, name, key).lossy == (codec in LOSSY)
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            with pytest.raises(CorruptBlockError):
                decode_frame(bytes(bad), name, key)


@plain_or_not
@codecs
def test_every_truncation_is_short(codec: Codec, key: Keyring | None) -> None:
    block = finite_block()
    name, good = block_name(block), frame_of(block, codec, key)
    for length in range(len(good)):
        with pytest.raises(ShortBlockError):
            decode_frame(good[:length], name, key)


@plain_or_not
@codecs
def test_bytes_after_the_rows_are_noticed(codec: Codec, key: Keyring | None) -> None:
    block = finite_block()
    with pytest.raises(CorruptBlockError) as caught:
        decode_frame(frame_of(block, codec, key) + b"\0", block_name(block), key)
    assert caught.value.kind == "corrupt"


@given(st.binary(max_size=200))
def test_rubbish_is_corrupt_and_nothing_else(rubbish: bytes) -> None:
    for data in (rubbish, frame.MAGIC + rubbish, frame.MAGIC + b"\x04\0\0\0" + rubbish):
        with pytest.raises(CorruptBlockError):
            decode_frame(data, "ab" * 32)


@codecs
def test_another_blocks_frame_is_corrupt(codec: Codec) -> None:
    mine, other = finite_block(3), finite_block(4)
    with pytest.raises(CorruptBlockError, match="is not of"):
        decode_frame(frame_of(mine, codec), block_name(other))


def test_rows_of_another_namespace_do_not_pass_under_a_forged_header() -> None:
    """Isolation holds on disk too: a header cannot claim a namespace that its block's name
    contradicts."""
    mine, theirs = make_block(), make_block(namespace="cd" * 32)
    name = block_name(mine)
    head, _ = encode_frame(name, mine)
    with pytest.raises(CorruptBlockError, match="other bytes than its name"):
        decode_frame(head + bytes(theirs.data[::-1]), name)
    forged, payload = encode_frame(name, theirs)
    with pytest.raises(CorruptBlockError, match="other bytes than its name"):
        decode_frame(forged + bytes(payload), name)


def test_other_versions_are_refused_by_number() -> None:
    block = make_block()
    header, payload = split_frame(frame_of(block))
    first = [1, header.name, header.namespace, LAYOUT, "none", len(payload)]
    for old_or_new in (first, msgspec.structs.replace(header, version=3)):
        encoded = msgspec.msgpack.encode(old_or_new)
        other = frame._PREFIX.pack(frame.MAGIC, len(encoded)) + encoded + bytes(payload)
        with pytest.raises(CorruptBlockError, match=r"version [13] is not 2"):
            decode_frame(other, block_name(block))


def with_contents(good: bytes, **changes: object) -> bytes:
    """A plain frame with other contents and valid checksums."""
    header, payload = split_frame(good)
    contents = msgspec.msgpack.decode(header.contents, type=frame.Contents)
    contents = msgspec.structs.replace(contents, **changes)
    check = frame.check_of(header.name, header.namespace, contents, payload)
    contents = msgspec.structs.replace(contents, check=check)
    about = msgspec.msgpack.encode(contents)
    return frame.packed_header(msgspec.structs.replace(header, contents=about)) + bytes(payload)


@pytest.mark.parametrize("codec", ["zstd", "planes", "int8", "fp8"])
def test_a_small_frame_cannot_ask_for_much_memory(codec: Codec) -> None:
    block = finite_block()
    bomb = with_contents(frame_of(block, codec), raw_bytes=1 << 50)
    with pytest.raises(CorruptBlockError):
        decode_frame(bomb, block_name(block))


# --- lossy rows ---------------------------------------------------------------------------------


@plain_or_not
def test_lossy_rows_stay_lossy_whatever_packs_them_next(key: Keyring | None) -> None:
    """A lossy block that moves to another tier keeps its name, and is never taken for exact."""
    block = finite_block()
    name = block_name(block)
    once = decode_frame(frame_of(block, "int8", key), name, key)
    assert once.lossy
    assert bytes(once.data) != block.data
    head, payload = encode_frame(name, once, "none", key)
    twice = decode_frame(head + bytes(payload), name, key)
    assert twice.lossy
    assert bytes(twice.data) == bytes(once.data)


def test_a_lossy_frame_cannot_pose_as_exact() -> None:
    block = finite_block()
    posing = with_contents(frame_of(block, "int8"), lossy=False)
    with pytest.raises(CorruptBlockError, match="other bytes than its name"):
        decode_frame(posing, block_name(block))


@pytest.mark.parametrize("codec", sorted(LOSSY))
def test_rows_that_are_not_finite_are_kept_as_they_are(codec: Codec) -> None:
    block = finite_block()
    words = np.frombuffer(block.data, np.float32).copy()
    for wrong in (np.nan, np.inf, -np.inf, np.finfo(np.float32).max):
        words[5] = wrong
        odd = msgspec.structs.replace(block, data=words.tobytes())
        back = decode_frame(frame_of(odd, codec), block_name(odd))
        assert (bytes(back.data), back.lossy) == (odd.data, False)


# --- encryption ---------------------------------------------------------------------------------


def test_nothing_of_the_rows_or_their_shape_is_in_clear() -> None:
    block = finite_block()
    key = ring(block.namespace)
    encrypted = frame_of(block, "none", key)
    assert bytes(block.data[:8]) in frame_of(block)
    assert not any(bytes(block.data[at : at + 8]) in encrypted for at in range(0, 64, 8))
    header, _ = split_frame(encrypted)
    for word in (b"float32", b"none", b"head_dim"):
        assert word in frame_of(block)
        assert word not in encrypted
    assert (header.name, header.namespace) == (block_name(block), block.namespace)


def test_the_same_block_is_never_encrypted_to_the_same_bytes() -> None:
    block = finite_block()
    key = ring(block.namespace)
    assert frame_of(block, "none", key) != frame_of(block, "none", key)


def test_another_key_opens_nothing() -> None:
    block = finite_block()
    written = frame_of(block, "none", ring(block.namespace))
    unknown = Keyring(bytes(32))
    for other in (ring(block.namespace, salt=b"\1" * 32), ring(block.namespace, b"\2"), unknown):
        with pytest.raises(CorruptBlockError):
            decode_frame(written, block_name(block), other)


def test_plain_and_encrypted_are_not_mixed() -> None:
    """A store with a key refuses plain frames: anyone who can write files could make up a lossy
    one."""
    block = finite_block()
    key = ring(block.namespace)
    with pytest.raises(CorruptBlockError, match="is not encrypted"):
        decode_frame(frame_of(block, "int8"), block_name(block), key)
    with pytest.raises(CorruptBlockError, match="is encrypted"):
        decode_frame(frame_of(block, "int8", key), block_name(block))


def test_files_and_namespaces_cannot_be_swapped() -> None:
    """Even if the unencrypted part of the header is rewritten to fit."""
    mine, other = finite_block(3), finite_block(3, seed=2)
    theirs = msgspec.structs.replace(mine, namespace="cd" * 32)
    key = ring(mine.namespace, namespaces=[theirs.namespace])
    name = block_name(mine)
    for swapped in (other, theirs):
        header, payload = split_frame(frame_of(swapped, "int8", key))
        for renamed in (
            msgspec.structs.replace(header, name=name),
            msgspec.structs.replace(header, name=name, namespace=mine.namespace),
        ):
            with pytest.raises(CorruptBlockError, match="damaged, swapped or of another key"):
                decode_frame(frame.packed_header(renamed) + bytes(payload), name, key)


def test_the_sealed_contents_and_payload_of_two_frames_do_not_mix() -> None:
    """Both are of one block, so only the associated data of the payload's encryption tells them
    apart."""
    block = finite_block()
    key = ring(block.namespace)
    one, other = (split_frame(frame_of(block, "int8", key)) for _ in range(2))
    mixed = frame.packed_header(one[0]) + bytes(other[1])
    with pytest.raises(CorruptBlockError):
        decode_frame(mixed, block_name(block), key)
