"""Sequences that a node keeps packed: a tuple of names or spans takes ten times the memory of what
it says, and of a million nodes few are looked at.

They are equal to the tuple of what they hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Self, TypeVar, overload

import msgspec

from kvshare_store.nodes.edits import Edit
from kvshare_store.plan.spans import Span

T = TypeVar("T")

_REMEMBERED = 4096
_NAME_BYTES = 32
NAME = 2 * _NAME_BYTES
"""Characters of a name of a block."""
_ENCODE = msgspec.msgpack.Encoder().encode


def _decoder(kind: Any) -> Callable[[bytes], tuple[Any, ...]]:
    return msgspec.msgpack.Decoder(tuple[kind, ...]).decode


class Packed(Sequence[T]):
    """A tuple as the bytes `raw`. Whatever looks into it raises `msgspec.DecodeError` if they are
    none of its kind."""

    __slots__ = ("raw",)
    _unpack: ClassVar[Callable[[bytes], tuple[Any, ...]]]

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    @classmethod
    def of(cls, values: Iterable[T]) -> Self:
        """Pack values."""
        return cls(_ENCODE(tuple(values)))

    def unpacked(self) -> tuple[T, ...]:
        """What it holds."""
        return type(self)._unpack(self.raw)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...
    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        return self.unpacked()[at]

    def __len__(self) -> int:
        return len(self.unpacked())

    def __iter__(self) -> Iterator[T]:
        return iter(self.unpacked())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.unpacked() == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # tuples that are equal would have another

    def __repr__(self) -> str:
        return repr(self.unpacked())


class Spans(Packed[Span]):
    """Spans, in MessagePack."""

    __slots__ = ()
    _unpack = lru_cache(_REMEMBERED)(_decoder(Span))


class Edits(Packed[Edit]):
    """Edits, in MessagePack. They hold tokens, of which nothing may stay after a purge: what was
    unpacked is not remembered."""

    __slots__ = ()
    _unpack = _decoder(Edit)


class Sizes(Packed[int]):
    """Whole numbers, in MessagePack."""

    __slots__ = ()
    _unpack = lru_cache(_REMEMBERED)(_decoder(int))


class Names(Packed[str]):
    """Names of blocks, 32 bytes each."""

    __slots__ = ()

    @classmethod
    def of(cls, values: Iterable[str]) -> Self:
        """Pack names; `ValueError` if one is none: 64 hex digits."""
        names = tuple(values)
        joined = "".join(names)
        raw = bytes.fromhex(joined)  # which skips spaces and takes capitals
        if raw.hex() != joined or not {*map(len, names)} <= {NAME}:
            raise ValueError("names of blocks have 64 lower hex digits")
        return cls(raw)

    @property
    def text(self) -> str:
        """The names one behind the other, `NAME` characters each."""
        return self.raw.hex()

    def unpacked(self) -> tuple[str, ...]:
        """What it holds."""
        text = self.text
        return tuple([text[at : at + NAME] for at in range(0, len(text), NAME)])

    def __contains__(self, name: object) -> bool:
        return self._find(name) >= 0

    def index(self, name: Any, start: int = 0, stop: int = sys.maxsize) -> int:
        """Where the first of that name is."""
        at = self._find(name)
        return at if 0 <= start <= at < stop else super().index(name, start, stop)

    def _find(self, name: object) -> int:
        """The first place of a name, without unpacking the others; negative if it is not here."""
        try:
            wanted = bytes.fromhex(name) if isinstance(name, str) else b""
        except ValueError:
            return -1
        if len(wanted) != _NAME_BYTES or wanted.hex() != name:
            return -1
        at = self.raw.find(wanted)
        while at >= 0 and at % _NAME_BYTES:
            at = self.raw.find(wanted, at + 1)
        return at // _NAME_BYTES

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.unpacked()[at]
        start = range(0, len(self.raw), _NAME_BYTES)[at]
        return self.raw[start : start + _NAME_BYTES].hex()

    def __len__(self) -> int:
        return len(self.raw) // _NAME_BYTES
