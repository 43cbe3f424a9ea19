"""The durable copy of the tree: LanceDB tables. Every LanceDB call is in this module.

A row is written only after all blocks it names are durable, in one commit a batch.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from kvshare_store.errors import HomeError, StorageError
from kvshare_store.keys import Keyring
from kvshare_store.namespace import Namespace
from kvshare_store.tree.ledger import Fact, Ledger
from kvshare_store.tree.node import Node
from kvshare_store.tree.place import Place
from kvshare_store.tree.rows import Rows, Vectors

__all__ = ["VECTOR_DIMENSIONS", "Catalog", "Vectors"]

T = TypeVar("T")

VECTOR_DIMENSIONS = 384
_READ_ROWS = 4096
_ATTEMPTS = 4
_KEY = b"lance-schema:unenforced-primary-key:position"
"""In the metadata of the field that was declared to be the key."""
_SHARED_VERSIONS = timedelta(hours=1)


_STAMP = pa.field("stamp", pa.int64())


def _schema() -> pa.Schema:
    vector = pa.list_(pa.float32(), VECTOR_DIMENSIONS)
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("namespace", pa.string(), nullable=False),
            pa.field("node", pa.binary(), nullable=False),
            pa.field("lexical", vector),
            pa.field("semantic", vector),
            _STAMP,
        ]
    )


_NAMESPACES = pa.schema(
    [
        pa.field("digest", pa.string(), nullable=False),
        pa.field("namespace", pa.binary(), nullable=False),
        pa.field("salt", pa.binary()),
    ]
)


class Catalog:
    """Rows of nodes and namespaces. Thread-safe: one handle under one lock.

    With `keys`, what a node or a namespace is is sealed, and there are no vectors beside it;
    docs/design/encryption.md says what is left in clear.

    Concurrent `merge_insert` on a nullable or undeclared key duplicates rows silently, so the keys
    are non-nullable and declared.
    """

    def __init__(self, folder: Path | str, keys: Keyring | None = None) -> None:
        """`folder`: a path for a catalogue of one home; text, a folder's or `s3://bucket/prefix`,
        for one that several machines write to."""
        self._lock = threading.Lock()
        self._rows = Rows(keys)
        self._ours: dict[str, int | None] = {}
        self.place = Place(folder)
        try:
            self._database = self.place.connect()
            self._nodes = self._open("nodes", _schema(), "id")
            self._namespaces = self._open("namespaces", _NAMESPACES, "digest")
            self.facts = Ledger(self._database, "facts", create=self.place.shared)
            self.uses = Ledger(self._database, "uses", create=self.place.shared)
        except (OSError, ValueError, RuntimeError) as error:
            raise HomeError(f"catalogue {self.place} cannot be opened: {error}") from error

    def _open(self, name: str, schema: pa.Schema, key: str) -> Any:
        if name in self._database.list_tables().tables:
            table: Any = self._database.open_table(name)
        else:
            table = self._database.create_table(name, schema=schema)
        if name == "nodes" and _STAMP.name not in table.schema.names:  # of the release before
            _add_column(table, _STAMP)
        if table.schema.names != schema.names:
            raise HomeError(f"catalogue table {name} has another format; use another home")
        if _KEY not in (table.schema.field(key).metadata or {}):  # or its maker was killed here
            table.set_unenforced_primary_key(key)
        return table

    @contextmanager
    def _table_access(self) -> Iterator[None]:
        """One caller at a time; LanceDB's errors become ours."""
        with self._lock:
            try:
                yield
            except (OSError, RuntimeError, ValueError) as error:
                raise StorageError(f"catalogue refused: {error}") from error

    def add(self, rows: Sequence[tuple[Node, Vectors]]) -> set[str]:
        """Commit nodes in one LanceDB version; adding a node again replaces its row.

        In a shared catalogue the first row of a node stays: another machine serves from its blocks.
        Returns the ids of the nodes that stay as they were there.
        """
        if not rows:
            return set()
        inserted = self._commit(lambda: self._add(rows))
        ours = {node.id: node.stamp for node, _ in rows}
        theirs = self.stamps(ids=ours) if self.place.shared and inserted < len(rows) else {}
        known = {node_id for node_id, stamp in theirs.items() if stamp != ours[node_id]}
        self._note({node_id: stamp for node_id, stamp in ours.items() if node_id not in known})
        return known

    def _add(self, rows: Sequence[tuple[Node, Vectors]]) -> int:
        merge = self._nodes.merge_insert("id").when_not_matched_insert_all()
        if not self.place.shared:
            merge = merge.when_matched_update_all()
        return int(self._merged(merge, rows).num_inserted_rows)

    def _merged(self, merge: Any, rows: Sequence[tuple[Node, Vectors]]) -> Any:
        with self._table_access():
            table = pa.Table.from_pylist([self._rows.node_row(*row) for row in rows], _schema())
            # an absent semantic vector counts as a bad one
            return merge.execute(table, on_bad_vectors="null")

    def replace(self, node: Node, vectors: Vectors, expected: int) -> bool:
        """Give a node another row, in the place of the one that has the stamp `expected`. False if
        the node's row has another stamp by now, or none is there."""
        known = f"target.stamp = {int(expected)}"
        where = known if expected else f"{known} OR target.stamp IS NULL"

        def change() -> int:
            merge = self._nodes.merge_insert("id").when_matched_update_all(where=where)
            return int(self._merged(merge, [(node, vectors)]).num_updated_rows)

        replaced = bool(self._commit(change))
        if replaced:
            self._note({node.id: node.stamp})
        return replaced

    def delete(self, ids: Iterable[str], stamps: Collection[int] = ()) -> None:
        """Remove nodes; unknown ids are ignored. With `stamps`, only rows that have one of these:
        a row that another machine has replaced meanwhile stays."""
        gone = list(ids)
        if gone:
            where = f"id IN ({_quoted(gone)})"
            if stamps:
                numbers = ", ".join(str(int(stamp)) for stamp in stamps)
                unstamped = " OR stamp IS NULL" if 0 in stamps else ""
                where += f" AND (stamp IN ({numbers}){unstamped})"
            if self._commit(lambda: self._delete(where)) == len(gone):
                self._note(dict.fromkeys(gone))

    def _delete(self, where: str) -> int:
        with self._table_access():
            return int(self._nodes.delete(where).num_deleted_rows)

    def _note(self, changes: Mapping[str, int | None]) -> None:
        if self.place.shared:
            with self._lock:
                self._ours |= changes

    def take_changes(self) -> dict[str, int | None]:
        """What was committed to a shared catalogue through this handle since the last call: stamps
        of rows by id, None for one that was removed."""
        with self._lock:
            ours, self._ours = self._ours, {}
            return ours

    def stamps(self, since: int = 0, ids: Collection[str] | None = None) -> dict[str, int]:
        """Stamps of the rows by id: of all, of those stamped at `since` or later, or of `ids`."""
        with self._table_access():
            query = self._nodes.search().select(["id", "stamp"]).limit(None)
            if ids is not None:
                query = query.where(f"id IN ({_quoted(ids)})")
            elif since:
                query = query.where(f"stamp >= {int(since)}")
            table = query.to_arrow()
        found = zip(table["id"].to_pylist(), table["stamp"].to_pylist(), strict=True)
        return {node_id: stamp or 0 for node_id, stamp in found}

    def _commit(self, change: Callable[[], T]) -> T:
        """Of two machines that change a shared table at once LanceDB tells one to try again."""
        for attempt in range(_ATTEMPTS if self.place.shared else 1):
            if attempt:
                time.sleep(random.uniform(0, 0.05 * 2**attempt))
                self.refresh()
            try:
                return change()
            except StorageError as error:
                failed = error
        raise failed

    def refresh(self) -> int:
        """See what others have committed; returns the version of the node table."""
        with self._table_access():
            self._namespaces.checkout_latest()
            self._nodes.checkout_latest()
            return int(self._nodes.version)

    def load(
        self, namespace: str | None = None, ids: Collection[str] | None = None
    ) -> Iterator[tuple[Node, Vectors]]:
        """Every committed node (of a namespace, or with one of `ids`), in the order of commits.

        Sealed nodes of a namespace whose key is not known are left out: `namespaces` learns keys.
        """
        with self._table_access():
            query = self._nodes.search().limit(None)
            if namespace is not None:
                query = query.where(f"namespace = '{_hex(namespace)}'")
            if ids is not None:
                query = query.where(f"id IN ({_quoted(ids)})")
            for batch in query.to_batches(_READ_ROWS):
                for row in batch.to_pylist():
                    if self._rows.readable(row):
                        yield self._rows.node(row)

    def count(self) -> int:
        """How many nodes are committed."""
        with self._table_access():
            return int(self._nodes.count_rows())

    def ids(self) -> list[tuple[str, str]]:
        """Id and namespace of every committed row, as the table has them, repetitions included."""
        with self._table_access():
            table = self._nodes.search().select(["id", "namespace"]).limit(None).to_arrow()
        return list(zip(*(table[name].to_pylist() for name in ("id", "namespace")), strict=True))

    def versions(self) -> int:
        """How many versions of the tables there are, the current one (of both) included."""
        with self._table_access():
            namespaces = 1 if self.place.shared else len(self._namespaces.list_versions())
            return len(self._nodes.list_versions()) + namespaces - 1

    def store_id(self) -> str:
        """Names the store whose nodes these are, on every machine that shares the catalogue."""
        self.facts.create([Fact("store", time.time(), state=uuid.uuid4().hex)])
        return self.facts.facts("key = 'store'")[0].state

    def digests(self) -> set[str]:
        """Every namespace that was ever saved into, by its digest."""
        with self._table_access():
            table = self._namespaces.search().select(["digest"]).limit(None).to_arrow()
        return set(table["digest"].to_pylist())

    def add_namespace(self, namespace: Namespace) -> None:
        """Remember what a digest stands for, and the salt of its key."""
        row = self._rows.namespace_row(namespace)
        with self._table_access():
            merge = self._namespaces.merge_insert("digest")
            merge.when_not_matched_insert_all().execute(pa.Table.from_pylist([row], _NAMESPACES))
        self.namespaces(namespace.digest)  # another writer may have been first: one salt counts

    def namespaces(self, digest: str | None = None) -> list[Namespace]:
        """Every namespace that was ever saved into, or the one of a digest; its key is known then.

        `ConfigError` if they were sealed with another key than ours, or with none.
        """
        with self._table_access():
            query = self._namespaces.search().limit(None)
            rows = (query.where(f"digest = '{_hex(digest)}'") if digest else query).to_list()
        return [self._rows.namespace(row) for row in rows]

    def purge(self, namespace: str) -> None:
        """Remove every row of a namespace, its record and its salt, from old versions too."""
        digest = _hex(namespace)
        with self._table_access():
            for table, column in ((self._nodes, "namespace"), (self._namespaces, "digest")):
                table.delete(f"{column} = '{digest}'")
                self._rewrite(table, column)
        self.facts.erase(f"key LIKE 'block/{digest}/%'")
        self.uses.erase(f"by = '{digest}'")
        self._rows.forget(namespace)

    def forget_key(self, namespace: str) -> None:
        """The key of a namespace that another machine has purged; that of a new record is known
        from the next `namespaces`."""
        self._rows.forget(namespace)

    def clear(self) -> None:
        """Remove every node, from old versions too."""
        with self._table_access():
            self._nodes.delete("true")
            self._drop_versions(self._nodes)

    def compact(self) -> None:
        """Merge small fragments and drop old versions. Only the owner of the home may call it.

        Others may be reading a version of a shared catalogue, or writing the next: there versions
        stay for an hour, and of two that compact at once LanceDB lets one have its way.
        """
        if self.place.shared:
            self.refresh()
        with self._table_access():
            if self.place.shared:
                self._nodes.optimize(cleanup_older_than=_SHARED_VERSIONS)
                for ledger in (self.facts, self.uses):
                    ledger.compact(_SHARED_VERSIONS)
            else:
                self._drop_versions(self._nodes)
                if len(self._namespaces.list_versions()) > 1:  # one may hold a purged salt
                    self._rewrite(self._namespaces, "digest")

    def _rewrite(self, table: Any, column: str) -> None:
        """Deleting only marks rows, and a file with few marks is never written again: what stays is
        rewritten here, so that the files with what was deleted can go."""
        table.update(where="true", values_sql={column: column})
        self._drop_versions(table)

    def _drop_versions(self, table: Any) -> None:
        """All but the present one, and files that belong to none. Other machines may be writing
        files that belong to none yet: those are left alone."""
        # zero would warn of other readers, and those of a shared table ask again. A version
        # is kept unless it was that old when this began.
        time.sleep(0.002)
        table.optimize(
            cleanup_older_than=timedelta(milliseconds=1), delete_unverified=not self.place.shared
        )


def _add_column(table: Any, column: pa.Field) -> None:
    """Add an empty column; another machine may be doing it as well."""
    try:
        table.add_columns(column)
    except (OSError, RuntimeError, ValueError):
        table.checkout_latest()
        if column.name not in table.schema.names:
            raise


def _quoted(ids: Iterable[str]) -> str:
    return ", ".join(f"'{_hex(node_id)}'" for node_id in ids)


def _hex(node_id: str) -> str:
    """Ids go into SQL text, so nothing but hex digits may pass."""
    return f"{int(node_id, 16):0{len(node_id)}x}"
