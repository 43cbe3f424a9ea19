"""The interface of eviction policies; `kvshare_store.testing.eviction` has its contract tests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator


class EvictionPolicy(ABC):
    """Names in the order in which they should go. Not thread-safe; calls are O(log n)."""

    @abstractmethod
    def add(self, name: str, nbytes: int, cost: float = 1.0) -> None:
        """A name came in. `cost`: what it would take to get it back, in any one unit.

        For a name that is here this only changes its bytes and cost; it counts no use.
        """

    @abstractmethod
    def touch(self, name: str) -> None:
        """Count a use."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Forget a name, because it was evicted or for another reason; unknown ones are ignored."""

    @abstractmethod
    def victims(self) -> Iterator[str]:
        """The best victim first, each name at most once.

        Lazy: names may be added, used and removed while it runs. What came or was used since it
        began need not be offered.
        """

    def __iter__(self) -> Iterator[str]:
        """The order of `victims`, for those who only look."""
        return self.victims()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...
