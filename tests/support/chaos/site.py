"""Three machines on one remote and one catalogue, and the prompts that must be there: see
`machines`."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvshare_store.commit.condemned import now_s
from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import Driver, RowBook, Rows, prompt

SPACE = Namespace("machines", KVLayout(2, 1, 4, "float32"))
TTL_S = 2 * 3600.0
_TOKENS = 40
NAMES = "abc"
_BITS = {"a": 0, "b": 0, "c": 1}
"""What tells the GPUs' rows apart; two machines have the same GPU."""
_SMALL = "c"
"""The machine that holds only a few nodes in memory."""


class OwnBits(RowBook):
    """Rows of one machine's GPU: the last bits of every row are its own."""

    def __init__(self, book: RowBook, variant: int) -> None:
        super().__init__(book.layout)
        self._facts = book._facts
        self._variant = np.uint32(variant)

    def computed(self, tokens: Sequence[int], exact: int, salt: str) -> Rows:
        return super().computed(tokens, exact, salt) ^ self._variant


class Kept(NamedTuple):
    """A prompt that was committed."""

    tokens: tuple[int, ...]
    used: float
    """When any machine last used it, in simulated seconds."""
    pinned: bool = False


class Site:
    """The machines, what they share, and the prompts that must be there. Use as a context
    manager."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.book = RowBook(SPACE.layout)
        self.machines: dict[str, Driver] = {}
        self.kept: dict[str, Kept] = {}
        """By node id."""
        self.foreign: list[Path] = []
        self.findings: list[str] = []
        self.done: Counter[str] = Counter()
        self.passed = 0.0
        """Simulated seconds."""
        self._prompts = 0
        self._stack = ExitStack()

    def __enter__(self) -> Site:
        for name in NAMES:
            self.open(name)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # --- machines -----------------------------------------------------------------------------

    def config(self, name: str, **settings: Any) -> StoreConfig:
        """Settings of one machine. It reads the catalogue and collects garbage only when a step
        says so."""
        shared = {
            "home": str(self.folder / name),
            "remote": f"file://{self.folder / 'remote'}",
            "remote_write": "through",
            "remote_timeout_ms": 10_000.0,
            "catalog": str(self.folder / "catalog"),
            "sync_seconds": 3600.0,
            "gc_seconds": 0.0,
            "ttl_seconds": TTL_S,
            "max_nodes": 6 if name == _SMALL else 1000,
            "max_scatter": 1.2,
            "max_generation": 9,
            "host_bytes": 1 << 20,
            "disk": False,
            "block_tokens": 8,
            "min_prompt_tokens": 8,
            "min_saving_ms": -1e9,
            "plan_deadline_ms": 10_000.0,
            "policy": "aggressive",
            "semantic": "never",
        }
        return StoreConfig(**{**shared, **settings})

    def open(self, name: str) -> None:
        """Start a machine. Real time has hardly passed since any prompt was saved, so what it
        believes of their age is wrong, unless the others have written their uses down."""
        for other in self.machines.values():
            if other.store.repository.uses is not None:
                other.store.repository.uses.exchange()
        store = self._stack.enter_context(Store(self.config(name)))
        book = OwnBits(self.book, _BITS[name])
        self.machines[name] = Driver(store, SPACE, book)
        self.set_clocks(store)
        if store.repository.uses is not None:
            store.repository.uses.exchange()  # while it opened it used real time

    def set_clocks(self, store: Store) -> None:
        """Put simulated time everywhere the store measures time."""
        store.tree.clock = lambda: time.monotonic() + self.passed
        if store.repository.condemned is not None:
            store.repository.condemned.clock = lambda: now_s() + self.passed
        if store.repository.uses is not None:
            store.repository.uses.clock = lambda: time.time() + self.passed

    def any(self) -> Driver:
        """A random machine."""
        return self.machines[self.chance.choice(NAMES)]

    def learn(self, engine: Driver) -> None:
        """Let the machine read the catalogue now."""
        if engine.store.sharing is not None:
            engine.store.sharing.sync()

    # --- prompts ------------------------------------------------------------------------------

    def new_prompt(self) -> list[int]:
        """Tokens that no machine has seen."""
        self._prompts += 1
        return prompt(10_000 + self._prompts, _TOKENS)

    def some(self) -> tuple[str, Kept] | None:
        """A random prompt that must be there."""
        return self.chance.choice(sorted(self.kept.items())) if self.kept else None

    def save(self, engine: Driver, tokens: Sequence[int], *, full: bool = True) -> None:
        """Save a prompt, computed in full or from stored rows. It counts as committed once it is
        durable and in the catalogue."""
        node_id = engine.save(tokens) if full else engine.serve_and_save(tokens)
        engine.store.flush()
        catalog = engine.store.repository.catalog
        if node_id is not None and catalog is not None and catalog.stamps(ids=[node_id]):
            self.kept[node_id] = Kept(tuple(tokens), self.passed)

    def serve(self, engine: Driver, tokens: Sequence[int]) -> None:
        """Ask for a prompt; this counts as a use of its donors. One that nobody had used for so
        long that it may go is no longer one that must be there: another machine may remove it
        before it hears of this use."""
        for node_id in engine.serve(tokens).donors:
            if (kept := self.kept.get(node_id)) is None:
                continue
            if kept.pinned or self.passed - kept.used < TTL_S:
                self.kept[node_id] = kept._replace(used=self.passed)
            else:
                del self.kept[node_id]

    # --- what must hold -----------------------------------------------------------------------

    @contextmanager
    def noting(self, what: str) -> Any:
        """Turn an error of the oracle into a finding."""
        try:
            yield
        except (AssertionError, KVShareError) as error:
            self.findings.append(f"{what}: {type(error).__name__}: {error}")

    def audit(self, after: str) -> None:
        """A machine with empty tiers of its own must be served every prompt that must be there."""
        home = Path(tempfile.mkdtemp(dir=self.folder))
        settings = {"ttl_seconds": 0.0, "max_nodes": 1000, "home": str(home / "fresh")}
        with self.noting(f"after {after}"), Store(self.config("fresh", **settings)) as store:
            engine = Driver(store, SPACE, self.book)
            for node_id, kept in sorted(self.kept.items()):
                if lost := missing(store, node_id):
                    self.findings.append(f"after {after}: {lost}")
                    del self.kept[node_id]
                else:
                    engine.serve(kept.tokens)
        for file in [file for file in self.foreign if not file.exists()]:
            self.findings.append(f"after {after}: somebody else's {file.name} was removed")
            self.foreign.remove(file)
        shutil.rmtree(home)


def missing(store: Store, node_id: str) -> str:
    """What is missing of a node; empty if nothing."""
    node = store.tree.get(node_id)
    if node is None:
        return f"node {node_id[:8]} is gone"
    for name in node.blocks:
        try:
            store.blocks.read(name)
        except KVShareError as error:
            return f"node {node_id[:8]}: {error}"
    return ""
