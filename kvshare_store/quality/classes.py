"""Classes: those that were used last, of many namespaces, each with what was learned of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import msgspec

from kvshare_store.quality.evidence import Learned
from kvshare_store.quality.ladder import STALE, Decision

_CLASSES = 4096
_OF_NAMESPACE = 256
"""Classes of one namespace, so that a tenant cannot push out what was learned of all others."""


class Known(msgspec.Struct):
    """A class, and what was decided by its evidence."""

    learned: Learned
    decisions: dict[int, Decision] = msgspec.field(default_factory=dict)
    """By the highest rung that a request may get."""
    controls: int = 0
    """How many there were then."""

    def served(self) -> None:
        """A request got approximate rows."""
        self.learned.unscored += 1
        if self.learned.unscored == STALE:
            self.decisions.clear()


class Classes:
    """The least recently used are forgotten. Not thread-safe."""

    def __init__(self) -> None:
        self._namespaces: OrderedDict[str, OrderedDict[str, Known]] = OrderedDict()
        """The most recently used last, as those of each namespace."""
        self._count = 0

    def __iter__(self) -> Iterator[tuple[str, str, Known]]:
        """Namespace, traffic and what is known, the most recently used last."""
        for namespace, of_namespace in self._namespaces.items():
            for traffic, known in of_namespace.items():
                yield namespace, traffic, known

    def __contains__(self, namespace: str) -> bool:
        """Whether there are classes of the namespace."""
        return namespace in self._namespaces

    def get(self, namespace: str, traffic: str) -> Known | None:
        """The class, which is used by that; None if nothing is known of it."""
        of_namespace = self._namespaces.get(namespace)
        known = of_namespace.get(traffic) if of_namespace is not None else None
        if of_namespace is not None and known is not None:
            of_namespace.move_to_end(traffic)
            self._namespaces.move_to_end(namespace)
        return known

    def add(self, namespace: str, traffic: str, learned: Learned) -> Known:
        """A class that is not here."""
        of_namespace = self._namespaces.setdefault(namespace, OrderedDict())
        self._namespaces.move_to_end(namespace)
        known = of_namespace[traffic] = Known(learned)
        self._count += 1
        if len(of_namespace) > _OF_NAMESPACE:
            self._drop(namespace)
        elif self._count > _CLASSES:
            self._drop(next(iter(self._namespaces)))
        return known

    def _drop(self, namespace: str) -> None:
        of_namespace = self._namespaces[namespace]
        of_namespace.popitem(last=False)
        self._count -= 1
        if not of_namespace:
            del self._namespaces[namespace]

    def forget(self, namespace: str) -> bool:
        """Drop the classes of a namespace; whether there were any."""
        gone = self._namespaces.pop(namespace, None)
        self._count -= len(gone or ())
        return gone is not None

    def learned(self) -> dict[str, dict[str, Learned]]:
        """By namespace and traffic."""
        return {
            namespace: {traffic: known.learned for traffic, known in of_namespace.items()}
            for namespace, of_namespace in self._namespaces.items()
        }

    def fill(self, learned: Mapping[str, Mapping[str, Learned]]) -> None:
        """What `learned` said before a restart."""
        for namespace, of_namespace in learned.items():
            for traffic, one in of_namespace.items():
                self.add(namespace, traffic, one)
