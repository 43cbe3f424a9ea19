"""Edit scripts: the operations that turn a donor's tokens into a request's (paper §4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare_store.errors import PlanError

Tokens = npt.NDArray[np.int32]
EditKind = Literal["keep", "insert", "delete", "replace"]
_LARGEST = np.iinfo(np.int32).max


class Match(NamedTuple):
    """`length` equal tokens at `start` of the request and `source` of the donor."""

    start: int
    source: int
    length: int


class Edit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One operation on `donor[start:stop]`; `tokens` are what it puts there instead."""

    kind: EditKind
    start: int
    stop: int
    tokens: tuple[int, ...] = ()


def as_tokens(tokens: Sequence[int] | Tokens) -> Tokens:
    """Token ids as a contiguous int32 array; `PlanError` if they are not token ids."""
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise PlanError("tokens must be a flat sequence of integers")
    fits = array.dtype == np.int32  # as most do: what is left to check is the sign
    if array.size and (array.min() < 0 or (not fits and array.max() > _LARGEST)):
        raise PlanError("token ids must be between 0 and 2**31 - 1")
    return np.ascontiguousarray(array, dtype=np.int32)


def edit_script(matches: Iterable[Match], donor_length: int, request: Tokens) -> tuple[Edit, ...]:
    """The script that keeps `matches` (ascending on both sides) and changes all else."""
    edits: list[Edit] = []
    at = source = 0
    for match in (*matches, Match(len(request), donor_length, 0)):
        fresh = tuple(request[at : match.start].tolist())
        if fresh or match.source > source:
            edits.append(Edit(_kind(fresh, match.source > source), source, match.source, fresh))
        if match.length:
            edits.append(Edit("keep", match.source, match.source + match.length))
        at, source = match.start + match.length, match.source + match.length
    return tuple(edits)


def _kind(fresh: tuple[int, ...], removed: bool) -> EditKind:
    if not removed:
        return "insert"
    return "replace" if fresh else "delete"
