"""Rows that describe themselves, so that any process can check any row it is served.

The V of a row's first layer begins with a head: token, position, whether the row was computed in
its own full context, and a digest of that context. All other bits are drawn from a hash of
namespace and head. A row that is damaged, mixed with another or from another namespace therefore
contradicts itself, and processes need not tell each other what they have saved.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import blake3
import numpy as np
import numpy.typing as npt

from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from tests.support.oracle import Rows, prefix_hashes, row_keys

_HEAD = struct.Struct("<iii32s")
_MANTISSA = {"float32": (0x807FFFFF, 0x3F000000), "bfloat16": (0x807F, 0x3F00)}
"""Bits of K that are drawn, and bits that are always set: the values are ±0.5 to ±1. Quarter turns
keep these exact; NaN and infinity they would not."""


class WrongRowError(AssertionError):
    """A row was served where it does not belong."""


class Head(NamedTuple):
    """What a row says about itself."""

    token: int
    position: int
    exact: bool
    context: bytes


class DescribedRows:
    """Makes the rows an engine would compute in one namespace, and checks the rows that are served.

    Takes the place of `tests.support.oracle.RowBook`, but remembers nothing. The layout's dtype
    must be float32 or bfloat16, and one head of V must have room for 44 bytes.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.layout = layout = namespace.layout
        if layout.kv_heads * layout.head_dim * layout.itemsize < _HEAD.size:
            raise ValueError(f"rows of {layout} have no room for a head of {_HEAD.size} bytes")
        self._space = bytes.fromhex(namespace.digest)
        self._dtype: Any = np.uint32 if layout.itemsize == 4 else np.uint16

    def computed(self, tokens: Sequence[int], exact: int, salt: str) -> Rows:
        """Rows of a prompt whose first `exact` ones have their own full context. The others also
        depend on `salt`, as real rows depend on what was reused before them."""
        salted = f"edited:{salt}".encode()
        heads = [
            Head(int(tokens[at]), at, at < exact, _context(prefix, b"" if at < exact else salted))
            for at, prefix in enumerate(prefix_hashes(tokens))
        ]
        return self._rows(heads)

    def write(
        self, tokens: Sequence[int], rows: Rows, positions: Sequence[int], exact: int
    ) -> None:
        """Does nothing: rows describe themselves."""

    def check(self, tokens: Sequence[int], plan: ReusePlan, rows: Rows) -> None:
        """Raises `WrongRowError` unless each served row is, bit for bit, one that may stand
        there."""
        at = [position for span in plan.spans for position in range(span.start, span.stop)]
        if not at:
            return
        prefixes, keys = prefix_hashes(tokens), row_keys(rows)
        heads = {position: self._head(keys[position]) for position in at}
        for span in plan.spans:
            for position in range(span.start, span.stop):
                _check_head(
                    heads[position],
                    tokens[position],
                    span.source + position - span.start,
                    prefixes[position] if span.exact else None,
                )
        expected = row_keys(self._rows([heads[position] for position in at]))
        for position, key in zip(at, expected, strict=True):
            if keys[position] != key:
                raise WrongRowError(f"position {position} got bytes that nobody computed")

    def _head(self, row: bytes) -> Head:
        words = np.frombuffer(row, self._dtype).reshape(self.layout.shape(1))
        token, position, exact, context = _HEAD.unpack_from(words[0, 1].tobytes())
        return Head(token, position, exact == 1, context)

    def _rows(self, heads: Sequence[Head]) -> Rows:
        layout, raw = self.layout, bytearray()
        packed = [_HEAD.pack(head[0], head[1], int(head[2]), head[3]) for head in heads]
        for head in packed:
            raw += blake3.blake3(self._space + head).digest(length=layout.row_bytes)
        by_row = np.frombuffer(bytes(raw), self._dtype).reshape(
            len(heads), layout.layers, 2, layout.kv_heads, layout.head_dim
        )
        rows = np.moveaxis(by_row, 0, 2).copy(order="C")
        drawn, fixed = _MANTISSA[layout.dtype]
        rows[:, 0] = rows[:, 0] & drawn | fixed
        words = _HEAD.size // layout.itemsize
        heads_of = np.frombuffer(b"".join(packed), self._dtype).reshape(len(heads), words)
        first_v = rows[0, 1].reshape(len(heads), -1)
        first_v[:, :words] = heads_of
        return rows


def _context(prefix: bytes, salt: bytes) -> bytes:
    return blake3.blake3(prefix + salt).digest() if salt else prefix


def _check_head(head: Head, token: int, source: int, prefix: bytes | None) -> None:
    """`prefix`: hash of the tokens up to and including this one, for an exact row."""
    where = f"position moved from {source}"
    if head.token != token:
        raise WrongRowError(f"{where} got the row of token {head.token} for token {token}")
    if head.position != source:
        raise WrongRowError(f"{where} got a row computed at {head.position}")
    if prefix is not None and not head.exact:
        raise WrongRowError(f"{where}: an edited row poses as exact")
    if prefix is not None and head.context != prefix:
        raise WrongRowError(f"{where} is of another prefix")


# --- what the editor must make of them ----------------------------------------------------------


def quarter_turns(positions: int, head_dim: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A rotary table of whole quarter turns: cos and sin, `[positions, head_dim / 2]`. Rotation by
    it is exact in every dtype, so there is one correct result of moving a row."""
    turns = np.outer(np.arange(positions), _per_position(head_dim)) % 4
    cos = np.array([1.0, 0.0, -1.0, 0.0], np.float32)[turns]
    sin = np.array([0.0, 1.0, 0.0, -1.0], np.float32)[turns]
    return cos, sin


def _per_position(head_dim: int) -> npt.NDArray[np.int64]:
    """Quarter turns of each pair from one position to the next."""
    return 1 + np.arange(head_dim // 2) % 3


def moved(rows: Rows, sources: Sequence[int], targets: Sequence[int]) -> Rows:
    """Rows with K turned from `sources` to `targets`, by swapping and negating only.

    `rows`: words `[layers, 2, T, kv_heads, head_dim]`; pairs are `(i, i + head_dim / 2)`.
    """
    result = rows.copy()
    half = rows.shape[4] // 2
    sign = rows.dtype.type(1 << (8 * rows.dtype.itemsize - 1))
    turns = np.outer(np.asarray(targets) - np.asarray(sources), _per_position(2 * half)) % 4
    x, y = rows[:, 0, ..., :half], rows[:, 0, ..., half:]
    for turn, (new_x, new_y) in enumerate(
        ((x, y), (y ^ sign, x), (x ^ sign, y ^ sign), (y, x ^ sign))
    ):
        here = (turns == turn)[None, :, None, :]
        result[:, 0, ..., :half] = np.where(here, new_x, result[:, 0, ..., :half])
        result[:, 0, ..., half:] = np.where(here, new_y, result[:, 0, ..., half:])
    return result
