"""The interface of eviction policies; `kvshare_store.testing.eviction` has its contract tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator


class EvictionPolicy(ABC):
    """Names in the order in which they should be evicted. Not thread-safe; calls are O(log n)."""

    @abstractmethod
    def add(self, name: str, nbytes: int, cost: float = 1.0) -> None:
        """Add a name. `cost`: what it would take to get it back, in any fixed unit. For a known
        name this only changes bytes and cost; it does not count as a use."""

    @abstractmethod
    def touch(self, name: str) -> None:
        """Count a use."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Forget a name, because it was evicted or for another reason; unknown ones are ignored."""

    @abstractmethod
    def victims(self) -> Iterator[str]:
        """Names in the order in which they should go, each at most once.

        Lazy: names may be added, used and removed while it runs. Names that were added or used
        since it began may be missing.
        """

    def __iter__(self) -> Iterator[str]:
        """The order of `victims`, for display."""
        return self.victims()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...
