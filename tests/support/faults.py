"""Injects a fault into the n-th call, and describes what a store must do all the same.

A scenario is run once to count its calls, then once for each call with a fault there.
`tests.support.faulty_files` and `tests.support.faulty_remote` say what can go wrong with a file
system and with a network.
"""

from __future__ import annotations

import threading
from typing import Any, Generic, Protocol, TypeVar

from kvshare_store.plan import ReusePlan
from tests.support.oracle import Driver, prompt
from tests.support.tiers import drop_from_host


class AnyFault(Protocol):
    """One kind of fault."""

    @property
    def calls(self) -> frozenset[str]:
        """Whether it can happen to a call of this name."""


F = TypeVar("F", bound=AnyFault)


class Faults(Generic[F]):
    """Counts calls and decides which one gets the fault. Thread-safe."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        """Names of the calls so far, including failed ones."""
        self.happened = 0
        """Number of faults so far."""
        self._lock = threading.Lock()
        self._fault: F | None = None
        self._skip: int | None = None

    def arm(self, fault: F, at: int | None = None) -> None:
        """From now on the fault happens to the `at`-th call it can happen to, or to every one."""
        with self._lock:
            self._fault, self._skip = fault, None if at is None else at - 1

    def heal(self) -> None:
        """Stop injecting faults."""
        with self._lock:
            self._fault = None

    def due(self, call: str) -> F | None:
        """Count a call; returns the fault for it, if any."""
        with self._lock:
            self.calls.append(call)
            fault = self._fault
            if fault is None or call not in fault.calls:
                return None
            if self._skip is not None:
                self._skip -= 1
                if self._skip >= 0:
                    return None
                self._fault = None
            self.happened += 1
            return fault


def places(calls: list[str], fault: AnyFault) -> range:
    """Numbers of the calls at which the fault is tried: every call it can happen to."""
    return range(1, 1 + sum(call in fault.calls for call in calls))


def from_below(engine: Driver, tokens: list[int], **options: Any) -> ReusePlan:
    """Serve a prompt whose rows have left memory; every row is compared with the oracle."""
    engine.store.repository.queue.settle()
    drop_from_host(engine.store)
    return engine.serve(tokens, **options)


def round_of(
    engine: Driver, faults: Faults[F], seed: int, fault: F | None = None, at: int = 0
) -> list[str]:
    """Save, serve and forget a prompt while a fault happens, then again without. Returns the calls
    made during the fault."""
    tokens, before = prompt(seed, 16), len(faults.calls)
    if fault is not None:
        faults.arm(fault, at)
    node = engine.save(tokens)
    from_below(engine, tokens)
    assert node is not None
    engine.store.nodes.remove([node])
    engine.store.repository.queue.settle()
    faults.heal()
    calls = faults.calls[before:]
    engine.save(tokens)
    if from_below(engine, tokens).exact != 15:  # damage was found, the prompt forgotten, and ...
        engine.save(tokens)
        assert from_below(engine, tokens).exact == 15, "... kept when it comes again"
    engine.store.nodes.remove([node])
    return calls
