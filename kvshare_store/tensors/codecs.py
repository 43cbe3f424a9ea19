"""How rows are packed: not at all, compressed, or rounded to eight bits.

A lossy codec keeps one fp32 scale for each channel of a block. A channel is one `[layer, K|V,
kv_head, head_dim]` over the block's tokens: K has outliers in few channels, and these must not set
the scale of the others. Everything here is numpy: the daemon never loads torch.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import zstandard

from kvshare_store.errors import CorruptBlockError
from kvshare_store.tensors.layout import KVLayout

Codec = Literal["none", "zstd", "planes", "int8", "fp8"]
CODECS: tuple[str, ...] = get_args(Codec)
LOSSY = frozenset({"int8", "fp8"})
_LEVEL = 1
_LARGEST = 3e38
"""Blocks with larger numbers (or infinity or NaN) are kept as they are: no scale would fit."""
_STEPS = {"int8": 127.0, "fp8": 448.0}
"""The largest number that each eight-bit format can hold."""

_FP8_BIAS = np.float32(2.0**-120)
_WORDS: dict[int, npt.DTypeLike] = {2: np.uint16, 4: np.uint32}
_AT_ONCE = 1 << 16

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def encode(codec: Codec, data: Any, layout: KVLayout) -> tuple[Codec, Any]:
    """`(codec, body)` of canonical rows. The codec is `none` where a lossy one cannot be used."""
    if codec == "zstd":
        return codec, zstandard.compress(data, _LEVEL)
    if codec == "planes":
        return codec, zstandard.compress(_shuffled(data, layout.itemsize).data, _LEVEL)
    if codec in LOSSY:
        body = _quantised(data, layout, codec)
        if body is not None:
            return codec, body
    return "none", data


def decode(codec: Codec, body: Any, layout: KVLayout, raw_bytes: int) -> Any:
    """Rows of `raw_bytes` bytes; `CorruptBlockError` if the body decodes to another size."""
    if codec in LOSSY:
        return _rows(body, layout, raw_bytes, codec)
    data = body if codec == "none" else _decompressed(body, raw_bytes)
    if len(data) != raw_bytes:
        raise CorruptBlockError(f"the payload gives {len(data)} bytes, its header says {raw_bytes}")
    return _unshuffled(data, layout.itemsize) if codec == "planes" else data


def _decompressed(body: Any, raw_bytes: int) -> memoryview:
    try:
        # checked first: a damaged length must not make the decompressor allocate that much
        if zstandard.frame_content_size(body) != raw_bytes:
            raise CorruptBlockError("payload and header disagree about its size")
        whole = zstandard.ZstdDecompressor()
        return memoryview(whole.decompress(body, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise CorruptBlockError(f"payload does not decompress: {error}") from error


# --- byte planes ----------------------------------------------------------------------------------


def _shuffled(data: Any, itemsize: int) -> Bytes:
    """All first bytes of the words, then all second bytes, and so on: signs and exponents end up
    next to each other."""
    words = np.frombuffer(data, _WORDS[itemsize])
    planes = np.empty((itemsize, len(words)), np.uint8)
    for part in _parts(len(words)):
        for at, plane in enumerate(planes):
            plane[part] = words[part] >> words.dtype.type(8 * at)
    return planes.reshape(-1)


def _unshuffled(data: Any, itemsize: int) -> memoryview:
    planes = np.frombuffer(data, np.uint8).reshape(itemsize, -1)
    words = np.zeros(planes.shape[1], _WORDS[itemsize])
    for part in _parts(len(words)):
        for at, plane in enumerate(planes):
            words[part] |= plane[part].astype(words.dtype) << words.dtype.type(8 * at)
    return words.view(np.uint8).data


def _parts(length: int) -> list[slice]:
    """Parts small enough to stay in a core's cache."""
    return [slice(at, at + _AT_ONCE) for at in range(0, length, _AT_ONCE)]


# --- eight bits -----------------------------------------------------------------------------------


def _quantised(data: Any, layout: KVLayout, codec: Codec) -> Bytes | None:
    """The scales of all channels, then one byte for each number: `value ≈ scale * byte`.

    None if a number is too large for any scale. Works on one layer at a time, which stays in a
    core's cache.
    """
    words = layout.words(data, layout.rows_in(len(data)))
    scales = np.empty(layout.shape(1), np.float32)
    packed = np.empty(words.shape, np.uint8)
    for layer, scale, target in zip(words, scales, packed, strict=True):
        values = _floats(layer, layout)
        largest = np.abs(values).max(axis=1, keepdims=True)
        if not (largest <= _LARGEST).all():
            return None
        scale[:] = largest / np.float32(_STEPS[codec])
        values /= np.where(scale > 0, scale, np.float32(1))
        target[:] = _to_int8(values) if codec == "int8" else _to_fp8(values)
    return np.concatenate((scales.reshape(-1).view(np.uint8), packed.reshape(-1)))


def _rows(body: Any, layout: KVLayout, raw_bytes: int, codec: Codec) -> memoryview:
    rows, rest = divmod(raw_bytes, layout.row_bytes)
    channels = layout.row_bytes // layout.itemsize
    if rest or rows < 1 or len(body) != channels * (4 + rows):
        raise CorruptBlockError(f"the payload of {len(body)} bytes does not fit {rows} rows")
    packed = np.frombuffer(body, np.uint8)
    scales = packed[: 4 * channels].view(np.float32).reshape(layout.shape(1))
    numbers = packed[4 * channels :].reshape(layout.shape(rows))
    words = np.empty(layout.shape(rows), _WORDS[layout.itemsize])
    for layer, scale, target in zip(numbers, scales, words, strict=True):
        values = layer.view(np.int8).astype(np.float32) if codec == "int8" else _from_fp8(layer)
        values *= scale
        target[:] = _rounded(values, layout)
    return words.reshape(-1).view(np.uint8).data


def _floats(words: npt.NDArray[Any], layout: KVLayout) -> Floats:
    """Words of rows as fp32, a copy; exact for every dtype."""
    if layout.dtype == "bfloat16":
        bits = words.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    return words.view(layout.dtype).astype(np.float32)


def _rounded(values: Floats, layout: KVLayout) -> npt.NDArray[Any]:
    """fp32 as words of rows, each the nearest number of the layout's dtype, ties to even."""
    if layout.dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return bits >> np.uint32(16)
    return values.astype(layout.dtype).view(_WORDS[layout.itemsize])


def _to_int8(values: Floats) -> Bytes:
    return np.rint(values, out=values).astype(np.int8).view(np.uint8)


def _to_fp8(values: Floats) -> npt.NDArray[np.uint32]:
    """The nearest e4m3 codes of `values`, whose absolute values are at most about 448.

    Multiplied by 2**-120, an fp32 number has an exponent that fits into four bits, and e4m3's
    subnormals are subnormals in fp32 too. All that is left is to round away 20 bits of the
    mantissa.
    """
    signs = values.view(np.uint32) >> np.uint32(24) & np.uint32(0x80)
    np.abs(values, out=values)
    values *= _FP8_BIAS
    bits = values.view(np.uint32)
    bits += np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1))
    bits >>= np.uint32(20)
    bits |= signs
    return bits


def _from_fp8(codes: Bytes) -> Floats:
    """The numbers that e4m3 codes stand for: the same steps backwards. No code is NaN."""
    wide = codes.astype(np.uint32)
    bits = (wide & np.uint32(0x80)) << np.uint32(24)
    bits |= (wide & np.uint32(0x7F)) << np.uint32(20)
    values = bits.view(np.float32)
    values /= _FP8_BIAS
    return values
