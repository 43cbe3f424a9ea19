"""A state machine that compares a Store with plain dictionaries.

    TestStore = StoreMachine.TestCase

What is drawn never depends on the store, so a run can be repeated although its threads cannot.
After every step it compares the storage (files, shared memory) with the tree, and every row that is
served with the row that was computed. Subclass it and override `store_settings` to test another
configuration, or `row_layout` for other rows.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import blake3
import msgspec
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvshare_store.blocks.leases import LeaseBook
from kvshare_store.blocks.tiers.host.arena import ArenaView, slot_bytes
from kvshare_store.config import StoreConfig
from kvshare_store.errors import NoSpaceError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.save.staging import Buffer, Reuse, Staged, packed
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import (
    RowBook,
    Rows,
    check_partition,
    gather,
    pick,
    positions_of,
    prompt,
    rows_for,
)

SMALL_LAYOUT = KVLayout(2, 1, 4, "float32")
PARAGRAPHS = 6
PARAGRAPH_TOKENS = 14


class Open(NamedTuple):
    """A plan whose lease the machine holds."""

    tokens: tuple[int, ...]
    plan: ReusePlan
    rows: Rows
    owner: str


class Edit(NamedTuple):
    """A change to an earlier prompt."""

    at: int
    gone: int
    added: tuple[int, ...]


class Which(NamedTuple):
    """Which prompt a rule is about: see `StoreMachine._prompt`."""

    ago: int
    edit: Edit | None
    paragraphs: list[int] | None


paragraph_lists = st.lists(st.integers(0, PARAGRAPHS - 1), min_size=1, max_size=3)
edits = st.builds(
    Edit, st.integers(0, 60), st.integers(0, 5), st.lists(st.integers(0, 50), max_size=4).map(tuple)
)
prompts = st.one_of(
    st.builds(Which, st.integers(0, 30), st.one_of(st.none(), edits), st.none()),
    st.builds(Which, st.integers(0, 3), edits, st.none()),
    st.builds(Which, st.just(0), st.none(), paragraph_lists),
)


def text(paragraphs: list[int]) -> tuple[int, ...]:
    """A prompt of paragraphs, each with tokens of its own."""
    starts = [1000 * (number + 1) for number in paragraphs]
    return tuple(start + at for start in starts for at in range(PARAGRAPH_TOKENS))


class Clock:
    """A clock that only rules advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class StoreMachine(RuleBasedStateMachine):
    """Rules: save, edit, plan, load, finish, evict, expire, rot, reopen. One caller, one thread."""

    store_settings: ClassVar[dict[str, Any]] = {
        "block_tokens": 4,
        "host_bytes": 20 * 320,
        "disk_bytes": 60_000,
        "min_prompt_tokens": 4,
        "min_saving_ms": 0.0,
        "policy": "aggressive",
        "edit_window": 1,
        "semantic": "never",
        "plan_deadline_ms": 20_000.0,
        "gc_seconds": 0.0,
    }
    row_layout = SMALL_LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="kvshare-machine-"))
        self.config = StoreConfig(home=str(self.home), **self.store_settings)
        self.namespaces = [Namespace("m", self.row_layout, tenant=tenant) for tenant in "ab"]
        self.clock = Clock()
        self.books = {
            space.digest: RowBook(self.row_layout, whole=True) for space in self.namespaces
        }
        self.prompts: list[tuple[int, ...]] = []
        self.open: list[Open] = []
        self.staged: list[tuple[str, Staged]] = []
        """Saves that have not ended, with their owners."""
        self.lookups = 0
        self.salt = 0
        self.store = self._opened()

    def _opened(self) -> Store:
        store = Store(self.config)
        store.blocks.pool.leases = LeaseBook(self.clock)
        return store

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.home)

    # --- prompts ------------------------------------------------------------------------------

    @initialize(paragraphs=paragraph_lists, cap=st.integers(0, 2))
    def begin(self, paragraphs: list[int], cap: int) -> None:
        """Make sure there is a prompt to edit. Generations end at `cap`."""
        self.prompts.append(text(paragraphs))
        self.config = msgspec.structs.replace(self.config, max_generation=cap)
        self.reopen()

    def _prompt(self, which: Which) -> tuple[int, ...]:
        """A new prompt of known paragraphs, or an earlier one, possibly edited. It is
        remembered."""
        if which.paragraphs is not None:
            tokens = text(which.paragraphs)
        else:
            tokens = self.prompts[-1 - which.ago % len(self.prompts)]
        if which.edit is not None:
            at = which.edit.at % (len(tokens) + 1)
            tokens = (*tokens[:at], *which.edit.added, *tokens[at + which.edit.gone :])
        if tokens not in self.prompts:
            self.prompts.append(tokens)
        return tokens

    # --- plans --------------------------------------------------------------------------------

    def _plan(self, tokens: tuple[int, ...], space: int, owner: str = "") -> Open | None:
        """Plan, check the answer as far as it is known, and load the rows."""
        namespace = self.namespaces[space]
        plan = self.store.plan(tokens, namespace, owner=owner, pools=self.pools(space))
        self.lookups += 1
        check_partition(plan)
        assert plan.tokens == len(tokens)
        assert bool(plan.declined) != bool(plan.spans)
        if plan.declined:
            assert not plan.lease
            assert not plan.blocks
            return None
        self.check_blocks(plan, space)
        assert plan.generation <= (self.config.max_generation or 0)
        assert (plan.generation > 0) == any(not span.exact for span in plan.spans)
        rows = gather(plan, self.row_layout, self._rows_of)
        self.books[namespace.digest].check(tokens, plan, rows)
        return Open(tokens, plan, rows, owner)

    def pools(self, space: int) -> tuple[str, ...]:
        """The pools that plans in a namespace may use."""
        return ()

    def check_blocks(self, plan: ReusePlan, space: int) -> None:
        """Check whose the blocks of a plan are."""
        assert not plan.pooled

    def _rows_of(self, ref: Any) -> memoryview:
        self.store.blocks.host.arena.check(ref)
        return self.store.blocks.host.arena.rows(ref.offset, ref.nbytes)

    def _finish(self, open_: Open, *, failed: str = "") -> None:
        plan = open_.plan
        continued = max(0, plan.continued - plan.exact)
        edited = plan.reused - plan.exact - continued
        recomputed = plan.tokens - plan.reused
        outcome = Outcome(plan.exact, edited, recomputed, failed=failed, continued=continued)
        self.store.finish(plan, outcome)

    @rule(which=prompts, space=st.integers(0, 1), owner=st.sampled_from(["", "dies"]))
    def plan_and_hold(self, which: Which, space: int, owner: str) -> None:
        """Begin a request that takes its time."""
        opened = self._plan(self._prompt(which), space, owner)
        if opened is not None:
            self.open.append(opened)

    @rule(which=st.integers(0, 50), failed=st.sampled_from(["", "aborted"]))
    def finish(self, which: int, failed: str) -> None:
        """End a request, loaded or abandoned; a second end is ignored."""
        if not self.open:
            return
        opened = self.open.pop(which % len(self.open))
        self._finish(opened, failed=failed)
        self._finish(opened)

    # --- saves --------------------------------------------------------------------------------

    @rule(which=prompts, space=st.integers(0, 1))
    def save(self, which: Which, space: int) -> None:
        """Store a prompt that was computed in full."""
        self._save_fresh(self._prompt(which), space)

    def _save_fresh(self, tokens: tuple[int, ...], space: int) -> None:
        namespace = self.namespaces[space]
        rows = rows_for(tokens, self.row_layout)
        self.books[namespace.digest].write(tokens, rows, range(len(tokens)), len(tokens))
        self._save(tokens, space, rows.tobytes(), None)

    @rule(which=prompts, space=st.integers(0, 1), early=st.booleans())
    def serve_and_save(self, which: Which, space: int, early: bool) -> None:
        """Serve a prompt from what is stored and store what had to be computed."""
        tokens, namespace = self._prompt(which), self.namespaces[space]
        opened = self._plan(tokens, space)
        if opened is None:
            return self._save_fresh(tokens, space)
        plan = opened.plan
        edited = [span.start for span in plan.spans if not span.exact]
        exact = min(edited, default=len(tokens))
        self.salt += 1
        rows = rows_for(tokens, self.row_layout, exact=exact, salt=str(self.salt))
        covered = set(positions_of(plan.own(plan.spans)))
        fresh = [at for at in range(len(tokens)) if at not in covered]
        self.books[namespace.digest].write(tokens, rows, fresh, exact)
        self.books[namespace.digest].complete(tokens, plan, opened.rows, rows)
        if early:
            self._finish(opened)
        node = self._save(tokens, space, pick(rows, fresh), plan)
        if not early:
            self._finish(opened)
        if node is not None:
            assert node.exact_rows == exact
            assert node.generation == plan.generation
        return None

    def _save(
        self, tokens: tuple[int, ...], space: int, rows: bytes, plan: ReusePlan | None
    ) -> Node | None:
        namespace = self.namespaces[space]
        try:
            node_id = self.store.save(tokens, namespace, rows, plan)
        except NoSpaceError:
            return None
        if node_id is None:
            return None
        node = self.store.tree.get(node_id)
        assert node is not None
        assert node.tokens.tolist() == list(tokens)
        assert node.namespace == namespace.digest
        self.store.flush()
        if node_id in self.store.tree:
            self._check_served(tokens, space, node)
        return node

    def _check_served(self, tokens: tuple[int, ...], space: int, node: Node) -> None:
        """A prompt that was just stored can be served, if its rows can be brought into memory."""
        again = self._plan(tokens, space)
        if again is None:
            return
        run = self.config.block_tokens
        assert again.plan.exact >= min(node.exact_rows // run * run, len(tokens) - 1)
        self._finish(again)

    @rule(
        which=st.integers(0, 50),
        space=st.integers(0, 1),
        added=st.lists(st.integers(0, 50), min_size=1, max_size=9),
    )
    def answer(self, which: int, space: int, added: list[int]) -> None:
        """Store an answer: the node of its prompt grows."""
        namespace = self.namespaces[space]
        nodes = self.store.nodes.state.of_namespace(namespace.digest)
        if not nodes:
            return
        base = nodes[which % len(nodes)]
        tokens = (*base.tokens.tolist(), *added)
        reuse = Reuse(generation=base.generation, contexts=base.contexts)
        staged = self.store.stage(tokens, namespace, reuse, extends=base.length)
        if staged.known:
            return
        fresh = list(range(base.length, len(tokens)))
        assert positions_of(staged.fresh) == fresh
        self.salt += 1
        exact = base.exact_rows if base.generation else len(tokens)
        rows = rows_for(tokens, self.row_layout, exact=exact, salt=str(self.salt))
        self.books[namespace.digest].write(tokens, rows, fresh, exact)
        self.books[namespace.digest].answered(base.length, tokens, rows)
        source = Buffer(packed(pick(rows, fresh), staged.sizes, self.row_layout))
        with contextlib.suppress(NoSpaceError):
            stored = self.store.commit(staged.id, source)
            self.store.flush()
            node = None if stored is None else self.store.tree.get(stored)
            if node is not None:
                assert (node.generation, node.exact_rows) == (base.generation, exact)
                self._check_served((*tokens, *added), space, node)

    @rule(which=prompts, space=st.integers(0, 1), owner=st.sampled_from(["", "dies"]))
    def stage_only(self, which: Which, space: int, owner: str) -> None:
        """Begin a save that may never end."""
        if owner:  # one save at a time
            self.staged = [(other, save) for other, save in self.staged if other != owner]
        staged = self.store.stage(self._prompt(which), self.namespaces[space], owner=owner)
        if not staged.known:
            self.staged.append((owner, staged))

    @rule(which=st.integers(0, 50))
    def abandon(self, which: int) -> None:
        """End such a save."""
        if not self.staged:
            return
        self.store.abandon(self.staged.pop(which % len(self.staged))[1].id)

    # --- what takes things away -----------------------------------------------------------------

    @rule(count=st.sampled_from([1, 2, 100]))
    def evict(self, count: int) -> None:
        """Evict the nodes of least value."""
        before = [node.id for node in self.store.tree.victims()]
        pinned = {node.id for node in self.store.tree if node.pinned}
        assert self.store.evict(nodes=count) == min(count, len(before))
        assert {node.id for node in self.store.tree} == {*before[count:], *pinned}

    @rule(which=prompts, space=st.integers(0, 1))
    def evict_what_is_leased(self, which: Which, space: int) -> None:
        """Remove everything while a request loads its rows: it keeps them until it ends."""
        opened = self._plan(self._prompt(which), space)
        self.store.evict(nodes=100)
        if opened is not None:
            self.store.flush()
            assert np.array_equal(gather(opened.plan, self.row_layout, self._rows_of), opened.rows)
            self._finish(opened)

    @rule(seed=st.integers(0, 5), space=st.integers(0, 1))
    def fill_memory(self, seed: int, space: int) -> None:
        """Fill the store with other prompts."""
        for number in range(3):
            self._save_fresh(tuple(prompt(10 * seed + number, 3 * PARAGRAPH_TOKENS)), space)

    @rule(space=st.integers(0, 1))
    def evict_namespace(self, space: int) -> None:
        """Remove all nodes of one namespace, and no others."""
        digest = self.namespaces[space].digest
        others = [node.id for node in self.store.tree if node.namespace != digest]
        self.store.evict(namespace=digest)
        assert [node.id for node in self.store.tree] == others

    @rule()
    def clients_die(self) -> None:
        """A client dies: whatever its owner held is released."""
        self.store.reap({"dies"})
        self.open = [opened for opened in self.open if opened.owner != "dies"]
        self.staged = [(owner, save) for owner, save in self.staged if owner != "dies"]

    @rule()
    def leases_expire(self) -> None:
        """Every lease expires."""
        self.clock.now += self.config.lease_seconds + self.config.plan_deadline_ms
        self.store.reap()
        self.open.clear()

    @rule(which=st.integers(0, 500), byte=st.integers(0, 10_000))
    def rot(self, which: int, byte: int) -> None:
        """Flip one bit of a stored block."""
        self.store.flush()
        files = sorted((self.home / "blocks").glob("*/*"))
        if files:
            file = files[which % len(files)]
            data = bytearray(file.read_bytes())
            data[byte % len(data)] ^= 1
            file.write_bytes(data)

    @rule()
    def reopen(self) -> None:
        """Close the store and open it again."""
        self.store.flush()
        before = {node.id: msgspec.structs.asdict(node) for node in self.store.tree}
        self.store.close()
        self.open.clear()
        self.staged.clear()
        self.lookups = 0
        self.store = self._opened()
        assert {node.id: msgspec.structs.asdict(node) for node in self.store.tree} == before

    # --- what always holds ------------------------------------------------------------------------

    @invariant()
    def storage_and_tree_agree(self) -> None:
        """Once the queue is empty, the files are exactly the blocks of nodes, plus those that a
        lease holds."""
        self.store.flush()
        wanted = self.store.tree.blocks()
        held = {ref.name for opened in self.open for ref in opened.plan.blocks}
        if set(self.store.blocks.names()) > wanted | held:
            self.store.collect()  # left by a crash or a late copy
        files = {file.stem: file for file in (self.home / "blocks").glob("*/*")}
        assert wanted <= set(files), "a node points at a block that is not on disk"
        assert set(files) <= wanted | held, "blocks without a node were left behind"
        use = self.store.blocks.report()
        catalog = (
            self.store.repository.catalog.bytes if self.store.repository.catalog is not None else 0
        )
        blocks = sum(file.stat().st_size for file in files.values())
        assert use["disk"]["bytes"] == blocks + catalog
        assert blocks <= self.config.disk_bytes  # the last commit may exceed it
        assert use["disk"]["blocks"] == len(files)
        assert not list((self.home / "tmp").iterdir())
        assert set(self.store.blocks.host.names()) <= wanted | held
        self._check_catalogue()

    def _check_catalogue(self) -> None:
        catalog = self.store.repository.catalog
        assert catalog is not None
        durable = {node.id: set(node.blocks) for node, _ in catalog.load()}
        assert durable == {node.id: set(node.blocks) for node in self.store.tree}

    @invariant()
    def shared_memory_holds_what_it_says(self) -> None:
        """The bytes of each block in the host, read as a client reads them, hash to its name. No
        other slot is in use, apart from saves under way."""
        host = self.store.blocks.host
        arena = ArenaView.attach(host.arena.descriptor)
        taken, seqs = [], set()
        for name in host.names():
            ref = host.ref(name)
            assert ref is not None
            arena.check(ref)
            seqs.add(ref.seq)
            data = bytes(arena.rows(ref.offset, ref.nbytes))
            names = {_name(space, self.row_layout, data) for space in self.namespaces}
            assert name in names, "the bytes in shared memory are not the block's"
            taken.append((ref.offset, ref.offset + slot_bytes(ref.nbytes)))
        assert len(seqs) == len(taken), "two slots have one sequence number"
        taken.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken)), "slots overlap"
        used = self.store.blocks.report()["host"]["bytes"]
        assert sum(stop - start for start, stop in taken) == used
        assert used <= self.config.host_bytes
        assert len(self.staged) == self.store.stats()["staged"]

    @invariant()
    def leases_are_the_open_plans(self) -> None:
        """No lease is forgotten or outlives its plan, and open plans keep their rows."""
        stats = self.store.stats()
        assert stats["leases"] == len(self.store.blocks.leases) == len(self.open)
        ended = (
            sum(stats[f"hits_{kind}"] for kind in ("exact", "continued", "edited"))
            + stats["misses"]
        )
        assert stats["lookups"] == self.lookups == ended + len(self.open)
        assert sum(stats["declined"].values()) == stats["misses"]
        for opened in self.open:
            rows = gather(opened.plan, self.row_layout, self._rows_of)
            assert np.array_equal(rows, opened.rows), "leased rows changed"

    @invariant()
    def nodes_are_sound(self) -> None:
        """Provenance stays within the cap, segments cover each prompt once, and the tree has no
        loop."""
        for node in self.store.tree:
            assert 0 <= node.generation <= (self.config.max_generation or 0)
            covered = positions_of(node.segments)
            assert covered == list(range(node.length))
            assert node.exact_rows <= node.length
            assert not node.exact or node.exact_rows == node.length
            path = self.store.tree.path(node.id)
            assert path[-1].id == node.id
            assert len({ancestor.id for ancestor in path}) == len(path)


def _name(namespace: Namespace, layout: KVLayout, data: bytes) -> str:
    """The name of a block with these bytes, computed independently of the product."""
    hasher = blake3.blake3(msgspec.msgpack.encode((namespace.digest, layout)))
    hasher.update(data)
    return hasher.hexdigest()


def examples(default: int) -> int:
    """Number of runs of a machine; KVSHARE_MACHINE_EXAMPLES overrides it."""
    return int(os.environ.get("KVSHARE_MACHINE_EXAMPLES", default))
