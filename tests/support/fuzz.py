"""Sends thousands of messages that no client would send to a real daemon.

    python -m tests.support.fuzz --n 1000000

Valid messages are changed somewhere in their structure or bytes and sent. Some frames lie about
their length, come in pieces, or bring descriptors along. The daemon must go on serving a client and
keep nothing: no memory, descriptors, leases or reservations.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import psutil

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol, wire
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome
from kvshare_store.plan.spans import Span
from kvshare_store.save.staging import Reuse
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, Daemon, DaemonProgram
from tests.support.oracle import prompt
from tests.support.peer import Peer

MIB = 1 << 20
_BURST = 200
"""Number of messages sent before answers are read."""
_SPACE = Namespace("fuzz", KVLayout(2, 1, 4, "float32"))
_TOKENS = bytes(range(256))
_EXAMPLES: list[protocol.Request] = [
    protocol.Plan(_SPACE, _TOKENS, "exact"),
    protocol.Stage(_SPACE, _TOKENS, Reuse((Span(0, 4, 0, 0, 0, True),), ("ab" * 32,), ("n",), 1)),
    protocol.Stage(_SPACE, _TOKENS, Reuse(donors=("n",)), 40),
    protocol.ReadRows("lease", "ab" * 32),
    protocol.WriteRows("save", 0, b"rows"),
    protocol.Commit("save"),
    protocol.Abandon("save"),
    protocol.Finish("lease", Outcome(3, 4, 5, 6, 0.5, "aborted")),
    protocol.Decline("late", 40),
    protocol.EngineCached(32),
    protocol.Prefilled("chat-1", 0.25),
    protocol.Working(True),
    protocol.NextLook(("ab",)),
    protocol.Looked("ab", 7, "dropped", (0.5,)),
    protocol.Observe(512, 0.25),
    protocol.Failed("timeout"),
    protocol.Stats(),
    protocol.Ready(),
    protocol.ListNodes(3),
    protocol.Branch("ab", after="1.5-cd", limit=3),
    protocol.ShowNode("ab"),
    protocol.HasNodes(("ab",)),
    protocol.PlanNode("ab"),
    protocol.Forget(("ab",)),
    protocol.Held("fuzz"),
    protocol.NodesOf("ab"),
    protocol.Explain(_TOKENS),
    protocol.Quality(),
    protocol.Diff("ab", "cd"),
    protocol.ListRequests(3),
    protocol.Evict(("ab",), dry_run=True),
    protocol.Export("/no/such/folder/x", ("ab",)),
    protocol.Import("/no/such/file"),
    protocol.Pin("ab", False),
    protocol.CheckBlocks(("../../etc/passwd",), False),
    protocol.Collect(True),
    protocol.Purge("ab", None, 0.0, True),
]
_LONG = (
    protocol.Flush, protocol.Collect, protocol.CheckTree, protocol.Purge, protocol.Clear,
)  # fmt: skip
"""Messages left out because they take long and would use most of the daemon's time."""


def requests() -> list[protocol.Request]:
    """One message of every kind but `Stop`: its example, or an empty one."""
    examples = {type(message): message for message in _EXAMPLES}
    kinds = set(get_args(protocol.Request)) - {protocol.Stop}
    return [examples.get(kind) or kind() for kind in sorted(kinds, key=lambda kind: kind.__name__)]


_SELDOM = [message for message in requests() if isinstance(message, _LONG)]
_OFTEN = [message for message in requests() if not isinstance(message, _LONG)]
_ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, -1.0, float("nan"),
    float("inf"), "", "x", "x" * 5000, "\0", "../..", b"", b"123", bytes(4096), b"\xff" * 64,
    [], [[]], {}, {"type": "stats"}, [0] * 100, ["ab" * 32] * 50,
]  # fmt: skip


def some_message(chance: random.Random) -> bytes:
    """A message that is valid, or was valid before it was changed."""
    kinds = _SELDOM if chance.random() < 0.002 else _OFTEN
    tree = msgspec.msgpack.decode(protocol.encode(chance.choice(kinds)))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        tree = _changed(tree, chance)
    body = bytearray(msgspec.msgpack.encode(tree))
    for _ in range(chance.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, 3))):
        _damage(body, chance)
    return b"" if b"stop" in body else bytes(body)


def _changed(value: Any, chance: random.Random) -> Any:
    """A tree of values with one place changed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        others = {name: one for name, one in value.items() if name != key}
        roll = chance.random()
        if roll < 0.1:
            return others
        if roll < 0.2:
            return value | {chance.choice(("later", "", "type", "x" * 99)): chance.choice(_ODD)}
        return {key: _changed(value[key], chance)} | others
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], _changed(value[at], chance), *value[at + chance.randrange(2) :]]
    alike = [odd for odd in _ODD if type(odd) is type(value)]
    return chance.choice(alike if alike and chance.random() < 0.8 else _ODD)


def _damage(body: bytearray, chance: random.Random) -> None:
    if not body:
        return
    at = chance.randrange(len(body))
    roll = chance.random()
    if roll < 0.5:
        body[at] = chance.randrange(256)
    elif roll < 0.75:
        del body[at:]
    else:
        body[at:at] = chance.randbytes(chance.randrange(9))


class Fuzzer:
    """Sends messages, reads answers, and reconnects after it was cut off."""

    def __init__(self, home: Path, seed: int) -> None:
        self.answers: Counter[str] = Counter()
        self.sent = 0
        self._home = home
        self._chance = random.Random(seed)
        self._peer: Peer | None = None

    def burst(self) -> None:
        """Send some messages, then read the answers."""
        with contextlib.suppress(OSError):
            peer = self._connected()
            for number in range(_BURST):
                self.sent += 1
                self._send(peer, number.to_bytes(8, "little"))
            self._hear(peer)
            return
        self.answers["cut off"] += 1
        self.close()

    def _connected(self) -> Peer:
        if self._peer is None:
            self._peer = Peer(self._home)
            if self._chance.random() < 0.8:
                self._peer.hello()
        return self._peer

    def _send(self, peer: Peer, request_id: bytes) -> None:
        body, roll = some_message(self._chance), self._chance.random()
        if roll < 0.9985:
            peer.send(body, request_id)
        elif roll < 0.999:
            with open(os.devnull, "rb") as file:
                peer.send_with(body, [file.fileno()] * self._chance.randrange(1, 9))
        elif roll < 0.9995:  # the stream no longer is what its header says
            peer.socket.sendall(wire.HEADER.pack(len(body) + 3, request_id) + body)
        else:
            peer.socket.sendall(wire.HEADER.pack(self._chance.randrange(1 << 32), request_id))

    def _hear(self, peer: Peer) -> None:
        """Everything that arrives within a moment: not every message has an answer."""
        peer.socket.settimeout(0.02)
        try:
            while (reply := peer.receive()) is not None:
                self.answers[reply.error or "fine"] += 1
            raise OSError("it has hung up")
        except TimeoutError:
            peer.socket.settimeout(20.0)

    def close(self) -> None:
        """Close the connection."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None


class Report(NamedTuple):
    """The result of a run."""

    sent: int
    answers: Counter[str]
    grown_bytes: int
    """Bytes by which the daemon's memory grew since the first tenth of the messages."""
    left: dict[str, int]
    """What the daemon still holds for clients that are gone."""


def fuzz(daemon: Daemon, count: int, seed: int, say: Callable[[str], object] = str) -> Report:
    """Send `count` messages. After every tenth of them a client must be served."""
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    fuzzer = Fuzzer(daemon.config.home_path, seed)
    memory: list[int] = []
    for tenth in range(1, 11):
        while fuzzer.sent < count * tenth // 10:
            fuzzer.burst()
        fuzzer.close()
        _serve(daemon, seed * 100 + tenth)
        memory.append(process.memory_info().rss)
        say(f"{fuzzer.sent:,} messages, {memory[-1] / MIB:,.0f} MiB, {dict(fuzzer.answers)}")
    return Report(fuzzer.sent, fuzzer.answers, memory[-1] - memory[0], left_over(daemon))


def _serve(daemon: Daemon, seed: int) -> None:
    with Client(daemon.config.home_path, timeout=60.0) as client:
        driver = ClientDriver(client, _SPACE.for_tenant("honest"))
        driver.save(prompt(seed, 64))
        assert driver.serve(prompt(seed, 64)).exact == 63, "a client is served as ever"


def left_over(daemon: Daemon) -> dict[str, int]:
    """What the daemon holds for clients once all but this one are gone."""
    with Client(daemon.config.home_path, timeout=60.0) as client:
        for _ in range(600):
            stats = client.stats()
            held = {name: stats.get(name, 0) for name in ("leases", "reserved", "staged")}
            held |= {
                "connections": stats["daemon"]["connections"] - 1,
                "requests": stats["daemon"]["requests"] - 1,
            }
            if not any(held.values()):
                break
            client.flush()
    return {name: count for name, count in held.items() if count}


def main() -> None:
    """`python -m tests.support.fuzz`"""
    parser = argparse.ArgumentParser(description="Send a daemon what no client would send.")
    parser.add_argument("--n", type=int, default=1_000_000, help="messages")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, DaemonProgram(small(folder)) as daemon:
        report = fuzz(daemon, asked.n, asked.seed, print)
        assert daemon.end() == 0, daemon.log()
    print(report)


def small(folder: str) -> StoreConfig:
    """A store with small budgets that are soon full."""
    return StoreConfig(
        home=f"{folder}/home", block_tokens=8, host_bytes=4 * MIB, disk_bytes=16 * MIB,
        min_prompt_tokens=8, min_saving_ms=0.0, policy="aggressive", semantic="never",
        gc_seconds=0.0, max_nodes=500, plan_deadline_ms=20_000.0,
    )  # fmt: skip


if __name__ == "__main__":
    main()
