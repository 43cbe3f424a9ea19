"""Sizes of slots whose sum is asked for at every save."""

from __future__ import annotations

from typing import Generic, TypeVar

from kvshare_store.blocks.tiers.host.arena import slot_bytes

K = TypeVar("K")


class Tally(dict[K, int], Generic[K]):
    """Bytes of rows by key, and the bytes that all their slots take, without adding them up again.

    Change it by item assignment, `del` and `pop` only.
    """

    slots = 0

    def __setitem__(self, key: K, nbytes: int) -> None:
        self.pop(key, None)
        super().__setitem__(key, nbytes)
        self.slots += slot_bytes(nbytes)

    def __delitem__(self, key: K) -> None:
        self.slots -= slot_bytes(self[key])
        super().__delitem__(key)

    def pop(self, key: K, default: int | None = None) -> int | None:  # type: ignore[override]
        """The bytes of a key that is taken out; `default` if it is not here."""
        if key not in self:
            return default
        nbytes = self[key]
        del self[key]
        return nbytes
