"""Rarer events than a kill: containers, an upgrade, a power cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import msgspec

from tests.support.chaos.driver import Trial
from tests.support.chaos.processes import (
    ChaosError,
    KilledDaemon,
    RecordedDaemon,
    Worker,
)
from tests.support.chaos.releases import write_as_next_release
from tests.support.chaos.worker import work_elsewhere, work_with_foreign_pid
from tests.support.power_cut import Disk, calls

_ENOUGH = 20
"""Requests that a neighbour daemon serves before it is killed."""


class UncommonTrial(Trial):
    """A trial that has these kinds as well."""

    def kill_foreign_pid(self) -> None:
        """Kill a client in its own PID namespace in the middle of a save. Its pid there is 1, and a
        process 1 always exists here."""
        worker = self._guest(work_with_foreign_pid)
        try:
            self._serve_guest(worker)
            worker.paused = False
            worker.tell("hold_save")
            if not self._until(lambda: worker.paused):
                raise ChaosError("a client with a foreign pid hangs")
        finally:
            self._dismiss(worker)
        self._count("client with foreign pid")
        self._settle()

    def share_path(self) -> None:
        """A second daemon, whose home has the same path in its own mount namespace, serves a client
        there; then both are killed. Neither home may ever serve rows of the other."""
        config = self._variant.config
        other = config.home_path.with_name("other")
        other.mkdir(mode=0o700)
        alone = msgspec.structs.replace(config, remote="")
        daemon = KilledDaemon(alone, {}, other)
        try:
            daemon.start()
            worker = self._guest(work_elsewhere, other)
            try:
                worker.elsewhere = True
                self._serve_guest(worker)
                daemon.kill()
            finally:
                self._dismiss(worker)
        finally:
            daemon.kill()
            shutil.rmtree(other)
        self._count("daemon at the same path")
        self._settle()

    def upgrade(self) -> None:
        """Kill the daemon, let the next release write to its home, and start this release again."""
        self._daemon.kill()
        self._count("daemon before the next release")
        self._pause("halt")
        before = self._committed()
        write_as_next_release(self._variant.config)
        self._restart(before)

    def cut_power(self) -> None:
        """Cut the power: data that was not fsynced is lost; what a client was told is durable must
        survive."""
        home = self._variant.config.home_path
        self._daemon.kill()
        self._pause("halt")
        self._forget_cleared()
        disk = Disk.standing(home)
        recorded = RecordedDaemon(self._variant.config, home.with_name("calls"))
        try:
            recorded.start()
            self._client.reconnect()
            self._tell_all("go")
            self.load()
        finally:
            recorded.kill()
        self._count("power")
        self._pause("halt")
        for call in calls(home.with_name("calls")):
            disk.do(call)
        kept = home.with_name("kept")
        disk.restore(home, kept, zeros=self._chance.random() < 0.5)
        shutil.rmtree(home)
        kept.rename(home)
        self._auditor.excused = {"torn"}
        self._restart()
        self._auditor.excused = set()

    def _guest(self, target: Callable[..., None], *arguments: Any) -> Worker:
        """Start one more client, until `_dismiss`."""
        seed, home = self._chance.randrange(1 << 30), self._variant.config.home_path
        self._workers.append(Worker(target, home, seed, self._variant.spaces, *arguments))
        return self._workers[-1]

    def _serve_guest(self, worker: Worker) -> None:
        if not self._until(lambda: worker.served >= _ENOUGH):
            raise ChaosError("a client in a namespace of its own is served nothing")

    def _dismiss(self, worker: Worker) -> None:
        worker.kill()
        for kind, *news in worker.news():
            self._hear(worker, kind, news)
        worker.close()
        self._workers.remove(worker)
