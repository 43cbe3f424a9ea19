"""Which sizes the objects of a model have. A key does not say, but the store needs the size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Any

from kvshare_connectors.lmcache.objects import MODEL, Parts, nbytes_of, ranks_of

from kvshare_store.daemon.protocol import Holding

Slice = tuple[str, str]
"""Model and ranks: whose objects have one size, as long as nobody changes a chunk's length."""


def slice_of(key: Parts) -> Slice:
    """To which slice a key belongs."""
    return key.model_name, ranks_of(key)


class Sizes:
    """Sizes that objects were seen with. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Slice, set[int]] = {}
        self._lock = Lock()

    def learn(self, key: Parts, nbytes: int) -> None:
        """An object has this size."""
        self._add(slice_of(key), nbytes)

    def learn_held(self, holdings: Iterable[Holding]) -> None:
        """The store has these."""
        for one in holdings:
            model = one.namespace.model.removeprefix(MODEL)
            self._add((model, one.namespace.ranks), nbytes_of(one.namespace))

    def _add(self, where: Slice, nbytes: int) -> None:
        with self._lock:
            self._known.setdefault(where, set()).add(nbytes)

    def of(self, key: Parts, layouts: Mapping[int, Any] | None) -> set[int]:
        """The sizes that the object may have. `layouts`: LMCache's own description, by group."""
        with self._lock:
            known = set(self._known.get(slice_of(key), ()))
        described = described_bytes((layouts or {}).get(key.object_group_id))
        return known | ({described} if described else set())


def described_bytes(layout: Any) -> int:
    """Bytes of an object of this `MemoryLayoutDesc`; 0 if it does not say."""
    shapes, dtypes = getattr(layout, "shapes", None), getattr(layout, "dtypes", None)
    if not shapes or not dtypes:
        return 0
    parts = zip(shapes, dtypes, strict=False)
    return sum(math.prod(shape) * int(getattr(dtype, "itemsize", 0)) for shape, dtype in parts)
