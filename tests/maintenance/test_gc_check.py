"""What is collected and what never is; what a check finds, and what a repair leaves."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvshare_store.commit.queue import Removal
from kvshare_store.errors import StorageError
from kvshare_store.maintenance.check import check_blocks, check_tree
from kvshare_store.nodes.node import Node
from kvshare_store.store import Store
from tests.support.faulty import FaultyTier, GatedTier
from tests.support.oracle import Driver, prompt
from tests.support.tiers import drop_from_host

Open = Callable[..., Driver]


def files(home: Path) -> dict[str, Path]:
    return {file.stem: file for file in (home / "blocks").glob("*/*")}


def saved(engine: Driver, seed: int) -> Node:
    name = engine.save(prompt(seed, 40))
    assert name is not None
    engine.store.flush()
    node = engine.store.tree.get(name)
    assert node is not None
    return node


def stray(home: Path, name: str = "ab" * 32) -> Path:
    """A block that no node uses: another block's bytes under a name of its own."""
    file = home / "blocks" / name[:2] / f"{name}.kvb"
    file.parent.mkdir(exist_ok=True)
    shutil.copy(next(iter(files(home).values())), file)
    return file


# --- garbage ------------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_pass_then_does(driver: Open, home: Path) -> None:
    engine = driver()
    saved(engine, 1)
    engine.store.close()
    file = stray(home)
    nbytes = file.stat().st_size
    engine = driver()
    saved(engine, 2)
    said = engine.store.collect(dry_run=True)
    assert file.exists()
    assert (said.nodes, said.blocks, said.bytes, said.merged) == (0, 1, nbytes, 0)
    assert said.versions > 0
    done = engine.store.collect()
    assert msgspec.structs.replace(done, versions=0) == msgspec.structs.replace(said, versions=0)
    assert not file.exists()
    assert engine.store.collect() == type(done)()
    assert engine.serve(prompt(1, 40)).exact == 39


def test_a_dry_run_counts_what_expired_nodes_would_free(driver: Open) -> None:
    engine = driver(ttl_seconds=1e-6)
    saved(engine, 1)
    said = engine.store.collect(dry_run=True)
    assert (said.nodes, said.blocks) == (1, 5)
    done = engine.store.collect()
    engine.store.flush()
    assert done.nodes == 1
    assert len(engine.store.tree) == 0


def test_old_versions_hold_no_row_of_what_was_removed(driver: Open, home: Path) -> None:
    engine = driver()
    node = saved(engine, 1)
    engine.store.evict(nodes=1)
    engine.store.flush()
    held = [f for f in (home / "catalog").rglob("*") if f.is_file() and holds(f, node.token_bytes)]
    assert held, "a deleted row stays in old versions"
    assert engine.store.collect().versions > 0
    left = [f for f in (home / "catalog").rglob("*") if f.is_file() and holds(f, node.token_bytes)]
    assert not left


def holds(file: Path, text: bytes) -> bool:
    return text in file.read_bytes()


def test_slots_that_are_being_filled_are_not_garbage(driver: Open) -> None:
    engine = driver()
    staged = engine.stage(prompt(2, 40))
    rows = engine._computed[staged.id]

    class Collecting:
        def read_into(self, offset: int, target: memoryview) -> None:
            assert engine.store.collect().blocks == 0
            rows.read_into(offset, target)

    assert engine.store.commit(staged.id, Collecting())
    assert engine.serve(prompt(2, 40)).exact == 39


def test_blocks_whose_node_is_just_coming_are_not_garbage(
    driver: Open, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that begins after a block is named and before its node is added waits for the lock."""
    engine = driver()
    nodes, collected = engine.store.nodes, []
    add = nodes.add
    passing = threading.Thread(target=lambda: collected.append(engine.store.collect().blocks))

    def add_late(*arguments: Any) -> Any:
        passing.start()
        time.sleep(0.2)
        return add(*arguments)

    monkeypatch.setattr(nodes, "add", add_late)
    engine.save(prompt(2, 40))
    passing.join()
    assert collected == [0]
    assert engine.serve(prompt(2, 40)).exact == 39
    engine.store.flush()
    assert set(files(home)) == engine.store.tree.blocks()


def test_blocks_that_are_not_in_the_catalogue_yet_are_not_garbage(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver()
    catalog, garbage = engine.store.repository.catalog, []
    assert catalog is not None
    add = catalog.add

    def look_first(rows: Any) -> None:
        garbage.append(engine.store.collect(dry_run=True).blocks)
        add(rows)

    monkeypatch.setattr(catalog, "add", look_first)
    engine.save(prompt(2, 40))
    engine.store.flush()
    assert garbage == [0], "durable, and their row is not"


def test_a_block_that_gets_a_node_while_it_is_ordered_away_stays(driver: Open, home: Path) -> None:
    """The janitor saw the block without a node; the committer checks again before it deletes."""
    engine = driver()
    node = saved(engine, 1)
    engine.store.repository.queue.put(Removal((), node.blocks))
    engine.store.flush()
    assert set(files(home)) == set(node.blocks)
    assert engine.serve(prompt(1, 40)).exact == 39


def test_saving_and_collecting_side_by_side_loses_nothing(driver: Open, home: Path) -> None:
    engine = driver(gc_seconds=0.001, max_chain=1, max_scatter=1.5)
    tokens = prompt(0, 64)
    for step in range(40):
        assert engine.serve_and_save([*tokens[: step % 9], *prompt(step, 5), *tokens[step % 9 :]])
    engine.store.flush()
    assert engine.store.stats()["errors"] == {}
    assert len(engine.store.tree) == 40
    engine = driver()
    assert len(engine.store.tree) == 40
    assert engine.store.collect().blocks == 0
    for node in list(engine.store.tree):
        assert engine.serve(node.tokens.tolist()).reused == node.length - 1
    assert check_tree(engine.store.repository, repair=False).problems == ()


def test_leased_blocks_are_not_garbage(driver: Open, home: Path) -> None:
    engine = driver()
    saved(engine, 1)
    plan = engine.plan(prompt(1, 40))
    engine.store.evict(nodes=1)
    engine.store.flush()
    assert engine.store.collect().blocks == 0
    engine.check(prompt(1, 40), plan)
    engine.finish(plan)
    engine.store.flush()
    assert files(home) == {}


def test_a_pass_makes_no_request_wait(driver: Open) -> None:
    engine = driver(max_chain=0)
    tokens = prompt(1, 64)
    engine.serve_and_save(tokens)
    engine.serve_and_save([*tokens[:30], 5, *tokens[31:]])
    engine.store.flush()
    gate = threading.Event()
    for level in engine.store.blocks.levels:
        level.tier = GatedTier(level.tier, gate, "put", "delete")
    passing = threading.Thread(target=engine.store.collect)
    passing.start()
    for _ in range(5):
        assert engine.serve(tokens).exact == 63
        assert passing.is_alive(), "the pass waits for its first write"
    gate.set()
    passing.join()


def test_closing_does_not_wait_for_the_next_pass(driver: Open) -> None:
    engine = driver(gc_seconds=3600.0)
    saved(engine, 1)
    closing = threading.Thread(target=engine.store.close, daemon=True)
    closing.start()
    closing.join(60.0)
    assert not closing.is_alive(), "it waits for an hour"


# --- check --------------------------------------------------------------------------------------


def problems(store: Store, *, repair: bool = False) -> list[tuple[str, str, bool]]:
    """Each finding's kind, subject, and whether it was repaired; tree and all blocks are
    checked."""
    tree = check_tree(store.repository, repair=repair)
    blocks = check_blocks(store.repository, tree.blocks, repair=repair)
    return [(p.kind, p.about, p.repaired) for p in itertools.chain(tree.problems, blocks.problems)]


def test_a_sound_store_has_no_problems(driver: Open, home: Path) -> None:
    engine = driver()
    saved(engine, 1)
    engine.serve_and_save([*prompt(1, 40)[:20], 7, *prompt(1, 40)[21:]])
    report = check_tree(engine.store.repository, repair=False)
    assert (report.problems, report.nodes, report.garbage) == ((), 2, 0)
    assert set(report.blocks) == set(files(home))
    blocks = check_blocks(engine.store.repository, report.blocks, repair=False)
    assert blocks.problems == ()
    sizes = [len(engine.store.blocks.read(name).data) for name in report.blocks]
    assert blocks.read == 2 * sum(sizes), "each in memory and on disk"


def test_garbage_is_listed_and_no_problem(driver: Open, home: Path) -> None:
    engine = driver()
    saved(engine, 1)
    engine.store.close()
    stray(home)
    engine = driver()
    report = check_tree(engine.store.repository, repair=True)
    assert (report.problems, report.garbage) == ((), 1)


def test_a_bad_block_is_found_and_its_node_is_offered_no_more(driver: Open, home: Path) -> None:
    engine = driver()
    node = saved(engine, 1)
    saved(engine, 2)
    drop_from_host(engine.store)
    rot(files(home)[node.blocks[2]])
    assert problems(engine.store) == [("corrupt", node.blocks[2], True)]
    assert engine.plan(prompt(1, 40)).declined == "no_donor"
    assert (home / "quarantine" / node.blocks[2]).exists()
    engine.store.collect()
    assert problems(engine.store) == []
    assert engine.serve(prompt(2, 40)).exact == 39


def rot(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_a_bad_copy_of_a_good_block_is_written_again(driver: Open, home: Path) -> None:
    engine = driver()
    node = saved(engine, 1)
    rot(files(home)[node.blocks[2]])
    assert problems(engine.store, repair=True) == [("corrupt", node.blocks[2], True)]
    assert problems(engine.store) == []
    drop_from_host(engine.store)
    assert engine.serve(prompt(1, 40)).exact == 39


def test_a_bad_copy_in_memory_gives_way_to_the_one_on_disk(driver: Open) -> None:
    engine = driver()
    node = saved(engine, 1)
    ref = engine.store.blocks.host.ref(node.blocks[2])
    assert ref is not None
    engine.store.blocks.host.arena.rows(ref.offset, 1)[0] ^= 1
    assert problems(engine.store, repair=True) == [("corrupt", node.blocks[2], True)]
    assert engine.serve(prompt(1, 40)).exact == 39


def test_a_file_that_is_gone_is_found(driver: Open, home: Path) -> None:
    engine = driver()
    node = saved(engine, 1)
    drop_from_host(engine.store)
    files(home)[node.blocks[0]].unlink()
    found = problems(engine.store, repair=True)
    assert [(kind, repaired) for kind, _, repaired in found] == [("missing", True)]
    assert len(engine.store.tree) == 0
    assert problems(engine.store) == []


def test_a_disk_that_refuses_is_a_problem_that_only_a_repair_gives_up(driver: Open) -> None:
    engine = driver()
    node = saved(engine, 1)
    drop_from_host(engine.store)
    level = next(iter(engine.store.blocks.levels))
    level.tier = faulty = FaultyTier(level.tier)
    faulty.fail_always("get", StorageError("Input/output error"))
    found = problems(engine.store)
    assert found == [("storage", name, False) for name in sorted(node.blocks)]
    assert len(engine.store.tree) == 1
    problems(engine.store, repair=True)
    assert len(engine.store.tree) == 0


def test_loops_and_bad_segments_are_found_and_removed(driver: Open) -> None:
    engine = driver()
    a, b, c = (saved(engine, seed) for seed in range(3))
    tree = engine.store.tree
    tree.replace(msgspec.structs.replace(a, parent=b.id))
    tree.replace(msgspec.structs.replace(b, parent=a.id))
    tree.replace(msgspec.structs.replace(c, segments=c.segments[1:]))
    found = problems(engine.store)
    assert sorted(kind for kind, _, _ in found) == ["cycle", "segments"]
    assert not any(repaired for _, _, repaired in found)
    assert all(repaired for _, _, repaired in problems(engine.store, repair=True))
    assert len(engine.store.tree) == 1
    assert problems(engine.store) == []


def test_the_catalogue_and_the_tree_must_agree(driver: Open) -> None:
    engine = driver()
    a, b = saved(engine, 1), saved(engine, 2)
    catalog = engine.store.repository.catalog
    assert catalog is not None
    catalog.delete([a.id])
    engine.store.tree.remove(b.id)
    engine.store.nodes.state.index(b.namespace).remove(b)
    found = problems(engine.store)
    assert sorted(found) == sorted([("row", a.id, False), ("row", b.id, False)])
    problems(engine.store, repair=True)
    engine.store.collect()
    assert problems(engine.store) == []
    assert catalog.count() == len(engine.store.tree) == 0


@pytest.mark.parametrize("key", [None, "key"])
def test_records_of_empty_namespaces_are_collected(
    driver: Open, tmp_path: Path, key: str | None
) -> None:
    """At once by command, later by the janitor. A namespace that returns gets a new record and a
    new salt."""
    settings: dict[str, Any] = {}
    if key is not None:
        (tmp_path / key).write_text("ab" * 32)
        settings = {"encryption_key": f"file:{tmp_path / key}"}
        (tmp_path / key).chmod(0o600)
    engine = driver(**settings)
    store = engine.store
    catalog = store.repository.catalog
    assert catalog is not None
    rows = bytes(16 * engine.namespace.layout.row_bytes)
    for at in range(3):
        store.save(prompt(at, 16), engine.namespace.for_tenant(str(at)), rows)
    store.flush()
    store.evict(namespace=engine.namespace.for_tenant("0").digest, nodes=0)
    store.janitor.collect(patient=True)
    assert len(catalog.records.digests()) == 3, "it may be used again"
    closed = engine.namespace.for_tenant("0").digest
    store.nodes.namespaces.closed.add(closed)
    store.collect()
    assert len(catalog.records.digests()) == 3, "it is being purged"
    store.nodes.namespaces.closed.discard(closed)
    store.collect()
    assert len(catalog.records.digests()) == len(list(store.nodes.namespaces)) == 2
    store.clear()
    store.collect()
    assert not catalog.records.digests()
    assert engine.save(prompt(7, 40))
    store.flush()
    assert driver(**settings).serve(prompt(7, 40)).exact == 39
