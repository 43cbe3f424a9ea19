"""A purge is recorded in the shared catalogue, and every machine carries it out."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvshare_store.catalog.ledger import Fact
from kvshare_store.errors import StorageError
from kvshare_store.plan import Outcome
from kvshare_store.quality.score import Score
from kvshare_store.store import Store
from tests.maintenance.test_upkeep import ASKED_ONLY, PROMPT
from tests.support.clocks import date_ahead
from tests.support.neighbours import (
    NAMESPACE,
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
from tests.support.oracle import Driver, prompt

LATER = prompt(77, 40)


def copies(engine: Driver) -> bytes:
    """The blocks in this machine's arena and on its disk."""
    arena = engine.store.blocks.host.arena
    home = engine.store.config.home_path
    kept = [*(home / "blocks").rglob("*"), *(home / "quarantine").rglob("*")]
    return bytes(arena.rows(0, arena.nbytes - 64)) + b"".join(
        file.read_bytes() for file in kept if file.is_file()
    )


def test_copies_on_other_machines_are_wiped(machine: Machine) -> None:
    one, other = machine("a"), machine("b")
    other.book = one.book
    save(one, PROMPT)
    until(lambda: knows(other, PROMPT))
    plan = other.serve(PROMPT)
    assert plan.exact == 39
    row = bytes(one.book.computed(PROMPT, 40, "")[0, 0, 0].tobytes())
    until(lambda: row in copies(other))
    score = Score(
        namespace=NAMESPACE.digest, traffic="", policy="faithful", regrets=(0.5,), greedy=True,
        control=False,
    )  # fmt: skip
    other.store.verdicts.scored(score, ["node"], "request")
    assert one.store.purge(NAMESPACE.digest)[0].remaining == ()
    until(lambda: row not in copies(other))
    until(lambda: other.plan(PROMPT).wiped != plan.wiped)
    until(lambda: other.store.verdicts.of_node("node") is None)
    until(lambda: other.store.namespace(NAMESPACE.digest) is None)


@pytest.mark.parametrize("years", [0, -50, 50])
def test_a_machine_that_was_off_carries_it_out_when_it_starts(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    """Also where the clock of whoever purged was wrong by years."""
    one = machine("a")
    save(one, PROMPT)
    config = config_of(tmp_path, "b", gc_seconds=0.0)
    with Store(config) as store:
        assert Driver(store, NAMESPACE, one.book).serve(PROMPT).exact == 39
        disk = store.blocks.levels.named("disk")
        assert disk is not None
        until(lambda: len(disk.tier.names()) == 5)
    bad = config.home_path / "quarantine" / f"{'ab' * 32}.kvb"
    bad.write_bytes(b"rows that did not verify")
    clock_of_purges(monkeypatch, ahead=years * 365 * 86_400.0)
    one.store.purge(NAMESPACE.digest)
    with Store(config):
        until(lambda: not bad.exists())


@pytest.mark.parametrize("ahead", [0, 300])
def test_it_says_what_stays_while_another_clock_is_ahead(
    machine: Machine, tmp_path: Path, ahead: int
) -> None:
    """LanceDB keeps versions, and all that is in them, until the clock of whoever purges is past
    them; of a shared table nobody else may remove them."""
    with Store(config_of(tmp_path, "b")) as store:
        save(Driver(store, NAMESPACE), PROMPT)
    date_ahead(tmp_path / "catalog", ahead)
    one = machine("a")
    until(lambda: knows(one, PROMPT))
    (done,) = one.store.purge(NAMESPACE.digest)
    assert len(done.remaining) == bool(ahead)
    assert all("clock of another machine" in what for what in done.remaining)
    assert one.store.namespace(NAMESPACE.digest) is None
    versions = tmp_path / "catalog" / "namespaces.lance" / "_versions"
    assert (len(list(versions.glob("*.manifest"))) > 1) == bool(ahead)


def test_uses_that_were_written_down_after_a_purge_are_removed(machine: Machine) -> None:
    """By a machine that had not heard of it. They name prompts by their hashes."""
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    other.book = one.book
    save(one, PROMPT)
    learn(other)
    other.serve(PROMPT)
    one.store.purge(NAMESPACE.digest)
    save(one, LATER)
    for engine in (one, other):
        assert engine.store.repository.uses is not None
        engine.store.repository.uses.exchange()
    learn(other)
    catalog = other.store.repository.catalog
    assert catalog is not None
    assert [fact.key for fact in catalog.uses.facts()] == [node.id for node in one.store.tree]


def test_a_lineage_goes_on_every_machine(machine: Machine) -> None:
    """Also nodes that the purging machine does not have in memory."""
    one, other = machine("a"), machine("b", max_nodes=1)
    other.book = one.book
    edited = [*PROMPT[:10], 7, 8, *PROMPT[12:]]
    bad = save(one, PROMPT)
    assert bad is not None
    assert one.store.pin(bad), "so that it alone stays in the other one's memory"
    one.save(edited, one.serve(edited))
    save(one, LATER)
    until(lambda: knows(other, PROMPT))
    done = other.store.purge_lineage(bad)
    assert (done.ids[0], done.nodes) == (bad, 2)
    until(lambda: [node.tokens.tolist() for node in one.store.tree] == [LATER])


def test_it_is_carried_out_once(machine: Machine, tmp_path: Path) -> None:
    """What is saved in the namespace afterwards keeps its copies."""
    one = machine("a")
    save(one, PROMPT)
    config = config_of(tmp_path, "b", **ASKED_ONLY)
    with Store(config) as store:
        learn(Driver(store, NAMESPACE))
        one.store.purge(NAMESPACE.digest)
        learn(Driver(store, NAMESPACE))
        save(one, PROMPT)
        learn(Driver(store, NAMESPACE))
        assert Driver(store, NAMESPACE, one.book).serve(PROMPT).exact == 39
        disk = store.blocks.levels.named("disk")
        assert disk is not None
        until(lambda: len(disk.tier.names()) == 5)
    with Store(config) as store:
        learn(Driver(store, NAMESPACE))
        disk = store.blocks.levels.named("disk")
        assert disk is not None
        assert len(disk.tier.names()) == 5


def test_unfinished_puts_of_a_killed_process_are_purged(machine: Machine, tmp_path: Path) -> None:
    """The library that writes to folders never lists unfinished files."""
    one = machine("a")
    save(one, prompt(1, 40))
    folder = tmp_path / "remote" / "blocks" / NAMESPACE.digest
    (folder / f"{'ef' * 32}#1").write_bytes(b"half a block")
    assert one.store.purge(NAMESPACE.digest)[0].remaining == ()
    assert remote_blocks(tmp_path) == 0


def test_a_bucket_that_keeps_versions_is_said_to(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("a")
    save(one, PROMPT)
    (tier,) = one.store.blocks.levels.shared()
    monkeypatch.setattr(tier.remote, "keeps_versions", True)
    remaining = one.store.purge(NAMESPACE.digest)[0].remaining
    assert len(remaining) == 1
    assert "old versions" in remaining[0]


def test_a_claim_outlives_a_purge(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A janitor is about to delete the blocks it has claimed. A prompt that is saved meanwhile
    waits."""
    one, janitor, reader = (machine(name, gc_seconds=0.0) for name in "abc")
    reader.book = one.book
    save(one, PROMPT)
    until(lambda: knows(janitor, PROMPT))  # or it would learn of the purge while it collects
    one.store.clear()
    one.store.flush()
    until(lambda: not knows(janitor, PROMPT))
    blocks = janitor.store.blocks
    delete, stuck, go = blocks.delete_shared, threading.Event(), threading.Event()

    def delete_late(gone: dict[str, str]) -> None:
        stuck.set()
        assert go.wait(30)
        delete(gone)

    monkeypatch.setattr(blocks, "delete_shared", delete_late)
    with ThreadPoolExecutor(2) as pool:
        collecting = pool.submit(collect_all, janitor)
        assert stuck.wait(60), collecting
        assert one.store.purge(NAMESPACE.digest)[0].remaining == ()
        saving = pool.submit(save, one, PROMPT)
        time.sleep(0.2)
        assert not saving.done(), "the save did not wait for the removal of its blocks"
        go.set()
        assert collecting.result() == 5
        saving.result()
    assert remote_blocks(tmp_path) == 5
    until(lambda: knows(reader, PROMPT))
    assert reader.serve(PROMPT).exact == 39


def test_names_that_a_claim_kept_are_erased_with_it(machine: Machine, tmp_path: Path) -> None:
    """Also from old versions of the table, which otherwise stay for an hour."""
    one = machine("a", **ASKED_ONLY)
    save(one, PROMPT)
    names = [name for node in one.store.tree for name in node.blocks]
    condemned = one.store.repository.condemned
    assert condemned is not None
    condemned.mark(one.store.blocks.list_shared())
    condemned.look()
    minutes_pass(one, 2)
    assert len(condemned.claim(100)) == 5
    one.store.purge(NAMESPACE.digest)
    one.store.collect()
    files = (tmp_path / "catalog" / "facts.lance").rglob("*")
    written = b"".join(file.read_bytes() for file in files if file.is_file())
    assert [name for name in names if name.encode() in written] == []


def clock_of_purges(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """The clock of the purging machine is ahead by so many seconds."""
    clock = SimpleNamespace(
        time=lambda: time.time() + ahead, monotonic=time.monotonic, sleep=time.sleep
    )
    monkeypatch.setattr("kvshare_store.maintenance.purge.time", clock)


def own_blocks(engine: Driver) -> int:
    """Blocks in this machine's memory."""
    return len(list(engine.store.blocks.host.names()))


def test_a_second_purge_is_carried_out_whatever_the_clocks_say(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, other = (machine(name, **ASKED_ONLY) for name in "abc")
    two.book = one.book
    save(one, prompt(2, 40))
    clock_of_purges(monkeypatch, ahead=300.0)
    one.store.purge(NAMESPACE.digest)
    clock_of_purges(monkeypatch, ahead=0.0)
    learn(two)
    learn(other)
    save(two, PROMPT)
    learn(other)
    other.book = two.book
    assert other.serve(PROMPT).exact == 39
    row = bytes(two.book.computed(PROMPT, 40, "")[0, 0, 0].tobytes())
    assert row in copies(other)
    two.store.purge(NAMESPACE.digest)
    learn(other)
    assert row not in copies(other)
    assert other.store.namespace(NAMESPACE.digest) is None


def test_what_was_saved_after_a_purge_stays(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a machine hears of the purge later than of the new prompt, and its clock is far
    behind that of the purging machine."""
    one, two, late = (machine(name, **ASKED_ONLY) for name in "abc")
    two.book = late.book = one.book
    save(one, PROMPT)
    learn(late)
    late.serve(PROMPT)
    clock_of_purges(monkeypatch, ahead=300.0)
    one.store.purge(NAMESPACE.digest)
    learn(two)
    save(two, prompt(2, 40))
    for _ in range(2):
        learn(late)
    assert not knows(late, PROMPT)
    assert own_blocks(late) == 0
    assert late.serve(prompt(2, 40)).exact == 39
    learn(late)
    assert own_blocks(late) == 5
    assert late.store.namespace(NAMESPACE.digest) == NAMESPACE


def test_a_save_that_builds_on_what_was_purged_meanwhile_is_complete(machine: Machine) -> None:
    """It keeps blocks that its machine believes to be in the remote. The namespace is in use again,
    so nobody takes its row for one of before the purge."""
    one, other = machine("a"), machine("b", sync_seconds=3600.0)
    other.book = one.book
    save(one, PROMPT)
    learn(other)
    plan = other.serve([*PROMPT, 1, 2, 3, 4])
    assert plan.exact == 40
    assert one.store.purge(NAMESPACE.digest)[0].remaining == ()
    save(one, prompt(2, 40))
    other.save([*PROMPT, 1, 2, 3, 4], plan)
    other.store.flush()
    third = machine("c")
    third.book = one.book
    assert third.serve([*PROMPT, 1, 2, 3, 4, 5]).exact == 44
    assert third.store.stats()["errors"] == {}


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "killed before it looked"])
def test_what_was_saved_before_its_machine_heard_of_the_purge_goes(
    machine: Machine, tmp_path: Path, restarted: bool
) -> None:
    """The purge has removed the record of the namespace. Without it nobody could read those rows,
    or purge them."""
    late = config_of(tmp_path, "b", sync_seconds=3600.0)
    one, store = machine("a"), Store(late)
    try:
        other = Driver(store, NAMESPACE)
        save(other, PROMPT)
        until(lambda: knows(one, PROMPT))
        assert one.store.purge(NAMESPACE.digest)[0].remaining == ()
        save(other, LATER)
        if restarted:
            store.close()
            store = Store(late)
            other = Driver(store, NAMESPACE)
        learn(other)
        assert not knows(other, LATER)
        catalog = other.store.repository.catalog
        assert catalog is not None
        assert catalog.ids() == []
        assert remote_blocks(tmp_path) == 0
        third = machine("c")
        assert third.store.stats()["errors"] == {}
        save(other, PROMPT)
        until(lambda: knows(third, PROMPT))
    finally:
        store.close()


def test_rows_that_were_sealed_with_the_key_that_a_purge_destroyed_go(
    machine: Machine, tmp_path: Path
) -> None:
    """Even if another machine has saved in the namespace again, which then has a new key."""
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("0123456789abcdef" * 4)
    sealed = {"encryption_key": f"file:{key}"}
    one, other = machine("a", **sealed), machine("b", sync_seconds=3600.0, **sealed)
    save(other, PROMPT)
    until(lambda: knows(one, PROMPT))
    assert one.store.purge(NAMESPACE.digest)[0].remaining == ()
    kept = save(one, prompt(78, 40))
    save(other, LATER)
    learn(other)
    assert not knows(other, LATER)
    assert knows(other, prompt(78, 40))
    catalog = other.store.repository.catalog
    assert catalog is not None
    assert [name for name, _ in catalog.ids()] == [kept]
    save(other, LATER)
    third = machine("c", **sealed)
    assert third.store.stats()["errors"] == {}
    assert knows(third, LATER)
    third.book = one.book
    assert third.serve(prompt(78, 40)).exact == 39


def test_leased_rows_are_left_until_their_readers_are_done(machine: Machine) -> None:
    one, reader = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    reader.book = one.book
    save(one, PROMPT)
    learn(reader)
    reader.serve(PROMPT)
    plan = reader.store.plan(PROMPT, NAMESPACE)
    arena = reader.store.blocks.host.arena
    before = [bytes(arena.rows(ref.offset, ref.nbytes)) for ref in plan.blocks]
    one.store.purge(NAMESPACE.digest)
    for _ in range(2):
        learn(reader)
    assert [bytes(arena.rows(ref.offset, ref.nbytes)) for ref in plan.blocks] == before
    reader.store.finish(plan.lease, Outcome(failed="not needed", recomputed=40))
    reader.store.flush()
    learn(reader)
    assert own_blocks(reader) == 0
    assert not any(map(any, [arena.rows(ref.offset, ref.nbytes) for ref in plan.blocks]))


def test_a_purge_that_stopped_before_its_rows_were_removed_waits(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that can still be read are not mistaken for rows that were saved after the purge."""
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    other.book = one.book
    save(one, PROMPT)
    learn(other)
    other.serve(PROMPT)
    catalog = one.store.repository.catalog
    assert catalog is not None
    erase = catalog.purge

    def refuse(namespace: str) -> None:
        raise StorageError("the catalogue does not answer")

    monkeypatch.setattr(catalog, "purge", refuse)
    assert "does not answer" in one.store.purge(NAMESPACE.digest)[0].remaining[0]
    learn(other)
    monkeypatch.setattr(catalog, "purge", erase)
    assert one.store.purge(NAMESPACE.digest)[0].remaining == ()
    learn(other)
    assert own_blocks(other) == 0
    assert other.store.namespace(NAMESPACE.digest) is None


def test_only_so_many_purges_are_kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare_store.maintenance.others_purges._KEPT", 2)
    one = machine("a")
    catalog = one.store.repository.catalog
    assert catalog is not None
    catalog.facts.create([Fact(f"purged/{number:064x}", float(number)) for number in range(5)])
    until(lambda: {fact.at for fact in catalog.facts.facts("key LIKE 'purged/%'")} == {3.0, 4.0})


def test_purges_of_the_release_before_were_carried_out(machine: Machine, tmp_path: Path) -> None:
    """The release before told purges by their times. They stay, however old they seem: whoever
    wrote them down may have had a wrong clock."""
    one = machine("a", **ASKED_ONLY)
    save(one, PROMPT)
    catalog = one.store.repository.catalog
    assert catalog is not None
    recent = time.time()
    other = "ab" * 32
    catalog.facts.create([Fact(f"purged/{NAMESPACE.digest}", recent), Fact(f"purged/{other}", 5.0)])
    machine("b", **ASKED_ONLY).store.close()
    told = tmp_path / "b" / "purges.json"
    told.write_text(json.dumps({NAMESPACE.digest: recent, other: 5.0}))
    late = machine("b", **ASKED_ONLY)
    late.book = one.book
    assert late.serve(PROMPT).exact == 39
    learn(late)
    assert own_blocks(late) == 5
    assert {fact.at for fact in catalog.facts.facts("key LIKE 'purged/%'")} == {5.0, recent}
    one.store.purge(NAMESPACE.digest)
    learn(late)
    assert set(json.loads(told.read_text())) == {NAMESPACE.digest, other}
