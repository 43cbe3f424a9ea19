"""Sizes of slots with a running sum, which every save asks for."""

from __future__ import annotations

from typing import Generic, TypeVar

from kvshare_store.blocks.tiers.host.arena import slot_bytes

K = TypeVar("K")


class SlotSizes(dict[K, int], Generic[K]):
    """Bytes of rows by key, with the running sum of the bytes of their slots. Change it only by
    item assignment, `del` and `pop`."""

    slots = 0

    def __setitem__(self, key: K, nbytes: int) -> None:
        self.pop(key, None)
        super().__setitem__(key, nbytes)
        self.slots += slot_bytes(nbytes)

    def __delitem__(self, key: K) -> None:
        self.slots -= slot_bytes(self[key])
        super().__delitem__(key)

    def pop(self, key: K, default: int | None = None) -> int | None:  # type: ignore[override]
        """Remove a key and return its bytes; `default` if it is not here."""
        if key not in self:
            return default
        nbytes = self[key]
        del self[key]
        return nbytes
