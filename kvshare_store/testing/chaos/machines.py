"""Three machines on one remote and one catalogue: what one has committed must outlive the others.

    python -m kvshare_store.testing.chaos.machines --steps 500 --seed 1

Each step is drawn from `STEPS`; after a few of them a fourth machine opens with nothing of its own
and must be served every prompt that somebody committed and nobody was asked to remove.
docs/design/chaos.md says which fault each kind of step finds.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import typer

from kvshare_store.condemned import now_s
from kvshare_store.config import StoreConfig
from kvshare_store.errors import ForeignError, KVShareError
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.oracle import Driver, RowBook, Rows, prompt

SPACE = Namespace("machines", KVLayout(2, 1, 4, "float32"))
TTL_S = 2 * 3600.0
_TOKENS = 40
_NAMES = "abc"
_BITS = {"a": 0, "b": 0, "c": 1}
"""The last bits of what each computes: two have the same GPU."""
_SMALL = "c"
"""The machine that keeps only a few nodes in memory."""


class OwnBits(RowBook):
    """What one machine's GPU computes: the last bits of every row are its own."""

    def __init__(self, book: RowBook, variant: int) -> None:
        super().__init__(book.layout)
        self._facts = book._facts
        self._variant = np.uint32(variant)

    def computed(self, tokens: Sequence[int], exact: int, salt: str) -> Rows:
        return super().computed(tokens, exact, salt) ^ self._variant


class Kept(NamedTuple):
    """A prompt that somebody has committed."""

    tokens: tuple[int, ...]
    used: float
    """When it was last used by anybody, in simulated seconds."""
    pinned: bool = False


class Site:
    """The machines, what they share, and what must be there. Use as a context manager."""

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
        for name in _NAMES:
            self.open(name)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # --- machines -----------------------------------------------------------------------------

    def config(self, name: str, **settings: Any) -> StoreConfig:
        """Of one machine. It looks into the catalogue, and collects, when a step says so."""
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
        """A machine starts."""
        store = self._stack.enter_context(Store(self.config(name)))
        book = OwnBits(self.book, _BITS[name])
        self.machines[name] = Driver(store, SPACE, book)
        self.set_clocks(store)
        if store.shelf.uses is not None:
            store.shelf.uses.exchange()  # it has opened by the clock on the wall

    def set_clocks(self, store: Store) -> None:
        """Simulated time, where the store measures it."""
        store.tree._clock = lambda: time.monotonic() + self.passed
        if store.shelf.condemned is not None:
            store.shelf.condemned.clock = lambda: now_s() + self.passed
        if store.shelf.uses is not None:
            store.shelf.uses.clock = lambda: time.time() + self.passed

    def any(self) -> Driver:
        """Some machine."""
        return self.machines[self.chance.choice(_NAMES)]

    def learn(self, engine: Driver) -> None:
        """The machine looks into the catalogue now."""
        if engine.store._sharing is not None:
            engine.store._sharing.sync()

    # --- prompts ------------------------------------------------------------------------------

    def new_prompt(self) -> list[int]:
        """Tokens that nobody has seen."""
        self._prompts += 1
        return prompt(10_000 + self._prompts, _TOKENS)

    def some(self) -> tuple[str, Kept] | None:
        """A prompt that must be there."""
        return self.chance.choice(sorted(self.kept.items())) if self.kept else None

    def save(self, engine: Driver, tokens: Sequence[int], *, full: bool = True) -> None:
        """Save a prompt, computed in full or from what is stored; it counts once it is durable and
        in the catalogue."""
        node_id = engine.save(tokens) if full else engine.serve_and_save(tokens)
        engine.store.flush()
        catalog = engine.store.shelf.catalog
        if node_id is not None and catalog is not None and catalog.stamps(ids=[node_id]):
            self.kept[node_id] = Kept(tuple(tokens), self.passed)

    def serve(self, engine: Driver, tokens: Sequence[int]) -> None:
        """Somebody asks for a prompt; its donors are used."""
        for node_id in engine.serve(tokens).donors:
            if (kept := self.kept.get(node_id)) is not None:
                self.kept[node_id] = kept._replace(used=self.passed)

    # --- what must hold -----------------------------------------------------------------------

    @contextmanager
    def noting(self, what: str) -> Any:
        """Whatever the oracle does not accept is a finding."""
        try:
            yield
        except (AssertionError, KVShareError) as error:
            self.findings.append(f"{what}: {type(error).__name__}: {error}")

    def audit(self, after: str) -> None:
        """A machine that has nothing of its own is served every prompt that must be there."""
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
    """What of a node is not there; empty if nothing."""
    node = store.tree.get(node_id)
    if node is None:
        return f"node {node_id[:8]} is gone"
    for name in node.blocks:
        try:
            store.blocks.read(name)
        except KVShareError as error:
            return f"node {node_id[:8]}: {error}"
    return ""


# --- steps --------------------------------------------------------------------------------------


def save_new(site: Site) -> None:
    """A prompt that is new to all."""
    site.save(site.any(), site.new_prompt())


def save_same_on_two(site: Site) -> None:
    """Two machines compute the same prompt; neither knows of the other's."""
    one, other = site.chance.sample(sorted(site.machines), 2)
    tokens = site.new_prompt()
    for name in (one, other):
        site.save(site.machines[name], tokens)
    if site.chance.random() < 0.5:
        collect_everything(site, site.machines[other])
        for name in (one, other):
            forget_copies(site.machines[name])
            site.serve(site.machines[name], tokens)


def collect_everything(site: Site, engine: Driver) -> None:
    """What nobody uses is seen, condemned and removed by this machine."""
    for _ in range(3):
        minutes_pass(site)
        site.learn(engine)
        engine.store.collect()
    expired(site)


def forget_copies(engine: Driver) -> None:
    """Other requests have taken all the room in a machine's memory."""
    with engine.store.shelf.lock:
        for name in list(engine.store.blocks.host.names()):
            engine.store.blocks.host.drop(name)


def edit(site: Site) -> None:
    """An edited prompt, built on rows of one that is stored."""
    found, engine = site.some(), site.any()
    if found is not None:
        site.learn(engine)
        tokens = list(found[1].tokens)
        tokens[site.chance.randrange(len(tokens) - 1)] = site.chance.randrange(1 << 30)
        site.save(engine, tokens, full=False)


def merge_unheard(site: Site) -> None:
    """A machine merges a node, its donor leaves, and another wants the node in its old form."""
    one, other = (site.machines[name] for name in site.chance.sample(sorted(site.machines), 2))
    tokens = site.new_prompt()
    site.save(one, tokens)
    edited = [*tokens[:20], 7, *tokens[21:]]
    site.save(one, edited, full=False)
    site.learn(other)
    one.store.collect()
    donors = [node.id for node in one.store.tree if node.tokens.tolist() == tokens]
    one.store.shelf.remove(donors)
    one.store.flush()
    for node_id in donors:
        site.kept.pop(node_id, None)
    collect_everything(site, one)
    forget_copies(other)
    site.serve(other, edited)
    other.store.flush()


def pin_unheard(site: Site) -> None:
    """A node is pinned on one machine and removed on another that has not heard of it."""
    one, other = (site.machines[name] for name in site.chance.sample(sorted(site.machines), 2))
    site.save(one, site.new_prompt())
    site.learn(other)
    node_id, kept = list(site.kept.items())[-1]
    if one.store.pin(node_id):
        site.kept[node_id] = kept._replace(pinned=True)
        other.store.shelf.remove([node_id])
        other.store.flush()


def serve(site: Site) -> None:
    """Somebody asks again; rows are compared."""
    if (found := site.some()) is not None:
        site.serve(site.any(), found[1].tokens)


def learn(site: Site) -> None:
    """A machine looks into the catalogue."""
    site.learn(site.any())


def collect(site: Site) -> None:
    """A machine's janitor: age, garbage, merges."""
    site.any().store.collect()
    expired(site)


def expired(site: Site) -> None:
    """What nobody has used for long may be gone."""
    for node_id, kept in list(site.kept.items()):
        if not kept.pinned and site.passed - kept.used >= TTL_S:
            del site.kept[node_id]


def collect_while_another_saves(site: Site) -> None:
    """A prompt that was forgotten everywhere is saved again while its blocks are collected."""
    one, other = (site.machines[name] for name in site.chance.sample("ab", 2))
    tokens = site.new_prompt()
    site.save(one, tokens)
    site.learn(other)
    (node_id,) = [n.id for n in one.store.tree if n.tokens.tolist() == tokens] or [""]
    one.store.shelf.remove([node_id])
    one.store.flush()
    site.kept.pop(node_id, None)
    site.learn(other)
    moment = site.chance.randrange(4)
    for at in range(3):
        if at == moment:
            site.save(one if site.chance.random() < 0.3 else other, tokens)
        minutes_pass(site)
        site.learn(one)
        if at == 2 and moment == 3:
            collect_slowly(one, lambda: site.save(other, tokens))
        else:
            one.store.collect()
    expired(site)


def collect_slowly(engine: Driver, meanwhile: Callable[[], None]) -> None:
    """A pass of a janitor, with something that happens right before it deletes what nobody needs.
    What cannot end before goes on for as long as it needs."""
    blocks = engine.store.blocks
    delete = blocks.delete_shared
    other = threading.Thread(target=meanwhile)

    def slow(doomed: Mapping[str, str]) -> None:
        if other.ident is None:
            other.start()
            other.join(0.5)
        delete(doomed)

    with patch.object(blocks, "delete_shared", slow):
        engine.store.collect()
    if other.ident is not None:
        other.join()


def minutes_pass(site: Site) -> None:
    """Two of them: longer than a grace. Machines write down what they have used."""
    site.passed += 120.0
    for engine in site.machines.values():
        if engine.store.shelf.uses is not None and engine.store.shelf.uses.due():
            engine.store.shelf.uses.exchange()


def hours_pass(site: Site) -> None:
    """Machines write down what they have used, as they do every few minutes."""
    for _ in range(site.chance.randrange(1, 3)):
        for engine in site.machines.values():
            if engine.store.shelf.uses is not None:
                engine.store.shelf.uses.exchange()
        site.passed += 3600.0
        serve(site)
    for engine in site.machines.values():
        if engine.store.shelf.uses is not None:
            engine.store.shelf.uses.exchange()


def pin(site: Site) -> None:
    """An operator pins or unpins a node on one machine."""
    found, engine = site.some(), site.any()
    if found is not None:
        pinned = site.chance.random() < 0.8
        if engine.store.pin(found[0], pinned):
            site.kept[found[0]] = found[1]._replace(pinned=pinned)


def evict(site: Site) -> None:
    """An operator makes room on one machine, which may not have heard of pins."""
    engine = site.any()
    before = {node.id for node in engine.store.tree}
    engine.store.evict(nodes=1)
    engine.store.flush()
    for node_id in before - {node.id for node in engine.store.tree}:
        if (kept := site.kept.get(node_id)) is not None and not kept.pinned:
            del site.kept[node_id]


def another_store(site: Site) -> None:
    """Somebody configures another store with the same remote, and its janitor runs."""
    settings = {"catalog": str(site.folder / "elsewhere"), "home": str(site.folder / "other")}
    with suppress(ForeignError), Store(site.config("other", **settings)) as store:
        site.set_clocks(store)
        for _ in range(3):
            store.collect()
            minutes_pass(site)


def foreign_file(site: Site) -> None:
    """Somebody keeps something of his own in the same folder."""
    folder = site.folder / "remote" / "blocks" / site.chance.choice(["mine", SPACE.digest])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{site.chance.choice(['letter', 'photo'])}-{len(site.foreign)}"
    file.write_text("not yours")
    site.foreign.append(file)


def restart(site: Site) -> None:
    """A machine ends in good order and starts again."""
    name = site.chance.choice(_NAMES)
    site.machines[name].store.close()
    site.open(name)


Step = Callable[[Site], None]
STEPS: dict[Step, int] = {
    save_new: 4,
    save_same_on_two: 3,
    edit: 5,
    merge_unheard: 2,
    pin_unheard: 1,
    serve: 4,
    learn: 8,
    collect: 8,
    collect_while_another_saves: 3,
    minutes_pass: 5,
    hours_pass: 3,
    pin: 3,
    evict: 2,
    another_store: 1,
    foreign_file: 1,
    restart: 1,
}
"""How often each kind of step is drawn. Another kind is one more function here."""
_AUDIT_EVERY = 8


def run(
    folder: Path, steps: int, seed: int, heard: Callable[[Site], None] = lambda _: None
) -> Site:
    """Take `steps` steps; what is wrong is in the `findings` of the site, which is closed."""
    with Site(folder, seed) as site:
        for number in range(1, steps + 1):
            (step,) = site.chance.choices(list(STEPS), list(STEPS.values()))
            with site.noting(f"step {number}, {step.__name__}"):
                step(site)
            site.done[step.__name__] += 1
            if number % _AUDIT_EVERY == 0 or number == steps:
                site.audit(f"step {number}, {step.__name__}")
        return site


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps to take.")] = 200,
    seed: Annotated[int | None, typer.Option(help="Repeat a run; else one is drawn.")] = None,
) -> None:
    """Let three machines work on one remote and one catalogue, and look for what was lost."""
    drawn = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    typer.echo(f"seed {drawn} (repeat with --seed {drawn})")
    folder = Path(tempfile.mkdtemp(prefix="kvshare-machines-"))
    try:
        site = run(folder, steps, drawn)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    typer.echo(", ".join(f"{count} {name}" for name, count in sorted(site.done.items())))
    typer.echo(f"{len(site.kept)} prompts kept at the end, {len(site.findings)} findings")
    for finding in site.findings[:10]:
        typer.echo(finding)
    raise typer.Exit(1 if site.findings else 0)


if __name__ == "__main__":
    typer.run(main)
