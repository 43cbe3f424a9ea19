"""The durable copy of the tree: LanceDB tables. Every LanceDB call is in this module.

A row is written only after all blocks it names are durable, in one commit a batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import lancedb
import msgspec
import numpy as np
import pyarrow as pa

from kvshare_store.errors import HomeError, StorageError
from kvshare_store.namespace import Namespace
from kvshare_store.tree.node import Node

VECTOR_DIMENSIONS = 384
_READ_ROWS = 4096


class Vectors(NamedTuple):
    """What nominates a node: float32 unit vectors of 384 numbers; no semantic one may be known."""

    lexical: np.ndarray
    semantic: np.ndarray | None


def _schema() -> pa.Schema:
    vector = pa.list_(pa.float32(), VECTOR_DIMENSIONS)
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("namespace", pa.string(), nullable=False),
            pa.field("node", pa.binary(), nullable=False),
            pa.field("lexical", vector),
            pa.field("semantic", vector),
        ]
    )


_NAMESPACES = pa.schema(
    [
        pa.field("digest", pa.string(), nullable=False),
        pa.field("namespace", pa.binary(), nullable=False),
    ]
)


class Catalog:
    """Rows of nodes and namespaces. Thread-safe: one handle under one lock.

    Concurrent `merge_insert` on a nullable or undeclared key duplicates rows silently, so the keys
    are non-nullable and declared.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._database = lancedb.connect(str(folder))
            self._nodes = self._open("nodes", _schema(), "id")
            self._namespaces = self._open("namespaces", _NAMESPACES, "digest")
        except (OSError, ValueError, RuntimeError) as error:
            raise HomeError(f"catalogue {folder} cannot be opened: {error}") from error

    def _open(self, name: str, schema: pa.Schema, key: str) -> Any:
        if name not in self._database.list_tables().tables:
            table: Any = self._database.create_table(name, schema=schema)
            table.set_unenforced_primary_key(key)
            return table
        table = self._database.open_table(name)
        if table.schema.names != schema.names:
            raise HomeError(f"catalogue table {name} has another format; use another home")
        return table

    @contextmanager
    def _table_access(self) -> Iterator[None]:
        """One caller at a time; LanceDB's errors become ours."""
        with self._lock:
            try:
                yield
            except (OSError, RuntimeError, ValueError) as error:
                raise StorageError(f"catalogue refused: {error}") from error

    def add(self, rows: Sequence[tuple[Node, Vectors]]) -> None:
        """Commit nodes in one LanceDB version; adding a node again replaces its row."""
        if not rows:
            return
        with self._table_access():
            table = pa.Table.from_pylist([_row(node, vectors) for node, vectors in rows], _schema())
            merge = self._nodes.merge_insert("id")
            merge.when_matched_update_all().when_not_matched_insert_all().execute(
                table,
                on_bad_vectors="null",  # an absent semantic vector counts as a bad one
            )

    def delete(self, ids: Iterable[str]) -> None:
        """Remove nodes; unknown ids are ignored."""
        quoted = ", ".join(f"'{_hex(node_id)}'" for node_id in ids)
        if quoted:
            with self._table_access():
                self._nodes.delete(f"id IN ({quoted})")

    def load(self) -> Iterator[tuple[Node, Vectors]]:
        """Every committed node, in the order of commits."""
        with self._table_access():
            for batch in self._nodes.search().limit(None).to_batches(_READ_ROWS):
                for row in batch.to_pylist():
                    yield _node(row)

    def count(self) -> int:
        """How many nodes are committed."""
        with self._table_access():
            return int(self._nodes.count_rows())

    def add_namespace(self, namespace: Namespace) -> None:
        """Remember what a digest stands for."""
        row = {
            "digest": namespace.digest,
            "namespace": msgspec.msgpack.encode(namespace),
        }
        with self._table_access():
            merge = self._namespaces.merge_insert("digest")
            merge.when_not_matched_insert_all().execute(pa.Table.from_pylist([row], _NAMESPACES))

    def namespaces(self) -> list[Namespace]:
        """Every namespace that was ever saved into."""
        with self._table_access():
            rows = self._namespaces.search().limit(None).to_list()
        return [msgspec.msgpack.decode(row["namespace"], type=Namespace) for row in rows]

    def clear(self) -> None:
        """Remove every node, from old versions too."""
        with self._table_access():
            self._nodes.delete("true")
            self._compact()

    def compact(self) -> None:
        """Merge small fragments and drop old versions. Only the owner of the home may call it."""
        with self._table_access():
            self._compact()

    def _compact(self) -> None:
        # zero would warn of other readers, and there are none: the home has one owner. A version
        # is kept unless it was that old when this began.
        time.sleep(0.002)
        self._nodes.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)


def _hex(node_id: str) -> str:
    """Ids go into SQL text, so nothing but hex digits may pass."""
    return f"{int(node_id, 16):0{len(node_id)}x}"


def _row(node: Node, vectors: Vectors) -> dict[str, Any]:
    return {
        "id": node.id,
        "namespace": node.namespace,
        "node": msgspec.msgpack.encode(node),
        "lexical": vectors.lexical,
        "semantic": vectors.semantic,
    }


def _node(row: dict[str, Any]) -> tuple[Node, Vectors]:
    try:
        node = msgspec.msgpack.decode(row["node"], type=Node)
    except msgspec.DecodeError as error:
        raise ValueError(f"node {row['id'][:12]} is unreadable: {error}") from error
    semantic = row["semantic"]
    return node, Vectors(
        np.asarray(row["lexical"], np.float32),
        None if semantic is None else np.asarray(semantic, np.float32),
    )
