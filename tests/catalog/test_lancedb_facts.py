"""What LanceDB does that the catalogue relies on or works around.

An upgrade that changes one of these fails here and not in somebody's store.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.errors import StorageError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS, Vectors
from kvshare_store.plan.spans import Span
from kvshare_store.tensors.layout import KVLayout
from tests.support.waiting import until

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("value", pa.int64()),
        pa.field("vector", pa.list_(pa.float32(), 4)),
    ]
)


def rows(*ids: str, value: int = 0) -> pa.Table:
    made = [{"id": name, "value": value, "vector": [1.0, 0.0, 0.0, 0.0]} for name in ids]
    return pa.Table.from_pylist(made, SCHEMA)


def merge(table: Any, data: pa.Table) -> None:
    job = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    job.execute(data)


def ids(table: Any) -> list[str]:
    return [row["id"] for row in table.search().limit(None).to_list()]


@pytest.fixture
def table(tmp_path: Path) -> Any:
    made = lancedb.connect(str(tmp_path)).create_table("t", schema=SCHEMA)
    made.set_unenforced_primary_key("id")
    return made


# --- merging ------------------------------------------------------------------------------------


def test_merging_a_key_again_replaces_its_row(table: Any) -> None:
    merge(table, rows("a", "b", value=1))
    merge(table, rows("b", "c", value=2))
    found = {row["id"]: row["value"] for row in table.search().limit(None).to_list()}
    assert found == {"a": 1, "b": 2, "c": 2}


def test_concurrent_merges_of_a_declared_key_leave_one_row(table: Any, tmp_path: Path) -> None:
    """Without the declared, non-nullable key, rows are duplicated silently."""

    def work(value: int) -> None:
        own = lancedb.connect(str(tmp_path)).open_table("t")
        merge(own, rows("same", value=value))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, value) for value in range(8)]:
            assert done.exception() is None or "conflict" in str(done.exception()).lower()
    table.checkout_latest()
    assert ids(table) == ["same"]


def test_a_null_key_is_refused(table: Any) -> None:
    nullable = pa.schema([SCHEMA.field(0).with_nullable(True), *list(SCHEMA)[1:]])
    with pytest.raises((ValueError, RuntimeError, OSError)):
        merge(table, pa.Table.from_pylist([{"id": None, "value": 1, "vector": None}], nullable))


# --- reading ------------------------------------------------------------------------------------


def test_a_scan_without_a_limit_returns_everything_and_a_search_ten_rows(table: Any) -> None:
    table.add(rows(*(f"{at:02d}" for at in range(25))))
    assert len(table.search([1.0, 0, 0, 0]).to_list()) == 10
    assert len(table.search().limit(None).to_list()) == 25
    batches = list(table.search().limit(None).to_batches(7))
    assert sum(batch.num_rows for batch in batches) == 25


def test_rows_come_back_in_the_order_of_commits(table: Any) -> None:
    expected = []
    for at in range(12):
        names = [f"{97 - at}-{n}" for n in range(3)]
        merge(table, rows(*names))
        expected += names
    assert ids(table) == expected
    table.delete("id = '90-1'")
    expected.remove("90-1")
    table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
    assert ids(table) == expected


def test_another_handle_is_stale_until_it_checks_out_the_latest(table: Any, tmp_path: Path) -> None:
    other = lancedb.connect(str(tmp_path)).open_table("t")
    assert other.count_rows() == 0
    table.add(rows("a"))
    assert other.count_rows() == 0
    other.checkout_latest()
    assert other.count_rows() == 1


def test_a_reopened_table_has_everything_that_was_committed(table: Any, tmp_path: Path) -> None:
    merge(table, rows("a"))
    table.delete("id = 'a'")
    merge(table, rows("b"))
    again = lancedb.connect(str(tmp_path)).open_table("t")
    assert ids(again) == ["b"]
    assert again.schema.names == SCHEMA.names


# --- deleting -----------------------------------------------------------------------------------


def test_deleting_ids_that_are_not_there(table: Any) -> None:
    merge(table, rows("a", "b"))
    table.delete("id IN ('a', 'zz')")
    assert ids(table) == ["b"]


def test_deleted_rows_stay_on_disk_until_old_versions_are_cleaned_up(
    table: Any, tmp_path: Path
) -> None:
    secret = "very-secret-identifier"
    table.add(rows(secret, "kept"))

    def on_disk() -> bool:
        files = (file for file in tmp_path.rglob("*") if file.is_file())
        return any(secret.encode() in file.read_bytes() for file in files)

    table.delete(f"id = '{secret}'")
    assert on_disk()

    def cleaned_up() -> bool:  # not at the first try if the clock was set back
        table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
        return not on_disk()

    until(cleaned_up, 60)
    assert ids(table) == ["kept"]


def test_cleaning_up_everything_warns_when_told_zero(table: Any) -> None:
    table.add(rows("a"))
    with pytest.warns(UserWarning, match="removes every version"):
        table.optimize(cleanup_older_than=timedelta(0))


def test_where_is_sql_text(table: Any) -> None:
    """So ids are inserted only as hex digits."""
    merge(table, rows("a", "b"))
    table.delete("id = 'x' OR 'a' = 'a'")
    assert ids(table) == []


# --- vectors ------------------------------------------------------------------------------------


def test_zero_vectors_are_never_found_by_cosine(table: Any) -> None:
    data = [
        {"id": "zero", "value": 0, "vector": [0.0] * 4},
        {"id": "unit", "value": 0, "vector": [1.0, 0, 0, 0]},
    ]
    table.add(pa.Table.from_pylist(data, SCHEMA))
    found = table.search([1.0, 0, 0, 0]).distance_type("cosine").limit(5).to_list()
    assert [row["id"] for row in found] == ["unit"]


def test_a_distance_range_from_zero_drops_exact_matches(table: Any) -> None:
    """The cosine distance of equal vectors is slightly below zero."""
    vector = (np.asarray([3, 1, 4, 1], np.float32) / np.sqrt(27)).tolist()
    table.add(pa.Table.from_pylist([{"id": "same", "value": 0, "vector": vector}], SCHEMA))
    search = table.search(vector).distance_type("cosine").limit(5)
    assert [row["id"] for row in search.to_list()] == ["same"]
    ranged = table.search(vector).distance_type("cosine").distance_range(0.0, 0.5).limit(5)
    below = search.to_list()[0]["_distance"] < 0
    assert [row["id"] for row in ranged.to_list()] == ([] if below else ["same"])


def test_nan_is_refused(table: Any) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        table.add([{"id": "nan", "value": 0, "vector": [float("nan")] * 4}])


# --- the catalogue that is built on this --------------------------------------------------------


NAMESPACE = Namespace("m", KVLayout(2, 1, 4, "float32"))


def make_node(first: int, pinned: bool = False) -> Node:
    tokens = np.arange(first, first + 6, dtype=np.int32)
    return Node(
        id=node_id(NAMESPACE.digest, tokens, True),
        namespace=NAMESPACE.digest,
        token_bytes=tokens.tobytes(),
        segments=(Span(0, 6, 0, 0, 0),),
        blocks=("cd" * 32,),
        exact_rows=6,
        pinned=pinned,
    )


def opened(folder: Path) -> Catalog:
    catalog = Catalog(folder)
    catalog.records.add([NAMESPACE])
    return catalog


def vectors(semantic: bool = False) -> Vectors:
    unit = np.eye(VECTOR_DIMENSIONS, dtype=np.float32)[3]
    return Vectors(unit, unit if semantic else None)


def test_nodes_survive_with_and_without_a_text_vector(tmp_path: Path) -> None:
    catalog = opened(tmp_path)
    nodes = [make_node(first) for first in range(3)]
    catalog.add([(nodes[0], vectors()), (nodes[1], vectors(semantic=True))])
    catalog.add([(nodes[2], vectors())])
    for again in (catalog, opened(tmp_path)):
        found = {node.id: found for node, found in again.load()}
        assert list(found) == [node.id for node in nodes]
        text = found[nodes[1].id].semantic
        assert found[nodes[0].id].semantic is None
        assert text is not None
        assert text[3] == 1.0
        assert found[nodes[2].id].lexical[3] == 1.0


def test_a_node_that_is_added_again_is_one_row(tmp_path: Path) -> None:
    catalog = opened(tmp_path)
    for pinned in (False, True):
        catalog.add([(make_node(0, pinned), vectors())])
    assert catalog.count() == 1
    assert [node.pinned for node, _ in catalog.load()] == [True]


def test_more_nodes_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare_store.catalog.table.Table.read_rows", 10)
    catalog = opened(tmp_path)
    nodes = [make_node(first) for first in range(35)]
    catalog.add([(node, vectors()) for node in nodes])
    assert [node.id for node, _ in catalog.load()] == [node.id for node in nodes]
    catalog.delete([node.id for node in nodes[5:30]])
    catalog.compact()
    kept = [node.id for node in nodes[:5] + nodes[30:]]
    assert [node.id for node, _ in opened(tmp_path).load()] == kept


def test_only_hex_digits_reach_the_sql_text(tmp_path: Path) -> None:
    catalog = opened(tmp_path)
    catalog.add([(make_node(0), vectors())])
    for name in ("x' OR 'a' = 'a", "zz", ""):
        with pytest.raises(ValueError, match="invalid literal"):
            catalog.delete([name])
    catalog.delete([])
    assert catalog.count() == 1


def test_namespaces_are_remembered_once(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    spaces = [Namespace("m", KVLayout(2, 1, 4, "float32"), tenant=t, tokenizer="x") for t in "ab"]
    for space in (*spaces, *spaces):
        catalog.records.add([space])
    assert Catalog(tmp_path).records.read() == spaces


def test_what_lancedb_refuses_is_a_storage_error(tmp_path: Path) -> None:
    catalog = opened(tmp_path)
    broken = Vectors(np.zeros(7, np.float32), None)
    with pytest.raises(StorageError):
        catalog.add([(make_node(0), broken)])
    assert catalog.count() == 0


# --- row numbers and files: what finding damage and changes relies on ------------------------


def test_row_numbers_name_the_fragment_and_grow_with_every_commit(table: Any) -> None:
    def numbers() -> dict[str, int]:
        found = table.search().select(["id"]).with_row_id(True).limit(None).to_list()
        return {row["id"]: row["_rowid"] for row in found}

    for names in (("a", "b"), ("c",)):
        merge(table, rows(*names))
    first = numbers()
    assert first == {"a": 0, "b": 1, "c": 1 << 32}
    merge(table, rows("a", value=1))
    assert numbers()["a"] == 2 << 32
    table.optimize()
    assert min(numbers().values()) > 2 << 32  # compaction writes new fragments


def test_of_a_range_of_row_numbers_only_those_fragments_are_opened(
    table: Any, tmp_path: Path
) -> None:
    for names in (("a",), ("b",), ("c",)):
        merge(table, rows(*names))
    data = sorted(
        (tmp_path / "t.lance" / "data").iterdir(), key=lambda file: file.stat().st_mtime_ns
    )
    data[1].write_bytes(b"")
    damaged = lancedb.connect(str(tmp_path)).open_table("t")
    with pytest.raises((OSError, RuntimeError, ValueError)):
        ids(damaged)
    with pytest.raises((OSError, RuntimeError, ValueError)):
        merge(damaged, rows("d"))
    outside = damaged.search().where(f"_rowid < {1 << 32} OR _rowid >= {3 << 32}").limit(None)
    with pytest.raises((OSError, RuntimeError, ValueError)):
        outside.to_list()  # but not where the ranges are joined by OR
    damaged.delete(f"_rowid >= {1 << 32} AND _rowid < {2 << 32}")
    assert ids(damaged) == ["a", "c"]
    merge(damaged, rows("d"))
    assert ids(damaged) == ["a", "c", "d"]


def test_columns_that_a_merge_does_not_name_keep_what_they_hold(table: Any) -> None:
    merge(table, rows("a", value=7))
    part = pa.Table.from_pylist(
        [{"id": "a", "vector": [0.0, 1.0, 0.0, 0.0]}], pa.schema([SCHEMA.field(0), SCHEMA.field(2)])
    )
    merge(table, part)
    (row,) = table.search().limit(None).to_list()
    assert (row["value"], row["vector"][1]) == (7, 1.0)
