"""What a crash leaves, step by step: the home is copied after each step, and every copy must open.

Bytes go before metadata on the way in, metadata before bytes on the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import pytest

from kvshare_store.blocks.remotes.objects import ObjectRemote
from kvshare_store.blocks.tiers.base import Beside
from kvshare_store.blocks.tiers.disk import scratch
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.place import Place
from kvshare_store.catalog.table import Table
from kvshare_store.commit import home as home_module
from kvshare_store.maintenance.check import check_blocks, check_tree
from kvshare_store.namespace import Namespace
from kvshare_store.save.staging import Buffer, packed
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.tier_contract import damage_file
from tests.support.crashes import NEW, OLD, Config, Crashes, opened, remote_of
from tests.support.oracle import Driver, pick, prompt

pytestmark = pytest.mark.fault

Open = Callable[..., Driver]

CHILD = [*OLD[:20], 7, *OLD[21:]]


def test_saving(driver: Open, config: Config, crashes: Callable[[Driver], Crashes]) -> None:
    engine = driver()
    engine.save(OLD)
    found = crashes(engine)
    engine.save(NEW)
    engine.store.flush()
    assert found.steps == ["before block renamed", "after block renamed", "row added"]
    assert len(found.copies) == 7
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(OLD).exact == 39, copy.step
            plan = again.serve(NEW)
            assert plan.exact == (23 if copy.step == "row added" else 0), copy.step
            again.save(NEW)
            assert again.serve(NEW).exact == 23


def test_saving_a_child(driver: Open, config: Config, crashes: Callable[[Driver], Crashes]) -> None:
    engine = driver()
    engine.save(OLD)
    found = crashes(engine)
    engine.serve_and_save(CHILD)
    engine.store.flush()
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(OLD).exact == 39
            assert again.serve(CHILD).reused == 38 + (copy.step == "row added")


def test_evicting(driver: Open, config: Config, crashes: Callable[[Driver], Crashes]) -> None:
    engine = driver()
    engine.save(OLD)
    engine.save(NEW)
    found = crashes(engine)
    engine.store.evict(nodes=1)
    engine.store.flush()
    assert found.steps == ["row deleted", "before block removed", "after block removed"]
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(NEW).exact == 23
            assert again.plan(OLD).declined == "no_donor"


def test_making_room_on_disk(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes]
) -> None:
    engine = driver(disk_bytes=26_000)
    engine.save(OLD)
    found = crashes(engine)
    engine.save(NEW + prompt(3, 16))
    engine.store.flush()
    assert found.steps == [
        "row deleted",
        "before block removed",
        "after block removed",
        "before block renamed",
        "after block renamed",
        "row added",
    ]
    for copy in found.end():
        for again in opened(copy, config, engine, disk_bytes=26_000):
            plan = again.serve(NEW)
            assert plan.exact == (23 if copy.step == "row added" else 0), copy.step
            assert again.serve(OLD).exact == 0


def test_an_exact_node_replaces_an_edited_one(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes]
) -> None:
    engine = driver()
    engine.save(OLD)
    engine.serve_and_save(CHILD)
    found = crashes(engine)
    engine.save(CHILD)
    engine.store.flush()
    order = [step for step in found.steps if step.startswith("row")]
    assert order == ["row deleted", "row added"] or order == ["row added", "row deleted"]
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(OLD).exact == 39
            assert again.serve(CHILD).reused >= 38, copy.step


def test_an_answer_replaces_its_prompt(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes]
) -> None:
    engine = driver()
    engine.save(OLD)
    told = [*OLD, *NEW[:12]]
    rows = engine.book.computed(told, len(told), "")
    engine.book.write(told, rows, range(40, 52), len(told))
    found = crashes(engine)
    staged = engine.store.stage(told, engine.namespace, extends=len(OLD))
    blocks = packed(pick(rows, range(40, 52)), staged.sizes, engine.namespace.layout)
    engine.store.commit(staged.id, Buffer(blocks))
    engine.store.flush()
    assert [step for step in found.steps if step.startswith("row")] == ["row added", "row deleted"]
    nodes = {"row added": 2, "row deleted": 1}
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(OLD).exact == 39
            assert again.serve([*told, 7]).exact == (52 if copy.step in nodes else 40)
            assert len(again.store.tree) == nodes.get(copy.step, 1), copy.step


def test_clearing(driver: Open, config: Config, crashes: Callable[[Driver], Crashes]) -> None:
    engine = driver()
    engine.save(OLD)
    engine.serve_and_save(CHILD)
    found = crashes(engine)
    engine.store.clear()
    assert found.steps == ["row deleted", "before block removed", "after block removed"]
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.plan(OLD).declined == "empty_store"


def test_merging(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes], home: Path
) -> None:
    engine = driver(max_chain=0)
    parent = engine.save(OLD)
    child = engine.serve_and_save(CHILD)
    assert parent is not None
    assert child is not None
    engine.store.nodes.remove([parent])  # only the child has these blocks
    found = crashes(engine)
    assert engine.store.collect().merged == 1
    assert found.steps == [
        "before block renamed",
        "after block renamed",
        "row replaced",
        "before block removed",
        "after block removed",
    ]
    for copy in found.end():
        for again in opened(copy, config, engine):
            node = again.store.tree.get(child)
            assert node is not None, copy.step
            assert node.merged == (copy.step not in found.steps[:2]), copy.step
            plan = again.serve(CHILD)
            assert plan.reused == 39, copy.step
            assert plan.exact >= 20, copy.step
            assert node.generation == 1


def test_merging_what_others_share(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes]
) -> None:
    engine = driver(max_chain=0)
    engine.save(OLD)
    child = engine.serve_and_save(CHILD)
    assert child is not None
    found = crashes(engine)
    assert engine.store.collect().merged == 1
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(OLD).exact == 39, copy.step
            assert again.serve(CHILD).reused == 39, copy.step


def test_collecting_blocks_that_no_node_uses(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes], home: Path
) -> None:
    engine = driver()
    engine.save(OLD)
    engine.save(NEW)
    engine.store.flush()
    engine.store.close()
    before = {file.stem for file in (home / "blocks").glob("*/*")}
    catalog = Catalog(home / "catalog")
    catalog.records.read()
    catalog.delete([node.id for node, _ in catalog.load() if node.tokens.tolist() == OLD])
    engine = driver()
    found = crashes(engine)
    assert engine.store.collect().blocks == 5
    assert found.steps == ["before block removed", "after block removed"]
    assert len(before) == 8
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(NEW).exact == 23, copy.step
            assert again.plan(OLD).declined == "no_donor"


def test_collecting_nodes_that_have_expired(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes]
) -> None:
    engine = driver(ttl_seconds=1e-6)
    engine.save(OLD)
    kept = engine.save(NEW)
    assert kept is not None
    engine.store.pin(kept)
    found = crashes(engine)
    assert engine.store.collect().nodes == 1
    assert found.steps == ["row deleted", "before block removed", "after block removed"]
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(NEW).exact == 23, copy.step
            assert again.plan(OLD).declined == "no_donor"


def test_pinning(driver: Open, config: Config, crashes: Callable[[Driver], Crashes]) -> None:
    engine = driver()
    node = engine.save(OLD)
    assert node is not None
    found = crashes(engine)
    found.copy("before row replaced")
    engine.store.pin(node)
    assert found.steps == ["before row replaced", "row replaced"]
    for copy in found.end():
        for again in opened(copy, config, engine):
            there = again.store.tree.get(node)
            assert there is not None
            assert there.pinned == (copy.step == "row replaced")
            assert again.serve(OLD).exact == 39


def test_compacting(
    driver: Open,
    config: Config,
    crashes: Callable[[Driver], Crashes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = driver()
    engine.save(OLD)
    engine.save(NEW)
    engine.store.evict(nodes=1)
    found = crashes(engine)
    catalog = engine.store.repository.catalog
    assert catalog is not None
    monkeypatch.setattr(catalog, "compact", found.around(catalog.compact, "compaction"))
    assert engine.store.collect().versions > 0
    assert found.steps == ["before compaction", "after compaction"]
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(NEW).exact == 23
            assert again.plan(OLD).declined == "no_donor"


# --- purge, tiers below the disk, damage, start ---------------------------------------------------


def test_purging(
    config: Config,
    crashes: Callable[[Driver], Crashes],
    driver: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks go before rows, so that what a crash leaves can be purged again."""
    kept = driver()
    kept.save(NEW)
    mine = kept.namespace.for_tenant("mine")
    Driver(kept.store, mine, kept.book).save(OLD)
    found = crashes(kept)
    catalog = kept.store.repository.catalog
    assert catalog is not None
    monkeypatch.setattr(catalog, "purge", found.after(catalog.purge, "rows purged"))
    (purged,) = kept.store.purge(mine.digest)
    assert purged.remaining == ()
    assert found.steps == ["before block removed", "after block removed", "rows purged"]
    for copy in found.end():
        with Store(config(home=str(copy.home))) as store:
            again = Driver(store, mine, kept.book)
            assert again.serve(OLD).exact in (0, 39), copy.step
            for _ in range(store.namespace(mine.digest) is not None):
                (purged,) = store.purge(mine.digest)
                assert purged.remaining == (), copy.step
            assert store.namespace(mine.digest) is None
        for still in opened(copy, config, kept):
            assert still.serve(NEW).exact == 23, copy.step


def slow_steps(found: Crashes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a crash after each value that the remote has received, too."""
    real = ObjectRemote.put

    async def put(self: ObjectRemote, key: str, parts: Any) -> None:
        await real(self, key, parts)
        found.copy("remote put")

    monkeypatch.setattr(ObjectRemote, "put", put)


def test_saving_where_the_remote_holds_every_row(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes], home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = {"disk": False, "remote_write": "through"}
    engine = driver(**settings, **remote_of(home))
    engine.save(OLD)
    found = crashes(engine)
    slow_steps(found, monkeypatch)
    engine.save(NEW)
    engine.store.flush()
    assert found.steps == ["remote put", "row added"]
    for copy in found.end():
        with Store(config(home=str(copy.home), **settings, **remote_of(copy.home))) as store:
            again = Driver(store, engine.namespace, engine.book)
            assert again.serve(OLD).exact == 39, copy.step
            assert again.serve(NEW).exact == (23 if copy.step == "row added" else 0)
            assert check_tree(store.repository, repair=False).problems == (), copy.step


def test_demoting_from_disk_to_the_remote(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes], home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A block leaves the disk only when the remote has it, so no crash in between loses a row."""
    monkeypatch.setattr(home_module, "beside", lambda _: Beside)  # room for the blocks, to the byte
    settings = {"disk_bytes": 26_000, "remote_write": "back"}
    engine = driver(**settings, **remote_of(home))
    engine.save(OLD)
    found = crashes(engine)
    slow_steps(found, monkeypatch)
    engine.save(NEW + prompt(3, 16))
    engine.store.flush()
    assert found.steps[:3] == ["remote put", "before block removed", "after block removed"]
    assert found.steps[-1] == "row added"
    for copy in found.end():
        with Store(config(home=str(copy.home), **settings, **remote_of(copy.home))) as store:
            again = Driver(store, engine.namespace, engine.book)
            assert again.serve(OLD).exact == 39, copy.step
            assert again.serve(NEW).exact == (23 if copy.step == "row added" else 0)
            tree = check_tree(store.repository, repair=False)
            assert tree.problems == (), copy.step
            assert check_blocks(store.repository, tree.blocks, repair=False).problems == (), (
                copy.step
            )


def test_reading_a_block_that_does_not_verify(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes], home: Path
) -> None:
    """The block is quarantined first, then its nodes go; meanwhile they serve nothing wrong."""
    driver().save(NEW)
    engine = driver()
    engine.save(OLD)
    engine.store.flush()
    engine = driver()
    found = crashes(engine)
    name = next(node for node in engine.store.tree if node.tokens.tolist() == OLD).blocks[2]
    damage_file(home / "blocks" / name[:2] / f"{name}.kvb", "middle")
    assert engine.plan(OLD).declined == "not_resident"
    engine.store.flush()
    assert found.steps == [
        "before block renamed",
        "after block renamed",
        "row deleted",
        "before block removed",
        "after block removed",
    ]
    for copy in found.end():
        with Store(config(home=str(copy.home))) as store:
            again = Driver(store, engine.namespace, engine.book)
            assert again.serve(NEW).exact == 23, copy.step
            assert again.serve(OLD).exact in (0, 16), copy.step
            store.flush()
            store.collect()
            assert check_tree(store.repository, repair=False).problems == (), copy.step
            again.save(OLD)
            assert again.serve(OLD).exact == 39, copy.step


def test_the_first_save_of_a_namespace(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The namespace's record, with the salt of its key, comes before any block sealed with that
    key."""
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("ab" * 32)
    settings = {"encryption_key": f"file:{key}"}
    engine = driver(**settings)
    found = crashes(engine)
    catalog = engine.store.repository.catalog
    assert catalog is not None
    records = catalog.records
    monkeypatch.setattr(records, "add", found.after(records.add, "namespace added"))
    engine.save(OLD)
    engine.store.flush()
    assert found.steps == [
        "namespace added",
        "before block renamed",
        "after block renamed",
        "row added",
    ]
    for copy in found.end():
        for again in opened(copy, config, engine, **settings):
            assert again.serve(OLD).exact == (39 if copy.step == "row added" else 0), copy.step
            again.save(OLD)
            assert again.serve(OLD).exact == 39


def test_starting(
    driver: Open, config: Config, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that was cut short is repeated: it removes unfinished files of dead processes
    only."""
    engine = driver()
    engine.save(OLD)
    engine.save(NEW)
    engine.store.close()
    for number in range(2):
        (home / "tmp" / f"dead.{number}").write_bytes(b"half a block")
    next((home / "blocks").glob("*/*")).unlink()
    found = Crashes(home, tmp_path / "copies")
    remove, load = scratch.files.remove, Catalog.load_batches
    monkeypatch.setattr(scratch.files, "remove", found.around(remove, "unfinished file removed"))
    monkeypatch.setattr(Catalog, "load_batches", found.after(load, "rows read"))
    monkeypatch.setattr(Catalog, "delete", found.after(Catalog.delete, "row deleted"))
    driver().store.flush()
    assert found.steps[:3] == [
        "before unfinished file removed",
        "after unfinished file removed",
        "rows read",
    ]
    assert "row deleted" in found.steps, "a node whose block is gone"
    for copy in found.end():
        with Store(config(home=str(copy.home))) as store:
            again = Driver(store, engine.namespace, engine.book)
            assert sorted([again.serve(OLD).exact, again.serve(NEW).exact]) in ([0, 39], [0, 23])
            store.flush()
            store.collect()
            assert check_tree(store.repository, repair=False).problems == (), copy.step
            assert not list((copy.home / "tmp").iterdir()), copy.step


def test_saving_before_anything_is_durable(
    driver: Open,
    config: Config,
    crashes: Callable[[Driver], Crashes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Staged, rows copied into slots, node visible: all of this is in memory only."""
    engine = driver()
    engine.save(OLD)
    found = crashes(engine)
    monkeypatch.setattr(engine.store.repository.queue, "put", lambda work: None)
    staged = engine.stage(NEW)
    found.copy("staged")
    saving = engine.store.saving
    monkeypatch.setattr(saving, "copy", found.after(saving.copy, "copied"))
    engine.commit(staged)
    assert engine.serve(NEW).exact == 23
    found.copy("visible")
    assert found.steps == ["staged", "copied", "visible"]
    for copy in found.end():
        for again in opened(copy, config, engine):
            assert again.serve(OLD).exact == 39
            assert again.serve(NEW).exact == 0, copy.step
            again.save(NEW)


@pytest.mark.parametrize("how", ["evict", "clear", "expire"])
def test_nodes_that_left_only_the_tree_are_back(
    driver: Open, config: Config, crashes: Callable[[Driver], Crashes], how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = driver(ttl_seconds=1e-6 if how == "expire" else 0.0)
    engine.save(OLD)
    found = crashes(engine)
    catalog = engine.store.repository.catalog
    assert catalog is not None
    monkeypatch.setattr(catalog, "delete", found.around(catalog.delete, "row deleted"))
    {
        "evict": lambda: engine.store.evict(nodes=1),
        "clear": engine.store.clear,
        "expire": engine.store.collect,
    }[how]()
    engine.store.flush()
    first, second, *_ = found.end()
    assert (first.step, second.step) == ("before row deleted", "row deleted")
    for again in opened(first, config, engine):
        assert again.serve(OLD).exact == 39
    for again in opened(second, config, engine):
        assert again.plan(OLD).declined == "empty_store"


def test_purging_the_catalogue(
    driver: Open,
    config: Config,
    crashes: Callable[[Driver], Crashes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Rows go first, then the record with its salt. A record that is left in old versions of the
    table goes with the janitor's first pass."""
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("ab" * 32)
    settings = {"encryption_key": f"file:{key}"}
    kept = driver(**settings)
    kept.save(NEW)
    mine = kept.namespace.for_tenant("mine")
    Driver(kept.store, mine, kept.book).save(OLD)
    found = crashes(kept)
    rewrite, drop = Table.rewrite, Table.drop_versions
    monkeypatch.setattr(Table, "rewrite", found.around(rewrite, "table rewritten"))
    monkeypatch.setattr(Table, "drop_versions", found.around(drop, "versions dropped"))
    salt = salt_of(kept.store, mine.digest)
    kept.store.purge(mine.digest)
    steps = ["table rewritten", "versions dropped"]
    inner = [f"{when} {step}" for step in steps for when in ("before", "after")]
    assert set(inner) <= set(found.steps)
    for copy in found.end():
        with Store(config(home=str(copy.home), gc_seconds=0.0, **settings)) as store:
            for _ in range(store.namespace(mine.digest) is not None):
                assert store.purge(mine.digest)[0].remaining == ()
            store.collect()
        left = [path for path in (copy.home / "catalog").rglob("*") if path.is_file()]
        assert not any(salt in path.read_bytes() for path in left), copy.step
        for still in opened(copy, config, kept, **settings):
            assert still.serve(NEW).exact == 23, copy.step


def table_in(home: Path, name: str) -> Any:
    """A table of the catalogue, opened past the store."""
    return lancedb.connect(str(home / "catalog")).open_table(name)


def salt_of(store: Store, digest: str) -> bytes:
    """The salt in a namespace's record."""
    rows = table_in(store.config.home_path, "namespaces").search().limit(None).to_list()
    return next(bytes(row["salt"]) for row in rows if row["digest"] == digest)


def test_starting_for_the_first_time(
    config: Config, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of creating a home, also between creating a table and declaring its key."""
    found = Crashes(home, tmp_path / "copies")
    monkeypatch.setattr(home_module, "take_lock", found.after(home_module.take_lock, "locked"))
    monkeypatch.setattr(
        home_module, "check_format", found.after(home_module.check_format, "format written")
    )
    create = home_module.Arena.create
    monkeypatch.setattr(home_module.Arena, "create", found.after(create, "arena made"))
    connect = Place.connect

    def connected(self: Place) -> Any:
        database = connect(self)
        made = database.create_table

        def create_table(name: str, **options: Any) -> Any:
            table = made(name, **options)
            found.copy(f"table {name}")
            return table

        monkeypatch.setattr(database, "create_table", create_table)
        return database

    monkeypatch.setattr(Place, "connect", connected)
    namespace = Namespace("model", KVLayout(2, 1, 4, "float32"))
    with Store(config()) as store:
        engine = Driver(store, namespace)
        engine.save(OLD)
    names = ["locked", "format written", "arena made", "table nodes", "table namespaces"]
    assert found.steps == names
    for copy in found.end():
        for again in opened(copy, config, engine):
            again.save(OLD)
            again.save(OLD)
            again.store.flush()
            for table in ("nodes", "namespaces"):
                schema = table_in(again.store.config.home_path, table).schema
                declared = [field for field in schema if field.metadata]
                assert len(declared) == 1, f"{copy.step}: a key that is not declared"
