"""Daemons in this process or in one of their own, which can be killed, and a client that checks its
rows."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.address import answers
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.connection import Limits
from kvshare_store.daemon.spawn import daemon_command, daemon_environment, open_log
from kvshare_store.errors import KVShareError, LeaseError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, Outcome, ReusePlan
from kvshare_store.save.staging import Reuse, Staged, reuse_of
from tests.support.forking import ForkedDaemon
from tests.support.network import Host
from tests.support.oracle import (
    RowBook,
    RowOracle,
    Rows,
    check_partition,
    gather,
    pick,
    positions_of,
)

if TYPE_CHECKING:
    from kvshare_store.daemon.server import Server

START_S = 60.0


def child_daemon(config: StoreConfig) -> subprocess.Popen[bytes]:
    """Like `spawn_daemon`, but as a child of this process, which then learns its exit code."""
    log = open_log(config.home_path)
    try:
        environment = daemon_environment(config)
        return subprocess.Popen(daemon_command(config), stdout=log, stderr=log, env=environment)
    finally:
        os.close(log)


@contextmanager
def serving(config: StoreConfig, limits: Limits | None = None) -> Iterator[Server]:
    """A daemon in this process."""
    # whoever only asks daemons loads no LanceDB
    from kvshare_store.daemon.server import Server

    running = Server(config, limits)
    thread = threading.Thread(target=running.serve)
    thread.start()
    try:
        yield running
    finally:
        running.stop()
        thread.join(START_S)
    assert not thread.is_alive()


class Daemon:
    """`kvshare serve` for a configuration, on a `tests.support.network` host if one is named. As a
    context manager it is started and ended."""

    def __init__(self, config: StoreConfig, host: Host | None = None) -> None:
        self.config = config
        self._host = host
        self.process: ForkedDaemon | subprocess.Popen[bytes] | None = None

    def begin(self) -> ForkedDaemon | subprocess.Popen[bytes]:
        """Its process. A forked one has its libraries from the start."""
        return ForkedDaemon(self.config, self._host)

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        self.process = self.begin()
        deadline = time.monotonic() + START_S
        while not answers(self.config.home_path):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        """What it has printed so far."""
        return (self.config.home_path / "daemon.log").read_text()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, which gives the process no chance to clean up."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(START_S)
            self.process = None

    def end(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        code = self.process.wait(START_S)
        self.process = None
        return code

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()


class DaemonProgram(Daemon):
    """A daemon that is a program of its own from the start: for what is measured, and for what
    begins with the program."""

    def begin(self) -> subprocess.Popen[bytes]:
        return child_daemon(self.config)


class ClientDriver:
    """Like `tests.support.oracle.Driver`, but over the socket and the mapped arena."""

    def __init__(self, client: Client, namespace: Namespace, book: RowOracle | None = None) -> None:
        self.client = client
        self.namespace = namespace
        self.book = book or RowBook(namespace.layout)

    def load(self, plan: ReusePlan) -> Rows:
        """A copy of a plan's rows; `LeaseError` if they were not there all the time."""
        leased = self.client.leased_rows(plan.lease, plan.arena, plan.blocks)

        def rows_of(ref: BlockRef) -> memoryview:
            leased.check(ref)
            return leased.rows(ref.offset, ref.nbytes)

        rows = gather(plan, self.namespace.layout, rows_of)
        for ref in plan.blocks:
            leased.check(ref)
        return rows

    def plan(self, tokens: Sequence[int], timeout: float | None = None) -> ReusePlan:
        """A checked plan. Call `finish` on it afterwards."""
        plan = self.client.plan(list(tokens), self.namespace, timeout=timeout)
        check_partition(plan)
        if plan.declined:
            return plan
        try:
            rows = self.load(plan)
        except LeaseError:
            self.client.finish(plan.lease, Outcome(recomputed=plan.tokens, failed="lease"))
            raise
        self.book.check(tokens, plan, rows)
        return plan

    def finish(self, plan: ReusePlan) -> None:
        """End the request of the plan."""
        edited, missing = plan.reused - plan.exact, plan.tokens - plan.reused
        self.client.finish(plan.lease, Outcome(plan.exact, edited, missing))

    def serve(self, tokens: Sequence[int], timeout: float | None = None) -> ReusePlan:
        """Plan, check and finish."""
        plan = self.plan(tokens, timeout)
        if not plan.declined:
            self.finish(plan)
        return plan

    def save(self, tokens: Sequence[int], plan: ReusePlan | None = None) -> str | None:
        """Stage a prompt, compute what is missing, and commit it."""
        array = np.asarray(tokens, np.int32)
        reuse = Reuse() if plan is None else reuse_of(plan)
        staged = self.client.stage(array, self.namespace, reuse)
        if staged.known:
            return None
        exact = min((s.start for s in reuse.spans if not s.exact), default=len(tokens))
        return self.commit_rows(staged, tokens, exact)

    def commit_rows(self, staged: Staged, tokens: Sequence[int], exact: int) -> str | None:
        """Compute what a staged save wants, and commit it. The rows of the first `exact` tokens
        depend on nothing else."""
        rows = self.book.computed(tokens, exact, staged.id)
        fresh = positions_of(staged.fresh)
        self.book.write(tokens, rows, fresh, exact)
        return self.client.commit(staged, _blocks(staged, rows, fresh))

    def serve_and_save(self, tokens: Sequence[int]) -> ReusePlan | None:
        """One request, in which every failure of the store counts as a miss, as in an engine."""
        try:
            plan = self.plan(tokens)
        except LeaseError:
            return None
        try:
            if plan.declined:
                self.save(tokens)
            else:
                self.finish(plan)
                self.save(tokens, plan)
        except KVShareError:
            return plan
        return plan


def _blocks(staged: Staged, rows: Rows, fresh: Sequence[int]) -> Iterator[bytes]:
    """Rows at the `fresh` positions, block by block."""
    at = 0
    for size in staged.sizes:
        yield pick(rows, fresh[at : at + size])
        at += size
