"""A client of the kill test: asks for plans, checks every row, saves, and reports what became
durable."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import DeadlineError, ErrorKind, KVShareError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.save.staging import Reuse
from tests.support.chaos.namespaces import see_instead, with_foreign_pid
from tests.support.chaos.rows import DescribedRows
from tests.support.daemons import ClientDriver
from tests.support.oracle import prompt

PATIENCE_S = 20.0
_SLICE_S = 0.02
_OUR_FAULT = {ErrorKind.CONFIG, ErrorKind.INTERNAL, ErrorKind.NAMESPACE, ErrorKind.PLAN}
"""Kinds of errors that neither a crash nor load excuses."""
_TEMPLATES = 24
_TEMPLATE_TOKENS = 160


class _HaltError(DeadlineError):
    """The daemon is dead, so no answer will come."""


class Orders:
    """The worker's end of the pipe. `halted`: the daemon is gone; abandon the current request."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._waiting: deque[str] = deque()
        self.halted = False

    def look(self) -> None:
        """Read the commands that have come, without waiting."""
        while self._pipe.poll(0):
            command = self._pipe.recv()
            self.halted = self.halted or command == "halt"
            self._waiting.append(command)

    def next(self, *, wait: bool) -> str:
        """The next command, or an empty string."""
        self.look()
        if not self._waiting and wait:
            self._waiting.append(self._pipe.recv())
        return self._waiting.popleft() if self._waiting else ""

    def report(self, *news: Any) -> None:
        """Report to the driver."""
        self._pipe.send(news)


class PatientClient(Client):
    """A link that waits long for a daemon that is alive, and not for one that is known to be
    dead."""

    def __init__(self, home: str, orders: Orders) -> None:
        self._orders = orders
        super().__init__(home, timeout=PATIENCE_S)

    def receive(self, request_id: bytes, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return super().receive(request_id, _SLICE_S)
            except DeadlineError:
                self._orders.look()
                if self._orders.halted:
                    raise _HaltError("the daemon was killed") from None
                if time.monotonic() > deadline:
                    raise


def some_prompt(chance: random.Random) -> list[int]:
    """A template, often cut, often edited, sometimes joined with another. Some prompts are all
    new."""
    if chance.random() < 0.15:
        return prompt(1000 + chance.randrange(1 << 20), chance.randrange(40, 200))
    tokens = prompt(int(_TEMPLATES * chance.random() ** 2), _TEMPLATE_TOKENS)
    if chance.random() < 0.3:
        tokens = tokens[: chance.randrange(20, len(tokens))]
    if chance.random() < 0.2:
        tokens += prompt(chance.randrange(_TEMPLATES), 60)
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        at = chance.randrange(len(tokens))
        added = [chance.randrange(1 << 20) for _ in range(chance.randrange(4))]
        tokens[at : at + chance.randrange(4)] = added
    return tokens


class Engine:
    """Makes one client's requests, each in a randomly chosen namespace."""

    def __init__(
        self, client: Client, spaces: Sequence[Namespace], orders: Orders, model: str = ""
    ) -> None:
        """`model`: for rows that differ from those of other clients in the same namespaces."""
        self._client = client
        self._orders = orders
        computed = [msgspec.structs.replace(space, model=model or space.model) for space in spaces]
        self._drivers = [
            ClientDriver(client, space, DescribedRows(rows))
            for space, rows in zip(spaces, computed, strict=True)
        ]

    def serve(self, tokens: Sequence[int], driver: ClientDriver) -> ReusePlan:
        """One lookup. Compares its rows and reports the result."""
        plan = driver.serve(tokens)
        self._orders.report("served", plan.reused, plan.exact)
        return plan

    def request(self, chance: random.Random) -> None:
        """What an engine does with a request: reuse rows, compute the rest, save the prompt."""
        driver, tokens = chance.choice(self._drivers), some_prompt(chance)
        began = time.monotonic()
        plan = self.serve(tokens, driver)
        if chance.random() < 0.1:
            self._abandon(tokens, driver)
            return
        saved = driver.save(tokens, None if plan.declined or chance.random() < 0.2 else plan)
        if saved is not None and chance.random() < 0.4:
            self._client.flush(PATIENCE_S)
            self._orders.report(
                "durable", saved, driver.namespace.digest, np.asarray(tokens, np.int32), began
            )

    def _abandon(self, tokens: Sequence[int], driver: ClientDriver) -> None:
        staged = self._stage(tokens, driver)
        if not staged.known:
            self._client.abandon(staged.id)

    def _stage(self, tokens: Sequence[int], driver: ClientDriver) -> Any:
        return self._client.stage(np.asarray(tokens, np.int32), driver.namespace, Reuse())

    def look_around(self, chance: random.Random) -> None:
        """Ask what operators ask meanwhile. A node may vanish between the list and the question
        about it."""
        nodes = self._client.call(protocol.ListNodes(20))
        if nodes:
            self._client.call(protocol.ShowNode(chance.choice(nodes)["id"]))
        self._client.stats()

    def hold_lease(self, chance: random.Random) -> None:
        """Hold a plan whose rows are being loaded, and wait to be killed."""
        driver = self._drivers[0]
        for _ in range(50):
            if not driver.plan(some_prompt(chance)).declined:
                return

    def hold_save(self, chance: random.Random) -> None:
        """Hold a save with half of its rows in the outbox, and wait to be killed."""
        driver, tokens = self._drivers[0], prompt(chance.randrange(1 << 30), 100)
        staged = self._stage(tokens, driver)
        if self._client.outbox is not None:
            half = staged.rows // 2 * driver.namespace.layout.row_bytes
            self._client.outbox.write(0, bytes([chance.randrange(256)]) * half)


def work_with_foreign_pid(home: str, pipe: Connection, *arguments: Any) -> None:
    """Like `work`, in a PID namespace of its own."""
    with_foreign_pid(work, home, pipe, *arguments)


def work_elsewhere(
    home: str, pipe: Connection, seed: int, spaces: list[Namespace], other: Path
) -> None:
    """Like `work`, where the folder `other` is the home, and with rows that no other client
    computes."""
    see_instead(Path(home), other)
    work(home, pipe, seed, spaces, "elsewhere")


def work(home: str, pipe: Connection, seed: int, spaces: list[Namespace], model: str = "") -> None:
    """Main function of the process: makes requests until told otherwise."""
    orders, chance = Orders(pipe), random.Random(seed)
    with PatientClient(home, orders) as client:
        engine, paused = Engine(client, spaces, orders, model), False
        while True:
            command = orders.next(wait=paused)
            if command == "end":
                orders.report("paused")
                return
            if command in ("halt", "pause"):
                paused = True
                orders.report("paused")
            elif command == "go":
                if orders.halted:
                    client.reconnect()
                orders.halted = paused = False
            elif command in ("hold_lease", "hold_save"):
                guarded(orders, partial(getattr(engine, command), chance))
                orders.report("holding")
                paused = True
            else:
                action = engine.look_around if chance.random() < 0.03 else engine.request
                guarded(orders, partial(action, chance))


def guarded(orders: Orders, action: Callable[[], None]) -> None:
    """Treat every failure of the store as a miss; report those that are bugs."""
    try:
        action()
    except _HaltError:
        return
    except DeadlineError as error:
        orders.report("problem", f"a daemon that lives did not answer: {error}")
    except KVShareError as error:
        if error.kind in _OUR_FAULT:
            orders.report("problem", f"{error.kind}: {error}")
        else:
            orders.report("refused", str(error.kind))
    except AssertionError as error:
        orders.report("wrong", str(error))
