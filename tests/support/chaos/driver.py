"""The driver: keeps clients busy, kills processes, restarts them, and runs the audit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.nodes.node import node_id
from tests.support.chaos.audit import Auditor
from tests.support.chaos.processes import ChaosError, KilledDaemon, Worker
from tests.support.chaos.remotes import RemoteServer
from tests.support.chaos.report import Report
from tests.support.chaos.rows import DescribedRows
from tests.support.chaos.variants import Variant
from tests.support.chaos.worker import some_prompt, work
from tests.support.daemons import ClientDriver

_WORKERS = 3
_PATIENCE_S = 60.0
_SERVED_AFTER = 15
"""Prompts that the parent itself is served after each restart."""


class Durable(NamedTuple):
    """A node that a client was told is durable. `began`: when its save began."""

    id: str
    space: str
    tokens: Any
    began: float


class Trial:
    """One home with its daemon and clients, for a number of kills."""

    def __init__(
        self, report: Report, chance: random.Random, tried: Variant, remote: RemoteServer | None
    ) -> None:
        self._report = report
        self._chance = chance
        self._variant = tried
        self._remote = remote
        self._auditor = Auditor(report, chance)
        self._daemon = KilledDaemon(tried.config, {} if remote is None else remote.environment)
        self._client = Client(tried.config.home_path, timeout=_PATIENCE_S)
        self._workers: list[Worker] = []
        self._durable: list[Durable] = []
        self._cleared = 0.0
        """When the last `clear` of everything was asked for."""

    def begin(self) -> None:
        """Start the daemon and the clients."""
        self._daemon.start()
        self._workers = [self._new_worker() for _ in range(_WORKERS)]

    def _new_worker(self) -> Worker:
        seed = self._chance.randrange(1 << 30)
        return Worker(work, self._variant.config.home_path, seed, self._variant.spaces)

    # --- the clients --------------------------------------------------------------------------

    def _listen(self) -> None:
        for worker in self._workers:
            for kind, *news in worker.news():
                self._hear(worker, kind, news)

    def _hear(self, worker: Worker, kind: str, news: list[Any]) -> None:
        report = self._report
        if kind == "served":
            worker.served += 1
            report.requests += 1
            report.rows += news[0]
            report.hits += news[0] > 0
        elif kind == "durable":
            report.durable += 1
            self._durable += [] if worker.elsewhere else [Durable(*news)]
        elif kind in ("paused", "holding"):
            worker.paused = True
        elif kind == "refused":
            report.refused[news[0]] += 1
        elif kind == "wrong":
            report.wrong(news[0])
        else:
            report.problem(news[0])

    def _until(self, what: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            self._listen()
            if what():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)

    def _tell_all(self, command: str) -> None:
        for worker in self._workers:
            worker.paused = False
            worker.tell(command)

    def _pause(self, command: str = "pause") -> None:
        self._tell_all(command)
        if not self._until(lambda: all(worker.paused for worker in self._workers)):
            raise ChaosError("a client hangs")

    def load(self) -> None:
        """Let the clients work for a while. Its length depends on their progress and on chance."""
        enough = self._report.requests + self._chance.randrange(2, 40)
        self._until(lambda: self._report.requests >= enough)
        time.sleep(self._chance.uniform(0.0, 0.03))

    # --- kills --------------------------------------------------------------------------------

    def _count(self, kind: str) -> None:
        self._report.kills[kind] += 1

    def kill_daemon(self) -> None:
        """Kill the daemon, sometimes during a clear or a merge; the next one must have every
        durable node."""
        happening = self._chance.random()
        if happening < 0.15:
            self._clear()
        elif happening < 0.5:
            self._client.tell(protocol.Collect())
            time.sleep(self._chance.uniform(0.0, 0.1))
        self._daemon.kill()
        self._count("daemon")
        self._restart()

    def _clear(self) -> None:
        """Clear the store under load without waiting for the answer."""
        self._client.tell(protocol.Clear())
        self._cleared = float("inf")
        time.sleep(self._chance.uniform(0.0, 0.1))

    def kill_at_start(self) -> None:
        """Kill the next daemon as well, while it recovers."""
        self._daemon.kill()
        self._count("daemon")
        self._pause("halt")
        before = self._committed()
        self._daemon.begin()
        time.sleep(self._chance.uniform(0.0, 0.25))
        self._daemon.kill()
        self._count("daemon at start")
        self._restart(before)

    def kill_both(self) -> None:
        """Kill daemon and client at once, and the next daemon soon after its first requests."""
        victim = self._chance.randrange(_WORKERS)
        self._daemon.kill()
        self._replace(victim, "client")
        self._count("daemon")
        self._pause("halt")
        self._forget_cleared()
        self._daemon.start()
        self._client.reconnect()
        self._tell_all("go")
        time.sleep(self._chance.uniform(0.0, 0.2))
        self.kill_daemon()

    def kill_client(self) -> None:
        """Kill a client at a random moment."""
        self._replace(self._chance.randrange(_WORKERS), "client")
        self._settle()

    def kill_lease_holder(self) -> None:
        """Kill a client that holds a lease."""
        self._kill_holder("hold_lease")

    def kill_saver(self) -> None:
        """Kill a client in the middle of a save."""
        self._kill_holder("hold_save")

    def freeze_client(self) -> None:
        """Pause a client at a random moment while the others work, and let it continue later."""
        worker = self._chance.choice(self._workers)
        worker.send(signal.SIGSTOP)
        self._count("client frozen")
        enough = self._report.requests + 40
        self._until(lambda: self._report.requests >= enough)
        worker.send(signal.SIGCONT)
        self._settle()

    def _kill_holder(self, command: str) -> None:
        victim = self._chance.randrange(_WORKERS)
        worker = self._workers[victim]
        worker.paused = False
        worker.tell(command)
        if not self._until(lambda: worker.paused):
            raise ChaosError("a client hangs")
        self._replace(victim, command.replace("hold_", "client with "))
        self._settle()

    def kill_remote(self) -> None:
        """Take the remote's server away for a while. Requests may miss, but not fail."""
        if self._remote is None:
            return self.kill_daemon()
        self._remote.kill()
        self._count("remote")
        before = self._report.requests
        self._until(lambda: self._report.requests > before + 5)
        if self._report.requests == before:
            self._report.problem("nothing is served while the remote is away")
        self._remote.start()
        return self._settle()

    def _replace(self, index: int, kind: str) -> None:
        worker = self._workers[index]
        worker.kill()
        for name, *news in worker.news():
            self._hear(worker, name, news)
        worker.close()
        self._count(kind)
        self._workers[index] = self._new_worker()

    # --- what must hold afterwards --------------------------------------------------------------

    def _settle(self) -> None:
        """While all clients rest, nothing may be held: no lease, no reservation."""
        self._pause()
        if not self._until(lambda: not self._held()):
            self._report.leak(f"clients at rest or dead hold {self._held()}")
        self._tell_all("go")

    def _held(self) -> dict[str, int]:
        stats = self._client.stats()
        held = {"leases": stats["leases"], "slots": stats["reserved"], "saves": stats["staged"]}
        return {name: count for name, count in held.items() if count}

    def _committed(self) -> set[str]:
        found = self._auditor.committed(self._variant.config, self._variant.spaces)
        return found if self._keeps else set()

    @property
    def _keeps(self) -> bool:
        """Whether durable nodes may be lost only by the store's own decision."""
        return self._remote is None or self._remote.keeps

    def _forget_cleared(self) -> None:
        if self._cleared == float("inf"):
            self._cleared = time.monotonic()
        self._durable = [one for one in self._durable if one.began > self._cleared]

    def _restart(self, before: set[str] | None = None) -> None:
        """Start another daemon after a kill. No durable node may be missing."""
        self._pause("halt")
        self._forget_cleared()
        committed = self._committed() | (before or set())
        self._daemon.start()
        self._client.reconnect()
        listed = {node["id"] for node in self._client.call(protocol.ListNodes(1_000_000))}
        for lost in committed - listed:
            self._report.lose(f"node {lost} was committed before the kill")
        self._expect_durable(listed)
        stats = self._client.stats()
        if stats["errors"].keys() - self._auditor.excused or stats["leases"]:
            self._report.problem(f"a new daemon has {stats['errors']}, {stats['leases']} leases")
        self._serve()
        self._tell_all("go")

    def _expect_durable(self, listed: set[str]) -> None:
        """Every node that a client was told is durable is there, unless it was evicted or
        cleared."""
        if not (self._variant.roomy and self._keeps):
            return
        for one in self._durable:
            exact = node_id(one.space, one.tokens, True)  # replaces its edited twin
            if one.id not in listed and exact not in listed:
                self._report.lose(f"node {one.id} was durable, a client was told")

    def _serve(self) -> None:
        """Compare rows that the new daemon serves, before clients use it."""
        for space in self._variant.spaces:
            driver = ClientDriver(self._client, space, DescribedRows(space))
            for _ in range(_SERVED_AFTER):
                self._serve_one(driver, some_prompt(self._chance))

    def _serve_one(self, driver: ClientDriver, tokens: list[int]) -> None:
        try:
            plan = driver.serve(tokens)
        except AssertionError as error:
            self._report.wrong(str(error))
            return
        self._report.requests += 1
        self._report.rows += plan.reused
        self._report.hits += plan.reused > 0

    def end(self) -> None:
        """End everything in order: clients, all nodes, the daemon. Nothing may be left of any."""
        self._pause("end")
        for worker in self._workers:
            if (code := worker.join()) != 0:
                self._report.problem(f"a client did not end in good order: exit code {code}")
        if not self._until(lambda: not self._held()):
            self._report.leak(f"clients that have ended hold {self._held()}")
        self._client.call(protocol.Clear(), _PATIENCE_S)
        if not self._until(lambda: not self._bytes()):
            self._report.leak(f"an empty store holds {self._bytes()} bytes")
        if self._daemon.end():
            self._report.problem("the daemon did not end in good order")
        home = self._variant.config.home_path
        left = [*(home / "blocks").glob("*/*.kvb"), *(home / "tmp").iterdir()]
        for path in left:
            self._report.leak(f"{path.name} is left of an empty store")

    def _bytes(self) -> dict[str, int]:
        """Bytes of blocks. The catalogue shares the disk's budget, and is never empty."""
        stats = self._client.stats()
        held = {name: use["bytes"] for name, use in stats["tiers"].items()}
        held["disk"] -= stats["catalog_bytes"]
        return {name: count for name, count in held.items() if count}

    def close(self) -> None:
        """Kill whatever still runs."""
        for worker in self._workers:
            worker.close()
        self._daemon.kill()
        self._client.close()
