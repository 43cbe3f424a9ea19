"""What one machine has committed, and nobody has purged, is not lost to another machine's
janitor."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lancedb
import msgspec
import numpy as np
import pytest

from kvshare_store.catalog.ledger import Fact
from kvshare_store.commit.durable import Ended
from kvshare_store.commit.queue import Addition
from kvshare_store.errors import StorageError
from kvshare_store.nodes.node import encode_node, new_stamp
from kvshare_store.store import Store
from tests.support.neighbours import (
    NAMESPACE,
    PATIENCE_S,
    Machine,
    collect_all,
    config_of,
    knows,
    learn,
    minutes_pass,
    remote_blocks,
    save,
    until,
)
from tests.support.oracle import Driver, RowBook, Rows, prompt
from tests.support.tiers import drop_from_host

ASKED_ONLY = {"sync_seconds": 3600.0, "gc_seconds": 0.0}
"""A machine that reads the catalogue only when the test says so."""
PROMPT = prompt(1, 40)


class OtherBits(RowBook):
    """Rows of another GPU: the last bit of every row differs. Shares the book of known rows."""

    def __init__(self, book: RowBook) -> None:
        super().__init__(book.layout)
        self._facts = book._facts

    def computed(self, tokens: Sequence[int], exact: int, salt: str) -> Rows:
        return super().computed(tokens, exact, salt) ^ np.uint32(1)


def served_everywhere(*engines: Driver) -> list[int]:
    """Rows of `PROMPT` that each machine serves from the remote."""
    for engine in engines:
        drop_from_host(engine.store)
    return [engine.serve(PROMPT).exact for engine in engines]


def test_two_machines_compute_the_same_prompt(machine: Machine, tmp_path: Path) -> None:
    """The first machine's row stays, and the second uses the first one's blocks."""
    one, other = (machine(name, disk=False, **ASKED_ONLY) for name in "ab")
    other.book = OtherBits(one.book)  # type: ignore[arg-type]
    assert save(one, PROMPT) == save(other, PROMPT)
    assert remote_blocks(tmp_path) == 10
    for engine in (one, other):
        learn(engine)
        collect_all(engine)
    assert remote_blocks(tmp_path) == 5
    assert served_everywhere(one, other) == [39, 39]
    learn(one)
    assert [len(engine.store.tree) for engine in (one, other)] == [1, 1]


def edit_of(engine: Driver) -> list[int]:
    """Save a prompt, then an edit of it that shares most of its blocks; returns the edit's
    tokens."""
    save(engine, PROMPT)
    edited = [*PROMPT[:20], 7, *PROMPT[21:]]
    plan = engine.serve(edited)
    assert plan.reused > plan.exact
    engine.save(edited, plan)
    engine.store.flush()
    return edited


def merged_on_one(machine: Machine) -> tuple[Driver, Driver, list[int]]:
    """Two machines with an edited prompt, which the first has merged; returns its tokens."""
    settings = {"policy": "aggressive", "disk": False, "max_scatter": 1.0, **ASKED_ONLY}
    one, other = machine("a", **settings), machine("b", **settings)
    other.book = one.book
    edited = edit_of(one)
    learn(other)
    assert one.store.collect().merged == 1
    return one, other, edited


def test_a_merge_on_one_machine_is_learned_by_the_others(machine: Machine) -> None:
    one, other, edited = merged_on_one(machine)
    learn(other)
    forms = [next(n for n in e.store.tree if n.tokens.tolist() == edited) for e in (one, other)]
    assert forms[0].blocks == forms[1].blocks
    donor = next(node.id for node in one.store.tree if node.tokens.tolist() == PROMPT)
    one.store.nodes.remove([donor])
    one.store.flush()
    learn(other)
    collect_all(one)
    drop_from_host(other.store)
    assert other.serve(edited).reused == 39
    assert knows(one, edited)


def test_a_machine_that_missed_a_merge_does_not_remove_the_node(machine: Machine) -> None:
    """Its old blocks are gone when it needs them. It forgets its own form of the node, but keeps
    the row."""
    one, other, edited = merged_on_one(machine)
    one.store.nodes.remove([n.id for n in one.store.tree if n.tokens.tolist() == PROMPT])
    one.store.flush()
    collect_all(one)
    assert other.serve(edited).declined == "not_resident"
    other.store.flush()
    assert knows(one, edited)
    learn(other)
    assert other.serve(edited).reused == 39


def test_a_pin_holds_on_machines_that_have_not_heard_of_it(machine: Machine) -> None:
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    node_id = save(one, PROMPT)
    assert node_id is not None
    learn(other)
    assert one.store.pin(node_id)
    other.store.evict(nodes=1)
    other.store.flush()
    learn(one)
    assert knows(one, PROMPT)
    learn(other)
    found = other.store.tree.get(node_id)
    assert found is not None
    assert found.pinned


def test_a_pin_brings_back_what_another_machine_removed_meanwhile(machine: Machine) -> None:
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    node_id = save(one, PROMPT)
    assert node_id is not None
    learn(other)
    other.store.clear()
    assert one.store.pin(node_id)
    learn(other)
    assert knows(other, PROMPT)


def save_long_ago(engine: Driver, *prompts: list[int]) -> None:
    """Prompts that were saved five hours ago and, as far as other machines know, not used since."""
    for tokens in prompts:
        save(engine, tokens)
    catalog = engine.store.repository.catalog
    assert catalog is not None
    for node, vectors in list(catalog.load()):
        old = msgspec.structs.replace(node, created=time.time() - 5 * 3600, stamp=new_stamp())
        assert catalog.replace(old, vectors, node.stamp)


def uses_are_written(engine: Driver) -> None:
    """As the machine itself does every few minutes."""
    assert engine.store.repository.uses is not None
    engine.store.repository.uses.exchange()


def test_what_one_machine_uses_does_not_expire_on_another(machine: Machine) -> None:
    first, one, other = (machine(name, ttl_seconds=3600.0, **ASKED_ONLY) for name in "abc")
    one.book = first.book
    save_long_ago(first, PROMPT, prompt(2, 40))
    for engine in (one, other):
        learn(engine)
    one.serve(PROMPT)
    uses_are_written(one)
    assert other.store.collect().nodes == 1
    learn(one)
    assert knows(one, PROMPT)
    assert not knows(one, prompt(2, 40))


def test_a_machine_that_was_away_learns_uses_along_with_rows(machine: Machine) -> None:
    """It had heard of the use when it did not know the prompt yet."""
    first, one, away = (machine(name, ttl_seconds=3600.0, **ASKED_ONLY) for name in "abc")
    one.book = first.book
    save_long_ago(first, PROMPT, prompt(2, 40))
    learn(one)
    set_clock(one, -3000.0)
    one.serve(PROMPT)
    for engine in (one, away):
        uses_are_written(engine)
    learn(away)
    assert away.store.collect().nodes == 1
    learn(one)
    assert [knows(one, PROMPT), knows(one, prompt(2, 40))] == [True, False]


def test_a_use_counts_although_the_clock_was_set_back(machine: Machine) -> None:
    first, one, other = (machine(name, ttl_seconds=3600.0, **ASKED_ONLY) for name in "abc")
    one.book = first.book
    save_long_ago(first, PROMPT)
    for engine in (one, other):
        learn(engine)
    uses_are_written(one)
    set_clock(one, -300.0)
    one.serve(PROMPT)
    uses_are_written(one)
    assert other.store.collect().nodes == 0


def test_nobody_believes_in_a_use_that_is_still_to_come(machine: Machine) -> None:
    """A node that counts as used next year would not expire before."""
    one, other = (machine(name, ttl_seconds=3600.0, **ASKED_ONLY) for name in "ab")
    node = save(one, PROMPT)
    assert node is not None
    learn(other)
    other.store.tree.clock = lambda: time.monotonic() + 60.0
    set_clock(one, 365 * 86_400.0)
    uses_are_written(one)
    uses_are_written(other)
    assert 0.0 <= other.store.tree.idle_for(node) < 60.0


def set_clock(engine: Driver, seconds: float) -> None:
    """This machine's clock is so much ahead from now on."""
    assert engine.store.repository.uses is not None
    engine.store.repository.uses.clock = lambda: time.time() + seconds


def test_a_small_machine_forgets_for_itself_alone(machine: Machine) -> None:
    one, small = machine("a"), machine("b", max_nodes=2)
    small.book = one.book
    for seed in range(4):
        save(one, prompt(seed, 40))
    until(lambda: small.store.repository.catalog.count() == 4)  # type: ignore[union-attr]
    save(small, prompt(9, 40))
    until(lambda: len(small.store.tree) == 2)
    collect_all(small)
    until(lambda: len(one.store.tree) == 5)
    late = machine("c", disk=False)
    late.book = one.book
    assert [late.serve(prompt(seed, 40)).exact for seed in (0, 1, 2, 3, 9)] == [39] * 5


def test_a_small_machine_forgets_nothing_that_has_no_row_yet(machine: Machine) -> None:
    one, small = machine("a", **ASKED_ONLY), machine("b", max_nodes=1, **ASKED_ONLY)
    small.book = one.book
    slow = threading.Event()
    busy = small.store.nodes.queue.call(lambda: slow.wait(PATIENCE_S))
    for seed in range(3):
        small.save(prompt(seed, 40))
    slow.set()
    assert busy.result(PATIENCE_S)
    small.store.flush()
    learn(one)
    assert [knows(one, prompt(seed, 40)) for seed in range(3)] == [True] * 3
    assert len(small.store.tree) == 1


def test_a_small_machine_keeps_what_was_saved_again_while_its_first_row_was_committed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row is about to be removed, and the second one waits."""
    one, small = machine("a", **ASKED_ONLY), machine("b", max_nodes=1, **ASKED_ONLY)
    small.book = one.book
    durable = small.store.repository.durable
    stored, go_on = threading.Event(), threading.Event()
    store = durable.store

    def store_slowly(additions: Sequence[Addition]) -> Ended:
        ended = store(additions)
        stored.set()
        assert go_on.wait(PATIENCE_S)
        return ended

    monkeypatch.setattr(durable, "store", store_slowly)
    node = str(small.save(PROMPT))
    assert stored.wait(PATIENCE_S)
    small.store.nodes.remove([node])
    for tokens in (PROMPT, prompt(2, 40)):
        small.save(tokens)
    go_on.set()
    small.store.flush()
    learn(one)
    assert [knows(one, tokens) for tokens in (PROMPT, prompt(2, 40))] == [True, True]
    assert len(small.store.tree) == 1


def test_a_quota_spares_what_another_machine_may_be_using(machine: Machine) -> None:
    quota = 2 * 40 * NAMESPACE.layout.row_bytes
    first, one = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    tight = machine("c", **ASKED_ONLY, namespace_bytes=quota)
    one.book = first.book
    save_long_ago(first, *(prompt(seed, 40) for seed in range(4)))
    for engine in (one, tight):
        learn(engine)
    for seed in range(3):
        one.serve(prompt(seed, 40))
    uses_are_written(one)
    assert tight.store.collect().nodes == 1
    learn(one)
    assert [knows(one, prompt(seed, 40)) for seed in range(4)] == [True, True, True, False]


def test_a_prompt_is_saved_again_while_its_old_blocks_are_condemned(
    machine: Machine, tmp_path: Path
) -> None:
    """A machine that has forgotten a prompt, like all others, still believes that its blocks are
    there."""
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    save(one, PROMPT)
    learn(other)
    one.store.clear()
    learn(other)
    for _ in range(2):  # found to be garbage, then condemned
        minutes_pass(one, 2)
        one.store.collect()
    save(other, PROMPT)
    minutes_pass(one, 2)
    one.store.collect()
    assert remote_blocks(tmp_path) == 5
    late = machine("c", disk=False)
    late.book = other.book
    assert late.serve(PROMPT).exact == 39


def test_a_save_waits_for_the_removal_of_its_blocks(machine: Machine, tmp_path: Path) -> None:
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    save(one, PROMPT)
    learn(other)
    blocks = other.store.blocks
    one.store.clear()
    condemned = one.store.repository.condemned
    assert condemned is not None
    condemned.mark(one.store.blocks.list_shared())
    condemned.look()
    minutes_pass(one, 2)
    claimed = condemned.claim(100)
    assert len(claimed) == 5
    learn(other)
    saving = threading.Thread(target=save, args=(other, PROMPT))
    saving.start()
    time.sleep(0.2)
    assert saving.is_alive()
    one.store.blocks.delete_shared(claimed)
    condemned.release(claimed)
    saving.join(PATIENCE_S)
    assert blocks.sure(claimed)
    assert remote_blocks(tmp_path) == 5
    late = machine("c", disk=False)
    late.book = other.book
    assert late.serve(PROMPT).exact == 39


def test_a_row_that_is_committed_after_a_claim_keeps_its_blocks(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The janitor reads the catalogue after its claim, and a save looks for claims after its
    commit. So one of the two sees the other."""
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    save(one, PROMPT)
    one.store.clear()
    minutes_pass(one, 2)
    one.store.collect()
    minutes_pass(one, 2)
    one.store.collect()
    minutes_pass(one, 2)
    condemned = one.store.repository.condemned
    assert condemned is not None
    claim = condemned.claim
    saving = threading.Thread(target=save, args=(other, PROMPT))
    catalog = other.store.repository.catalog
    assert catalog is not None
    put = other.store.repository.durable.write
    # as if the save had looked for condemned blocks before they were condemned
    monkeypatch.setattr(
        other.store.repository.durable,
        "write",
        lambda nodes: other.store.blocks.persist([n for node in nodes for n in node.blocks]),
    )

    def claim_while_it_saves(limit: int) -> dict[str, str]:
        claimed = claim(limit)
        saving.start()
        until(lambda: catalog.count() == 1)
        return claimed

    monkeypatch.setattr(condemned, "claim", claim_while_it_saves)
    one.store.collect()
    saving.join(PATIENCE_S)
    monkeypatch.setattr(other.store.repository.durable, "write", put)
    assert remote_blocks(tmp_path) == 5
    late = machine("c", disk=False)
    late.book = other.book
    assert late.serve(PROMPT).exact == 39


def test_a_save_whose_blocks_a_dead_janitor_claimed_is_refused_and_can_be_made_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvshare_store.commit.condemned._PATIENCE_S", 0.1)
    one, other, third = (machine(name, **ASKED_ONLY) for name in "abc")
    third.book = other.book
    save(one, PROMPT)
    one.store.clear()
    dead = one.store.repository.condemned
    assert dead is not None
    dead.mark(one.store.blocks.list_shared())
    dead.look()
    minutes_pass(one, 2)
    assert len(dead.claim(100)) == 5
    save(other, PROMPT)
    assert other.store.stats()["errors"] == {str(StorageError.kind): 1}
    assert not knows(other, PROMPT)
    learn(third)
    minutes_pass(third, 3)
    third.store.collect()
    save(other, PROMPT)
    learn(third)
    assert third.serve(PROMPT).exact == 39


def test_a_machine_that_did_not_look_for_half_a_grace_is_sure_of_nothing(
    machine: Machine, tmp_path: Path
) -> None:
    """It was stopped or cut off, so blocks that it believes to be in the remote may have been
    removed."""
    one = machine("a", disk=False, **ASKED_ONLY)
    save(one, PROMPT)
    one.store.clear()
    save(one, PROMPT)
    for file in (tmp_path / "remote" / "blocks").rglob("*"):
        if file.is_file():
            file.unlink()
    minutes_pass(one, 2)
    longer = [*PROMPT, *prompt(2, 16)]
    plan = one.serve(longer)
    assert plan.exact == 40
    one.save(longer, plan)
    one.store.flush()
    assert remote_blocks(tmp_path) == 7


def test_last_use_survives_a_restart(tmp_path: Path) -> None:
    """A prompt in daily use must not expire because the store was restarted."""
    alone = {"remote": "", "catalog": "", "remote_write": "back", "gc_seconds": 0.0}
    config = config_of(tmp_path, "home", **alone)
    expiring = msgspec.structs.replace(config, ttl_seconds=3600.0)
    with Store(config) as store:
        engine = Driver(store, NAMESPACE)
        save_long_ago(engine, PROMPT, prompt(2, 40))
    with Store(expiring) as store:
        Driver(store, NAMESPACE, engine.book).serve(PROMPT)
    with Store(expiring) as store:
        assert store.collect().nodes == 1
        assert Driver(store, NAMESPACE, engine.book).serve(PROMPT).exact == 39


def test_one_machine_of_several_lists_the_remote(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [machine(name, **ASKED_ONLY) for name in "abc"]
    listed = []
    for engine in engines:
        blocks = engine.store.blocks
        monkeypatch.setattr(blocks, "list_shared", lambda e=engine: listed.append(e) or {})
    for _ in range(2):
        for engine in engines:
            engine.store.janitor.collect(patient=True)
    assert listed
    assert set(listed) == {engines[0]}


def files_of(folder: Path, table: str) -> int:
    """Files of one table of the shared catalogue."""
    return sum(file.is_file() for file in (folder / "catalog" / f"{table}.lance").rglob("*"))


def test_upkeep_alone_lets_no_table_grow(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any save, the other tables are still written to and compacted."""
    monkeypatch.setattr("kvshare_store.catalog.table._SHARED_VERSIONS", timedelta(milliseconds=1))
    one = machine("a", **ASKED_ONLY)
    save(one, PROMPT)
    one.store.collect()
    catalog = one.store.repository.catalog
    assert catalog is not None
    for at in range(20):
        catalog.facts.overwrite(Fact("a", time.time() + at))
        catalog.uses.overwrite(Fact("b", time.time() + at))
    before = {table: files_of(tmp_path, table) for table in ("facts", "uses")}
    for _ in range(2):
        one.store.janitor.collect(patient=True)
    for table, files in before.items():
        assert files_of(tmp_path, table) < files / 2


def test_uses_of_long_ago_go_although_nobody_saves(machine: Machine) -> None:
    one = machine("a", **ASKED_ONLY)
    save(one, PROMPT)
    one.store.collect()
    catalog = one.store.repository.catalog
    assert catalog is not None
    catalog.uses.create([Fact("ab" * 16, 5.0)])
    one.store.janitor.collect(patient=True)
    assert not catalog.uses.facts("at < 6")


def test_a_turn_is_renewed_only_when_it_is_half_over(machine: Machine) -> None:
    """Each renewal adds a version of the table."""
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    catalog = one.store.repository.catalog
    assert catalog is not None
    mine, theirs = (engine.store.janitor.shared for engine in (one, other))
    assert mine is not None
    assert theirs is not None
    assert mine.my_turn()
    version = catalog.facts.refresh()
    assert [mine.my_turn(), theirs.my_turn(), mine.my_turn()] == [True, False, True]
    assert catalog.facts.refresh() == version
    catalog.facts.change("key = 'janitor'", at=time.time() - 100)
    assert mine.my_turn()
    assert catalog.facts.refresh() == version + 2
    catalog.facts.change("key = 'janitor'", at=time.time() - 200)
    assert theirs.my_turn()
    assert not mine.my_turn()


def test_a_turn_ends_although_its_clock_was_years_ahead(machine: Machine) -> None:
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    catalog = one.store.repository.catalog
    assert catalog is not None
    mine, theirs = (engine.store.janitor.shared for engine in (one, other))
    condemned = other.store.repository.condemned
    assert mine is not None
    assert theirs is not None
    assert condemned is not None
    assert mine.my_turn()
    catalog.facts.change("key = 'janitor'", at=time.time() + 10 * 365 * 86_400)
    assert not theirs.my_turn()
    now = condemned.clock()
    condemned.clock = lambda: now + 200.0
    assert theirs.my_turn(), "nothing was heard of the other one for three passes"
    assert not mine.my_turn()


def test_commits_of_others_are_learned_without_reading_every_stamp(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    catalog = other.store.repository.catalog
    assert catalog is not None
    asked: list[int] = []
    stamps = catalog.stamps

    def counted(since: int = 0, **options: object) -> dict[str, int]:
        asked.append(since)
        return stamps(since, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("kvshare_store.maintenance.sharing._EXPLAINED_S", 3600.0)
    save(one, prompt(0, 40))
    learn(other)
    monkeypatch.setattr(catalog, "stamps", counted)
    for seed in range(1, 4):
        save(one, prompt(seed, 40))
        learn(other)
        assert knows(other, prompt(seed, 40))
    assert asked
    assert all(asked), "all stamps were read"


def test_removals_of_others_are_learned_without_reading_every_id(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    catalog = other.store.repository.catalog
    assert catalog is not None
    gone, kept = save(one, prompt(1, 40)), save(one, prompt(2, 40))
    learn(other)
    asked: list[int] = []
    stamps = catalog.stamps
    monkeypatch.setattr(
        catalog,
        "stamps",
        lambda since=0, **options: asked.append(since) or stamps(since, **options),
    )
    one.store.nodes.remove([gone], whatever=True)
    one.store.flush()
    until(lambda: (learn(other), gone not in other.store.tree)[1])
    assert kept in other.store.tree
    assert all(asked), "all ids were read"


def old_stamp() -> int:
    """A row of a machine whose clock is three minutes behind, and which has seen no other machine's
    stamps."""
    return new_stamp() - 180 * 10**9


def test_a_pin_with_an_old_stamp_is_learned(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of rows does not show it."""
    one, other = machine("a", gc_seconds=0.0), machine("b", **ASKED_ONLY)
    node_id = save(one, PROMPT)
    assert node_id is not None
    until(lambda: knows(one, PROMPT))
    learn(other)
    monkeypatch.setattr("kvshare_store.commit.rewrite.new_stamp", old_stamp)
    assert other.store.pin(node_id)

    def pinned() -> bool:
        node = one.store.tree.get(node_id)
        return node is not None and node.pinned

    until(pinned)


def test_an_old_stamp_is_learned_beside_a_new_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row was removed, one with an old stamp and one with a new stamp were added. The number of
    rows does not show it, and something new was found."""
    monkeypatch.setattr("kvshare_store.maintenance.sharing._EXPLAINED_S", 0.2)
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    node_id = save(one, PROMPT)
    assert node_id is not None
    learn(one)
    learn(other)
    monkeypatch.setattr("kvshare_store.commit.rewrite.new_stamp", old_stamp)
    assert other.store.pin(node_id)
    save(other, prompt(2, 40))

    def pinned() -> bool:
        learn(one)
        node = one.store.tree.get(node_id)
        return node is not None and node.pinned

    until(pinned)
    assert knows(one, prompt(2, 40))


def test_stamps_grow_over_those_that_were_seen(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clock of the machine that makes the stamp."""
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    save(one, PROMPT)
    learn(other)
    (seen,) = (node.stamp for node in other.store.tree)
    behind = SimpleNamespace(time_ns=lambda: time.time_ns() - 180 * 10**9)
    monkeypatch.setattr("kvshare_store.nodes.node.time", behind)
    assert len({new_stamp() >> 20 for _ in range(3)}) == 1
    assert new_stamp() > seen


def test_a_catalogue_of_the_release_before_opens(machine: Machine, tmp_path: Path) -> None:
    """Its rows have no stamps; a pin adds one."""
    one = machine("a", **ASKED_ONLY)
    node_id = save(one, PROMPT)
    assert node_id is not None
    one.store.close()
    table = lancedb.connect(str(tmp_path / "catalog")).open_table("nodes")
    node = one.store.tree.get(node_id)
    assert node is not None
    before = msgspec.structs.replace(node, stamp=0)
    table.update(where="true", values={"node": encode_node(before)})
    table.drop_columns(["stamp"])
    again, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    again.book = one.book
    assert again.serve(PROMPT).exact == 39
    learn(other)
    assert again.store.pin(node_id)
    other.store.evict(nodes=1)
    other.store.flush()
    learn(other)
    assert knows(other, PROMPT)
    save(other, prompt(2, 40))
    learn(again)
    assert knows(again, prompt(2, 40))
