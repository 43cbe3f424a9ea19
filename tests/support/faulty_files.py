"""A failing file system: replaces what `kvshare_store.blocks.tiers.disk.files` calls.

with FaultyFiles() as disk:
    disk.arm(refusal(errno.ENOSPC), at=3)  # the third call from now
    ...
    disk.heal()
"""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from kvshare_store.blocks.tiers.disk import files
from tests.support.faults import Faults

CALLS = frozenset({
    "open", "close", "fstat", "preadv", "writev", "fsync", "mkdir", "listdir", "stat", "replace",
    "unlink",
})  # fmt: skip
"""Every call of `files` that reaches the file system."""


class Fault(NamedTuple):
    """A fault of a file system call: `happen(real, *args, **options)` is called in its place."""

    name: str
    calls: frozenset[str]
    """Whether it can happen to a call of this name."""
    happen: Callable[..., Any]


def refusal(code: int) -> Fault:
    """The call does nothing and raises error number `code`."""

    def happen(real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if real is os.close:
            real(*args)  # Linux frees the descriptor even when close fails
        raise OSError(code, os.strerror(code))

    return Fault(errno.errorcode[code], CALLS, happen)


def slow(seconds: float) -> Fault:
    """The call takes `seconds` longer."""

    def happen(real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **options)

    return Fault("slow", CALLS, happen)


def _half(view: memoryview) -> memoryview:
    return view[: max(1, len(view) // 2)]


def _short_read(real: Callable[..., int], descriptor: int, views: list[Any], at: int) -> int:
    return real(descriptor, [_half(views[0])], at)


def _end_of_file(real: Callable[..., int], descriptor: int, views: list[Any], at: int) -> int:
    return 0


def _short_write(real: Callable[..., int], descriptor: int, views: list[Any]) -> int:
    return real(descriptor, [_half(views[0])])


def _lost_write(real: Callable[..., int], descriptor: int, views: list[Any]) -> int:
    """Half of the bytes are written, but the call reports all of them."""
    whole = b"".join(views)
    real(descriptor, [whole[: len(whole) // 2]])
    return len(whole)


def _flip_read(real: Callable[..., int], descriptor: int, views: list[Any], at: int) -> int:
    got = real(descriptor, views, at)
    if got:
        views[0][got // 2] ^= 0x10
    return got


def _flip_write(real: Callable[..., int], descriptor: int, views: list[Any]) -> int:
    whole = bytearray(b"".join(views))
    whole[len(whole) // 2] ^= 0x10
    return real(descriptor, [whole])


def _swapped(real: Callable[..., None], source: str, target: str) -> None:
    """The file gets the bytes of another block, if there is one."""
    real(source, target)
    others = sorted(Path(target).parent.parent.glob("*/*.kvb"))
    other = next((file for file in others if file != Path(target)), None)
    if other is not None:
        Path(target).write_bytes(other.read_bytes())


_READ, _WRITE = frozenset({"preadv"}), frozenset({"writev"})
WRONG_BYTES = (
    Fault("short read", _READ, _short_read),
    Fault("end of file", _READ, _end_of_file),
    Fault("bit flipped in reading", _READ, _flip_read),
    Fault("short write", _WRITE, _short_write),
    Fault("truncated file", _WRITE, _lost_write),
    Fault("bit flipped in writing", _WRITE, _flip_write),
    Fault("swapped files", frozenset({"replace"}), _swapped),
)
"""Silent faults: the call reports success."""
REFUSALS = tuple(refusal(code) for code in (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EACCES))


class FaultyFiles(Faults[Fault]):
    """Replaces `kvshare_store.blocks.tiers.disk.files` inside its context."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = mock.patch.object(files, "os", _Stand(os, self._call))

    def _call(self, name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        fault = self.due(name)
        return real(*args, **options) if fault is None else fault.happen(real, *args, **options)

    def __enter__(self) -> FaultyFiles:
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self._patch.stop()


class _Stand:
    """A module whose calls to the file system go through `call`."""

    def __init__(self, module: ModuleType, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        return functools.partial(self._call, name, real) if name in CALLS else real
