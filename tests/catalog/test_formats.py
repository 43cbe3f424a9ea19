"""Neighbouring releases are compatible both ways: homes and records of the release before, and of
the next.

`tests/data/home-2` was written by the first release with format 2. Fields, columns and marks that
are unknown today stand for the next release.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import msgspec
import numpy as np
import pyarrow as pa
import pytest

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.config import StoreConfig
from kvshare_store.errors import HomeError
from kvshare_store.maintenance.check import check_tree
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Edit
from kvshare_store.nodes.node import NODE_FORMAT, Node, encode_node, node_id
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS
from kvshare_store.plan.spans import Span
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]
DATA = Path(__file__).parents[1] / "data"
SAVED, EDITED = prompt(1, 24), [*prompt(1, 24)[:12], 7, *prompt(1, 24)[13:]]
"""The prompts in `home-2`."""


class FirstNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the first release with format 2 reads it."""

    id: str
    namespace: str
    token_bytes: bytes
    parent: str | None = None
    edits: tuple[Edit, ...] = ()
    segments: tuple[Span, ...]
    blocks: tuple[str, ...]
    block_bytes: tuple[int, ...] = ()
    exact_rows: int
    generation: int = 0
    created: float
    merged: bool = False
    pinned: bool = False


class FirstNamespace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A namespace as the first release with format 2 reads it: it refuses unknown fields."""

    model: str
    layout: KVLayout
    revision: str = ""
    kv_dtype: str = "auto"
    rope: str = ""
    lora: str = ""
    ranks: str = "tp1"
    tenant: str = ""
    tokenizer: str = ""


def table(folder: Path, name: str) -> Any:
    return lancedb.connect(str(folder)).open_table(name)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table(folder, name).search().limit(None).to_list()
    return found


def put(folder: Path, name: str, key: str, row: dict[str, Any]) -> None:
    """Write a row as another release would."""
    opened = table(folder, name)
    job = opened.merge_insert(key).when_matched_update_all().when_not_matched_insert_all()
    job.execute(pa.Table.from_pylist([row], opened.schema), on_bad_vectors="null")


# --- the release before -------------------------------------------------------------------------


@pytest.fixture
def before(home: Path, driver: Open) -> Open:
    """The home of the release before. The drivers that open it know its rows."""
    shutil.copytree(DATA / "home-2", home)
    return driver


def test_a_home_of_the_release_before_is_served(before: Open) -> None:
    engine = before()
    engine.book.write(SAVED, engine.book.computed(SAVED, 24, ""), range(24), 24)
    plan = engine.serve([*SAVED, 5])
    assert (plan.exact, plan.generation) == (24, 0)
    assert sorted(node.generation for node in engine.store.tree) == [0, 1]
    assert engine.store.stats()["errors"] == {}
    assert check_tree(engine.store.repository, repair=False).problems == ()


def test_rows_of_the_release_before_get_a_checksum_when_they_are_written_again(
    before: Open, home: Path
) -> None:
    nodes = [msgspec.msgpack.decode(row["node"]) for row in rows_of(home / "catalog", "nodes")]
    assert not any("check" in node for node in nodes)
    engine = before()
    pinned = next(node.id for node in engine.store.tree if node.exact)
    engine.store.pin(pinned)
    engine.store.flush()
    nodes = [msgspec.msgpack.decode(row["node"]) for row in rows_of(home / "catalog", "nodes")]
    assert {node["id"]: "check" in node for node in nodes}[pinned]
    assert before().store.stats()["errors"] == {}


def test_the_release_before_reads_what_this_one_writes(driver: Open, home: Path) -> None:
    """Column names and the home's mark are compared, and the records are decoded."""
    engine = driver()
    engine.save(SAVED)
    engine.serve_and_save(EDITED)
    engine.store.close()
    assert (home / "format").read_text() == "2"
    assert table(home / "catalog", "nodes").schema.names == [
        "id", "namespace", "node", "lexical", "semantic",
    ]  # fmt: skip
    assert table(home / "catalog", "namespaces").schema.names == ["digest", "namespace", "salt"]
    for row in rows_of(home / "catalog", "nodes"):
        node = msgspec.msgpack.decode(row["node"], type=FirstNode)
        assert (node.id, node.namespace) == (row["id"], row["namespace"])
    for row in rows_of(home / "catalog", "namespaces"):
        first = msgspec.msgpack.decode(row["namespace"], type=FirstNamespace)
        now = msgspec.structs.asdict(engine.namespace)
        assert msgspec.structs.asdict(first) == {
            name: now[name] for name in first.__struct_fields__
        }
        assert "pool" not in msgspec.msgpack.decode(row["namespace"])


def test_digests_of_namespaces_never_change() -> None:
    layout = KVLayout(2, 1, 4, "float32")
    assert Namespace("m", layout).digest == (
        "91011a8d316ee217ae956b02b172f19855a8b86014dd73bcc15741ffcc852236"
    )
    row = rows_of(DATA / "home-2" / "catalog", "namespaces")[0]
    assert Namespace("model", layout).digest == row["digest"]


class NextNamespace(Namespace, frozen=True, kw_only=True):
    """What the next release may add."""

    adapter_rank: int = 0


def test_a_field_of_the_next_release_counts_only_where_it_is_set() -> None:
    layout = KVLayout(2, 1, 4, "float32")
    plain = NextNamespace("m", layout)
    assert plain.digest == Namespace("m", layout).digest
    assert msgspec.structs.replace(plain, adapter_rank=8).digest != plain.digest


# --- the next release ---------------------------------------------------------------------------


def test_the_mark_of_a_home(home: Path, config: Callable[..., StoreConfig]) -> None:
    """A release that only adds marks its homes 2.x; a format that this one cannot read is 3."""
    Store(config()).close()
    for mark in ("2.1", "2.17\n"):
        (home / "format").write_text(mark)
        Store(config()).close()
        assert (home / "format").read_text() == mark
    for mark in ("1", "3", "21", "two"):
        (home / "format").write_text(mark)
        with pytest.raises(HomeError, match="this release reads"):
            Store(config())
    for torn in (b"", b"\0"):
        (home / "format").write_bytes(torn)
        Store(config()).close()
        assert (home / "format").read_text() == "2"


def test_an_unknown_column_is_ignored_and_kept(driver: Open, home: Path) -> None:
    engine = driver()
    kept = engine.save(SAVED)
    engine.store.close()
    for name in ("nodes", "namespaces"):
        opened = table(home / "catalog", name)
        opened.add_columns(pa.schema([pa.field("later", pa.string())]))
        opened.update(where="true", values={"later": "said by the next release"})
    again = driver()
    assert again.serve([*SAVED, 5]).exact == 24
    again.store.pin(str(kept))
    again.save(prompt(2, 24))
    again.store.flush()
    said = {row["id"]: row["later"] for row in rows_of(home / "catalog", "nodes")}
    assert said.pop(str(kept)) == "said by the next release"
    assert list(said.values()) == [None]
    assert driver().store.stats()["errors"] == {}


def test_a_missing_column_is_at_its_default(driver: Open, home: Path) -> None:
    driver().save(SAVED)
    driver().store.close()
    table(home / "catalog", "nodes").drop_columns(["semantic"])
    table(home / "catalog", "namespaces").drop_columns(["salt"])
    engine = driver()
    assert engine.serve([*SAVED, 5]).exact == 24 or engine.store.stats()["errors"]
    engine.save(prompt(2, 24))
    assert driver().serve([*prompt(2, 24), 5]).exact == 24


def test_a_table_without_what_must_be_there_is_of_another_format(
    driver: Open, config: Callable[..., StoreConfig], home: Path
) -> None:
    driver().save(SAVED)
    driver().store.close()
    table(home / "catalog", "nodes").drop_columns(["node"])
    with pytest.raises(HomeError, match="has no node: it is of another format"):
        Store(config())


def add_node(folder: Path, namespace: str, changes: dict[str, Any]) -> str:
    """Write a node's row that this release would not write; returns its id."""
    tokens = np.asarray(prompt(7, 24), np.int32)
    node = Node(
        id=node_id(namespace, tokens, True),
        namespace=namespace,
        token_bytes=tokens.tobytes(),
        segments=(Span(0, 24, 0, 0, 0, True),),
        blocks=("ab" * 32,),
        exact_rows=24,
    )
    encoded = msgspec.msgpack.encode(msgspec.msgpack.decode(encode_node(node)) | changes)
    unit = np.eye(VECTOR_DIMENSIONS, dtype=np.float32)[0]
    row = {"id": node.id, "namespace": namespace, "node": encoded, "lexical": unit}
    put(folder, "nodes", "id", {**row, "semantic": None})
    return node.id


def test_unknown_fields_of_a_node_are_ignored(tmp_path: Path) -> None:
    namespace = Namespace("m", KVLayout(1, 1, 4, "float32"))
    catalog = Catalog(tmp_path)
    catalog.records.add([namespace])
    known = add_node(tmp_path, namespace.digest, {"score": 0.5, "notes": {"any": ["thing"]}})
    catalog.refresh()
    assert [node.id for node, _ in catalog.load()] == [known]
    assert catalog.take_faults() == []


def test_a_node_of_a_later_format_is_left_alone(driver: Open, home: Path) -> None:
    engine = driver()
    engine.save(SAVED)
    engine.store.close()
    digest = engine.namespace.digest
    later = add_node(home / "catalog", digest, {"format": NODE_FORMAT + 1})
    again = driver()
    assert again.store.stats()["errors"] == {"newer": 1}
    assert [node.id for node in again.store.tree] != [later]
    for repair in (False, True):
        (problem,) = check_tree(again.store.repository, repair=repair).problems
        assert (problem.kind, problem.about, problem.repaired) == ("newer", later, False)
    again.store.collect()
    again.store.close()
    assert later in {row["id"] for row in rows_of(home / "catalog", "nodes")}


def later_record(rank: int) -> tuple[str, dict[str, Any]]:
    """The digest and the row of a namespace, as the next release writes it."""
    record = NextNamespace("model", KVLayout(2, 1, 4, "float32"), adapter_rank=rank)
    row = {"digest": record.digest, "namespace": msgspec.msgpack.encode(record), "salt": None}
    return record.digest, row


def test_a_namespace_with_an_unknown_field_at_its_default_is_served(
    driver: Open, home: Path
) -> None:
    engine = driver()
    engine.save(SAVED)
    engine.store.close()
    digest, row = later_record(0)
    assert digest == engine.namespace.digest
    put(home / "catalog", "namespaces", "digest", row)
    assert driver().serve([*SAVED, 5]).exact == 24


def test_a_namespace_that_means_more_is_left_alone(driver: Open, home: Path) -> None:
    engine = driver()
    engine.save(SAVED)
    engine.store.close()
    digest, row = later_record(8)
    put(home / "catalog", "namespaces", "digest", row)
    theirs = add_node(home / "catalog", digest, {})
    again = driver()
    assert again.serve([*SAVED, 5]).exact == 24
    assert again.store.stats()["errors"] == {"newer": 2}
    assert again.store.namespace(digest) is None
    for repair in (False, True):
        problems = check_tree(again.store.repository, repair=repair).problems
        assert {(p.kind, p.about) for p in problems} == {("newer", digest), ("newer", theirs)}
    again.store.close()
    assert theirs in {row["id"] for row in rows_of(home / "catalog", "nodes")}
    assert digest in {row["digest"] for row in rows_of(home / "catalog", "namespaces")}
