"""What hostile clients do to a daemon until they are told to stop.

python -m tests.support.attacks NAME HOME
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvshare_store.daemon import protocol, wire
from kvshare_store.daemon.client import Client, plan_request
from kvshare_store.errors import KVShareError
from kvshare_store.namespace import Namespace
from kvshare_store.save.staging import Reuse
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver
from tests.support.fuzz import Fuzzer
from tests.support.oracle import prompt
from tests.support.peer import Peer

Attack = Callable[[Path, threading.Event], None]

SPACE = Namespace("model", KVLayout(2, 1, 4, "float32"), tenant="attacker")
PATIENCE_S = 60.0
_SAVES, _FLOOD, _LENGTH = 200, 64, 1_000
_BURST_S = 0.01
RUBBISH = (b"", b"\xff\0", b"GET / HTTP/1.1\r\n\r\n", wire.HEADER.pack(40, bytes(8)) + b"half")


def fuzzed(home: Path, over: threading.Event) -> None:
    """Messages that no client would send."""
    fuzzer = Fuzzer(home, 3)
    while not over.is_set():
        with contextlib.suppress(Exception):  # the daemon stops meanwhile
            fuzzer.burst()
    fuzzer.close()


def dropped(home: Path, over: threading.Event) -> None:
    """Connections that are opened and dropped."""
    for rubbish in itertools.cycle(RUBBISH):
        if over.is_set():
            return
        with contextlib.suppress(OSError, KVShareError), Peer(home) as peer:
            peer.socket.sendall(rubbish)


def crowded(home: Path, over: threading.Event) -> None:
    """A hundred connections with half a message each."""
    with contextlib.ExitStack() as peers, contextlib.suppress(Exception):
        for _ in range(100):
            peers.enter_context(Peer(home)).socket.sendall(b"half")
        over.wait(PATIENCE_S)


def unread(home: Path, over: threading.Event) -> None:
    """As many lookups as the daemon takes, whose answers nobody reads; a new connection when it is
    cut off."""
    tokens = np.arange(_LENGTH, dtype=np.int32).tobytes()
    body = protocol.encode(protocol.Plan(SPACE, tokens))
    while not over.is_set():
        with contextlib.suppress(OSError, KVShareError, AssertionError), Peer(home) as peer:
            peer.hello()
            peer.socket.settimeout(0.5)
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    peer.send(body)


def flushing(home: Path, over: threading.Event) -> None:
    """Flushes and collections of garbage, one after the other."""
    with contextlib.suppress(Exception), Client(home, timeout=PATIENCE_S) as client:
        while not over.is_set():
            client.flush()
            client.call(protocol.Collect())


def hoarded(home: Path, over: threading.Event) -> None:
    """All leases that a client may have, and saves that have begun; it goes on asking for more."""
    tokens = prompt(4_321, 64)
    with contextlib.suppress(Exception), Client(home, timeout=PATIENCE_S) as client:
        ClientDriver(client, SPACE).save(tokens)
        for seed in range(_SAVES):
            client.stage(np.asarray(prompt(seed, 100), np.int32), SPACE, Reuse())
        while not over.is_set():
            client.plan(tokens, SPACE)
            over.wait(_BURST_S if client.stats()["leases"] >= 1024 else 0.0)


def flooded(home: Path, over: threading.Event) -> None:
    """A tenant that keeps many lookups of new prompts under way, and reads their answers."""
    chance = np.random.default_rng(1)
    with contextlib.suppress(Exception), Client(home, timeout=PATIENCE_S) as client:
        while not over.is_set():
            prompts = chance.integers(0, 30_000, (_FLOOD, _LENGTH)).astype(np.int32)
            asked = [client.send(plan_request(tokens, SPACE, None)) for tokens in prompts]
            for request in asked:
                client.receive(request, PATIENCE_S)


def computing(_: Path, over: threading.Event) -> None:
    """No attack: a process that takes a core, as each of the others does."""
    while not over.is_set():
        sum(range(10_000))


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (fuzzed, dropped, crowded, unread, flushing, hoarded, flooded)
}


@contextmanager
def attacking(attack: Attack, home: Path) -> Iterator[None]:
    """The attack runs in a thread until the end of the block."""
    over = threading.Event()
    attacker = threading.Thread(target=attack, args=(home, over))
    attacker.start()
    try:
        yield
    finally:
        over.set()
        attacker.join(PATIENCE_S)


if __name__ == "__main__":
    chosen = {**ATTACKS, "computing": computing}[sys.argv[1]]
    print("begins", flush=True)
    chosen(Path(sys.argv[2]), threading.Event())
