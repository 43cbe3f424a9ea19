"""An edited prompt gives way to its exact twin, which then cannot be stored: it comes back, unless
somebody has removed it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvshare_store.errors import FullDiskError, KVShareError, NoSpaceError, StorageError
from tests.support.faulty import FaultyTier
from tests.support.meanwhile import PATIENCE_S, hold, reopened
from tests.support.oracle import Driver, prompt
from tests.support.tiers import disk_level
from tests.support.waiting import until

Open = Callable[..., Driver]

TOKENS = prompt(1, 40)
EDITED = [*TOKENS[:20], 5, 6, *TOKENS[21:]]


class Twins:
    """A donor, an edited prompt that is durable, and a disk that can refuse what follows."""

    def __init__(self, engine: Driver) -> None:
        self.engine = engine
        self.donor = str(engine.save(TOKENS))
        self.edited = str(engine.serve_and_save(EDITED))
        engine.store.flush()
        level = disk_level(engine.store)
        level.tier = self.disk = FaultyTier(level.tier)

    @property
    def here(self) -> bool:
        """Whether the edited prompt is."""
        return self.edited in self.engine.store.tree

    def refuse(self, error: KVShareError | None) -> None:
        """What writing a block raises from now on."""
        self.disk.fail_always("put", error)

    def purge_meanwhile(self, node: str, go_on: threading.Event) -> None:
        """Purge the lineage of a node while the committer waits, then let it go on."""
        queue = self.engine.store.nodes.queue
        waiting = queue.report()["waiting"]
        with ThreadPoolExecutor(1) as pool:
            purged = pool.submit(self.engine.store.purge_lineage, node)
            until(lambda: queue.report()["waiting"] > waiting, PATIENCE_S)
            go_on.set()
            purged.result(PATIENCE_S)
        queue.settle()


@pytest.mark.parametrize(
    "error", [StorageError("Input/output error"), NoSpaceError("full"), FullDiskError("no space")]
)
def test_it_comes_back(driver: Open, error: KVShareError) -> None:
    """Where the file system is full, its donor is removed to make room: what they share stays."""
    twins = Twins(driver())
    twins.refuse(error)
    assert twins.engine.save(EDITED), "computed in full"
    with contextlib.suppress(StorageError):
        twins.engine.store.flush()
    twins.refuse(None)
    assert twins.here or isinstance(error, FullDiskError)
    twins.engine.save(prompt(3, 40))  # storing works again
    kept = twins.here
    again = reopened(twins.engine, driver)
    assert (twins.edited in again.store.tree) == kept


def test_not_if_its_lineage_is_purged_meanwhile(driver: Open) -> None:
    twins, go_on = Twins(driver()), threading.Event()
    hold(twins.engine.store.nodes.queue, go_on)
    twins.refuse(NoSpaceError("full"))
    twins.engine.save(EDITED)
    twins.purge_meanwhile(twins.donor, go_on)
    assert not twins.here


def test_not_if_its_twin_failed_before_and_is_purged_now(driver: Open) -> None:
    twins, go_on = Twins(driver()), threading.Event()
    twins.refuse(NoSpaceError("full"))
    twin = str(twins.engine.save(EDITED))
    twins.engine.store.flush()
    assert twins.here
    twins.refuse(None)
    hold(twins.engine.store.nodes.queue, go_on)
    assert twins.engine.save(EDITED) == twin
    twins.purge_meanwhile(twin, go_on)
    assert not twins.here


def test_it_takes_no_other_prompt_out_of_memory_alone(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is full by count when it comes back."""
    engine = driver(max_nodes=4)
    engine.save(prompt(9, 40))
    twins, nodes = Twins(engine), engine.store.nodes
    twins.refuse(NoSpaceError("full"))
    forget = nodes.forget

    def full_again(node: object) -> bool:
        """Another prompt comes while the twin is given up."""
        gone = forget(node)  # type: ignore[arg-type]
        twins.refuse(None)
        while len(engine.store.tree) < 4:
            engine.save(prompt(11 + len(engine.store.tree), 40))
        return gone

    monkeypatch.setattr(nodes, "forget", full_again)
    engine.save(EDITED)
    engine.store.flush()
    assert twins.here
    again = reopened(engine, lambda: driver(max_nodes=4))
    assert {node.id for node in again.store.tree} == {node.id for node in engine.store.tree}
