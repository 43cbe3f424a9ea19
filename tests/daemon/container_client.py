"""A client, with or without a daemon, in a container of its own, told what to do line by line.

`python container_client.py HOME [daemon]`, then on stdin: `save SEED`, `serve SEED`, `hold SEED`,
`stage SEED`, `commit`, `end`. Each is answered with one line.
"""

from __future__ import annotations

import contextlib
import sys

import numpy as np

from kvshare_store.blocks.tiers.host.arena import slot_bytes
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.save.staging import Reuse, Staged
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, Daemon
from tests.support.oracle import pick, prompt, rows_for

NAMESPACE = Namespace("model", KVLayout(8, 4, 64, "float32"))
TOKENS = 40
SLOT = slot_bytes(8 * NAMESPACE.layout.row_bytes)
"""Bytes of a block's slot. Ten of them exceed a daemon's least memory."""
PATIENCE_S = 60.0


def config(home: str, blocks: int = 64) -> StoreConfig:
    """A store with room for `blocks` blocks of eight rows in memory; no lease ends by time."""
    return StoreConfig(
        home=home, block_tokens=8, host_bytes=blocks * SLOT, disk_bytes=1 << 26,
        min_prompt_tokens=8, min_saving_ms=-1e9, semantic="never", gc_seconds=0.0,
        lease_seconds=600.0, plan_deadline_ms=20_000.0,
    )  # fmt: skip


class Engine:
    """The commands of one client. Every row it is served is compared with the saved one."""

    def __init__(self, client: Client) -> None:
        self._driver = ClientDriver(client, NAMESPACE)
        self._staged = Staged()
        self._seed = 0

    def save(self, seed: int) -> str:
        return str(bool(self._driver.save(prompt(seed, TOKENS))))

    def serve(self, seed: int) -> str:
        """Serve a prompt and check its rows; returns the length of the exact prefix."""
        self._expect(seed)
        return str(self._driver.serve(prompt(seed, TOKENS)).exact)

    def hold(self, seed: int) -> str:
        """Like `serve`, but the lease is kept."""
        self._expect(seed)
        return str(self._driver.plan(prompt(seed, TOKENS)).exact)

    def _expect(self, seed: int) -> None:
        tokens = prompt(seed, TOKENS)
        rows = rows_for(tokens, NAMESPACE.layout)
        self._driver.book.write(tokens, rows, range(TOKENS), TOKENS)

    def stage(self, seed: int) -> str:
        """Begin a save, and write some of its rows."""
        tokens = np.asarray(prompt(seed, TOKENS), np.int32)
        self._staged = self._driver.client.stage(tokens, NAMESPACE, Reuse())
        self._seed = seed
        outbox = self._driver.client.outbox
        assert outbox is not None
        outbox.write(0, bytes([255]) * 500)
        return str(self._staged.rows)

    def commit(self, _: int) -> str:
        """End the save that was begun."""
        rows = rows_for(prompt(self._seed, TOKENS), NAMESPACE.layout)
        blocks = [pick(rows, range(at, at + 8)) for at in range(0, TOKENS, 8)]
        return str(bool(self._driver.client.commit(self._staged, blocks)))


def main(home: str, daemon: bool) -> None:
    """Serve the commands."""
    with contextlib.ExitStack() as stack:
        if daemon:
            stack.enter_context(Daemon(config(home)))
        engine = Engine(stack.enter_context(Client(home, timeout=PATIENCE_S)))
        for line in sys.stdin:
            command, _, seed = line.strip().partition(" ")
            if command == "end":
                return
            try:
                answer = getattr(engine, command)(int(seed or 0))
            except Exception as error:  # noqa: BLE001 - told to the test
                answer = f"{type(error).__name__}: {error}"
            print(answer, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["daemon"])
