"""Checks what a killed daemon left: opens a copy of the home and compares the rows of its nodes,
also after rotation.

The copy is made of hard links. Files of a home are never changed in place, so the audit cannot
change what the next daemon recovers from.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch

from kvshare_store.config import StoreConfig
from kvshare_store.errors import BusyError, KVShareError
from kvshare_store.maintenance.check import check_blocks, check_tree
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.prefix_chain import CHAIN_RUN
from kvshare_store.plan import BlockRef, ReusePlan
from kvshare_store.store import Store
from kvshare_store.tensors.rope import Rope
from tests.support.chaos.processes import START_S
from tests.support.chaos.report import Report
from tests.support.chaos.rows import DescribedRows, moved, quarter_turns
from tests.support.oracle import Driver, gather, positions_of

_LOOKED_AT = 24
"""Number of nodes whose rows are all compared; other nodes are drawn at each audit."""
_POSITIONS = 1024
_REMOTE_TIMEOUT_MS = 20_000.0
"""Seconds. Long, since a remote that is slow on a busy machine is not an error."""
_ONLY_LOOK = {
    "remote_timeout_ms": _REMOTE_TIMEOUT_MS,
    "disk_bytes": 1 << 30,
    "max_chain": 1 << 20,
    "max_scatter": 1e9,
    "gc_seconds": 0.0,
}
"""Settings for opening a copy. Nothing is evicted or merged there: that would delete blocks from
the remote, which the original home still uses."""


@contextmanager
def copied(home: Path) -> Iterator[Path]:
    """Copy a home that no process has open.

    Whoever removes files of a home holds its lock. The kernel releases the lock of a killed process
    only when its last thread, and the last process that inherited the descriptor, have ended.
    """
    copy = home.with_name(f"{home.name}-copy")
    with _unowned(home):
        shutil.copytree(home, copy, copy_function=_linked, ignore=_sockets)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


@contextmanager
def _unowned(home: Path) -> Iterator[None]:
    """Hold the home's lock meanwhile; `BusyError` if another process keeps it."""
    with (home / "lock").open("rb") as lock:
        deadline = time.monotonic() + START_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(f"home {home} has an owner that should be dead") from None
                time.sleep(0.01)
        yield


def _linked(source: str, target: str) -> None:
    """Whether a file may be changed in place: `lock`, `format` and logs. They are small and are
    copied."""
    if Path(source).suffix in (".kvb", ".lance", ".manifest", ".txn"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _sockets(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if (Path(folder) / name).is_socket()}


class Auditor:
    """Opens a copy and writes what is wrong into `report`."""

    def __init__(self, report: Report, chance: random.Random) -> None:
        self._report = report
        self._chance = chance
        self.excused: set[str] = set()
        """Kinds of errors that recovery may report: a power cut may damage data that was not yet
        durable."""

    def committed(self, config: StoreConfig, spaces: Sequence[Namespace]) -> set[str]:
        """Ids of the nodes that recovery finds in a copy of the home. Errors go into the report."""
        home = config.home_path
        if not (home / "format").exists():
            return set()
        with copied(home) as copy:
            config = msgspec.structs.replace(config, home=str(copy), **_ONLY_LOOK)
            try:
                with Store(config) as store:
                    self._look(store, spaces)
                    return {node.id for node in store.tree}
            except KVShareError as error:
                self._report.problem(f"what the daemon left cannot be opened: {error}")
                return set()

    def _look(self, store: Store, spaces: Sequence[Namespace]) -> None:
        found = store.stats()["errors"]
        if found.keys() - self.excused:
            self._report.problem(f"recovery met errors: {found}")
        nodes = {node.id: node for node in store.tree}
        drivers = {space.digest: Driver(store, space, DescribedRows(space)) for space in spaces}
        for node_id in self._chance.sample(sorted(nodes), min(_LOOKED_AT, len(nodes))):
            node = nodes[node_id]
            if node.namespace not in drivers:
                continue  # it was in the home that the trial began with
            tokens = node.tokens.tolist()
            driver = drivers[node.namespace]
            served = self._compare(driver, tokens)
            # many nodes may have all whole runs in common, and only some of them are looked at
            if node.exact and served < (len(tokens) - 1) // CHAIN_RUN * CHAIN_RUN:
                self._report.lose(f"node {node_id} serves {served} rows of {len(tokens)}")
            at = self._chance.randrange(len(tokens))
            self._compare(driver, [*tokens[:at], 5, 6, *tokens[at:]])
        self._agree(store)

    def _compare(self, driver: Driver, tokens: list[int]) -> int:
        """Compare served rows twice: as they are in the block, and as the editor places them."""
        try:
            plan = driver.plan(tokens)
        except AssertionError as error:
            self._report.wrong(str(error))
            return 0
        if plan.declined:
            return 0
        roots = gather(plan, driver.namespace.layout, lambda ref: _bytes_of(driver, plan, ref))
        loaded = driver.store.load(plan, _rope(driver.namespace.layout.head_dim))
        targets = positions_of(plan.spans)
        sources = [span.source + at for span in plan.spans for at in range(span.length)]
        expected = moved(roots[:, :, targets], sources, targets)
        words = loaded.rows.view(torch.uint32 if expected.itemsize == 4 else torch.uint16)
        if not np.array_equal(words.numpy(), expected):
            self._report.wrong("the editor's rows are not the oracle's rotation of the roots")
        self._report.rows += plan.reused
        return plan.reused

    def _agree(self, store: Store) -> None:
        """Once the queue is empty and garbage is collected, files, tree and counters must agree."""
        store.collect()
        store.flush()
        tree = check_tree(store.repository, repair=False)
        blocks = check_blocks(store.repository, tree.blocks, repair=False)
        for problem in (*tree.problems, *blocks.problems):
            self._report.problem(f"kvshare check: {problem.kind} {problem.about}: {problem.text}")
        home = store.config.home_path
        files = {file.stem for file in (home / "blocks").glob("*/*")}
        for name in files - store.tree.blocks():
            self._report.leak(f"block {name[:12]} is used by no node")
        if not store.config.remote and not store.tree.blocks() <= files:
            self._report.problem("nodes use blocks that are not on disk")
        self._count(store)
        for file in (home / "tmp").iterdir():
            self._report.leak(f"unfinished write {file.name} was left")
        if store.stats()["leases"]:
            self._report.leak(f"{store.stats()['leases']} leases after every plan has ended")

    def _count(self, store: Store) -> None:
        """The disk tier's byte count must equal its files plus those of the catalogue: both share a
        budget."""
        disk = store.blocks.levels.named("disk")
        if disk is None or store.repository.catalog is None:
            return
        files = (store.config.home_path / "blocks").glob("*/*.kvb")
        held = sum(file.stat().st_size for file in files) + store.repository.catalog.bytes
        counted = disk.tier.use().bytes
        if counted != held:
            self._report.problem(f"the disk tier counts {counted:,} bytes, its files have {held:,}")


def _bytes_of(driver: Driver, plan: ReusePlan, ref: BlockRef) -> memoryview:
    return driver.store.rows_of(plan, plan.blocks.index(ref))


def _rope(head_dim: int) -> Rope:
    cos, sin = quarter_turns(_POSITIONS, head_dim)
    return Rope(torch.from_numpy(cos), torch.from_numpy(sin), neox=True)
