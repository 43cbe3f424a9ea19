"""What is wrong with a catalogue, in the words that `kvshare check` prints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from kvshare_store.errors import ErrorKind, KVShareError
from kvshare_store.observability.metrics import Metrics

log = logging.getLogger("kvshare")


class Fault(NamedTuple):
    """Something in a catalogue that cannot be used. It is left out, whatever becomes of it."""

    about: str
    """Id of the node, digest of the namespace, or name of the file."""
    error: KVShareError
    """Its kind says what: `row`, `newer`, `namespace` or `torn`."""
    repaired: bool = False
    """It is not in the catalogue any more."""


def report(faults: Sequence[Fault], metrics: Metrics) -> None:
    """Rows that cannot be used are counted and left out; `kvshare check` names them."""
    for fault in faults:
        metrics.error(fault.error.kind)
    if faults:
        first = faults[0]
        log.warning(
            "kvshare: %d faults in the catalogue, `kvshare check` names them; the first: %s: %s",
            len(faults), first.about, first.error,
        )  # fmt: skip


class Faults:
    """Faults that reading has found. Not thread-safe."""

    def __init__(self) -> None:
        self._found: list[Fault] = []
        self._said: set[tuple[str, ErrorKind]] = set()

    def add(self, about: str, error: KVShareError) -> None:
        """A bad row is found at each read, but counted once."""
        if (about, error.kind) not in self._said:
            self._said.add((about, error.kind))
            self._found.append(Fault(about, error))

    def take(self) -> list[Fault]:
        """All since the last call."""
        found, self._found = self._found, []
        return found
