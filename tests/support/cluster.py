"""Several machines on one: daemons in network namespaces, with Mooncake and S3 between them.

    with ExitStack() as stack:
        a, b, c = Cluster(folder, stack).machines

Blocks go to one Mooncake Store, nodes to one LanceDB catalogue on S3. Every row that a machine is
served is compared with the oracle.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.tensors.layout import KVLayout
from tests.support.chaos.rows import DescribedRows
from tests.support.daemons import ClientDriver, Daemon
from tests.support.network import Host, Network
from tests.support.oracle import prompt
from tests.support.servers import MooncakeClient, MooncakeMaster, S3Server

SPACE = Namespace("machines", KVLayout(2, 1, 16, "float32"))
PLAN_DEADLINE_S = 0.25
_PATIENCE_S = 120.0
"""Whoever waits so long for an answer waits for a network or a server that is away."""


class Machine:
    """One machine: a daemon, a client beside it, and its network cable."""

    def __init__(self, config: StoreConfig, host: Host) -> None:
        self.host = host
        self.daemon = Daemon(config, host)
        self.client = Client(config.home_path, timeout=_PATIENCE_S)
        self._driver = ClientDriver(self.client, SPACE, DescribedRows(SPACE))

    def start(self) -> None:
        """Start the daemon."""
        self.daemon.start()
        self.client.reconnect()

    def save(self, seed: int) -> None:
        """Store a prompt; returns when it is durable, or known not to become so."""
        self._driver.save(prompt(seed, 64))
        self.client.flush()

    def serve(self, seed: int) -> int:
        """Number of reused rows of a prompt; each is compared."""
        return self.plan(seed).reused

    def plan(self, seed: int) -> ReusePlan:
        """As `serve`, with all that is known of the plan."""
        return self._driver.serve(prompt(seed, 64))

    def nodes(self) -> int:
        """Number of nodes that it knows."""
        return int(self.client.stats()["nodes"])

    def leases(self) -> int:
        """Number of leases."""
        return int(self.client.stats()["leases"])

    def forget_memory(self) -> None:
        """Restart the daemon, so that its shared memory is empty."""
        self.daemon.end()
        self.start()

    def close(self) -> None:
        """Stop the daemon and the client."""
        self.client.close()
        self.daemon.__exit__(None, None, None)


class Cluster:
    """A hub with the servers, and machines around it. Everything ends with `stack`."""

    def __init__(self, folder: Path, stack: ExitStack, names: str = "abc") -> None:
        network = stack.enter_context(Network())
        self.s3 = stack.enter_context(S3Server(folder / "s3", network.hub))
        self.master = stack.enter_context(MooncakeMaster(folder / "master", network.hub))
        self.lender = stack.enter_context(MooncakeClient(folder / "lender", self.master))
        os.environ.update(self.s3.environment)  # the daemons' clients read their keys from there
        self.machines: list[Machine] = []
        for name in names:
            machine = Machine(self._config(folder / name), network.host(name))
            stack.callback(machine.close)
            machine.start()
            self.machines.append(machine)

    @staticmethod
    def missing() -> str:
        """What this machine lacks to run it; empty if nothing."""
        if not MooncakeMaster.installed():
            return "Mooncake (Debian: libibverbs1, librdmacm1)"
        if not S3Server.installed():
            return "rclone"
        return "" if Network.possible() else "network namespaces (root, and Debian's iproute2)"

    def _config(self, home: Path) -> StoreConfig:
        return StoreConfig(
            home=str(home),
            host_bytes=1 << 22,
            disk_bytes=1 << 24,
            block_tokens=16,
            min_prompt_tokens=16,
            min_saving_ms=-1e9,
            semantic="never",
            policy="aggressive",
            plan_deadline_ms=PLAN_DEADLINE_S * 1e3,
            remote=self.master.url("machines"),
            remote_write="through",
            remote_timeout_ms=PLAN_DEADLINE_S * 1e3,
            catalog=self.s3.url("catalog"),
            gc_seconds=0.0,
        )
