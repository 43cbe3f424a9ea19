"""Which namespaces a store knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvshare_store.namespace import Namespace


class Namespaces:
    """Namespaces by digest. Not thread-safe by itself."""

    def __init__(self) -> None:
        self._known: dict[str, Namespace] = {}
        self._recorded: set[str] = set()
        """Those that the catalogue knows."""
        self.closed: set[str] = set()
        """Those in which nothing new is stored, because they are being purged."""
        self._watching: list[set[str]] = []

    def __iter__(self) -> Iterator[Namespace]:
        return iter(list(self._known.values()))

    def by_digest(self) -> dict[str, Namespace]:
        """All of them as they are now: asking each for its digest would take long."""
        return self._known.copy()

    def get(self, digest: str) -> Namespace | None:
        """What a digest stands for."""
        return self._known.get(digest)

    def register(self, namespace: Namespace) -> None:
        """Remember a namespace; for good with its first node."""
        self._known.setdefault(namespace.digest, namespace)

    def recorded(self, namespaces: Iterable[Namespace]) -> None:
        """The catalogue has records of these."""
        for namespace in namespaces:
            self.register(namespace)
            self._recorded.add(namespace.digest)

    def unrecorded(self, digests: Iterable[str]) -> list[Namespace]:
        """Those of `digests` that are known here and not to the catalogue."""
        return [self._known[d] for d in set(digests) if d in self._known.keys() - self._recorded]

    def keep_recorded(self, digests: set[str]) -> None:
        """The catalogue has records of no others: the next save there writes a new one."""
        self._recorded &= digests

    def close(self, digest: str) -> None:
        """A purge begins."""
        self.closed.add(digest)
        for purged in self._watching:
            purged.add(digest)

    def watch(self) -> set[str]:
        """Those that are being purged, and from now on each of which a purge begins: for whoever
        has had rows of them since before. `unwatch` it."""
        self._watching.append(set(self.closed))
        return self._watching[-1]

    def unwatch(self, purged: set[str]) -> None:
        """Nobody looks at what `watch` has given any more."""
        self._watching = [each for each in self._watching if each is not purged]

    def remove(self, digest: str) -> None:
        """Nothing of the namespace is left, and nobody knows what its digest stood for."""
        self._known.pop(digest, None)
        self._recorded.discard(digest)
