"""Which block goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class LRU:
    """Names in the order of their last use."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def touch(self, name: str) -> None:
        """The name was used just now; unknown names are added."""
        self._order[name] = None
        self._order.move_to_end(name)

    def remove(self, name: str) -> None:
        """Forget a name; unknown names are ignored."""
        self._order.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        """The least recently used first. Do not change the order while iterating."""
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
