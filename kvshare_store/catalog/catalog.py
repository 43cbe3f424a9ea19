"""The durable copy of the tree, in LanceDB tables. Every call of LanceDB is in
`catalog/table_reader.py` and `catalog/table.py`.

A row is written only after all blocks that it names are durable, and each batch of rows is one
commit. What a method commits is durable when it returns. Rows are verified when they are read: a
bad one becomes a `Fault` and is left out.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvshare_store.bounded import pieces
from kvshare_store.catalog.batches import namespace_rows, node_rows, numbers, texts
from kvshare_store.catalog.faults import Fault, Faults
from kvshare_store.catalog.lance import hex_only, lance_errors, quoted
from kvshare_store.catalog.ledger import MARKED, Fact, Ledger, within
from kvshare_store.catalog.place import Place
from kvshare_store.catalog.records import NAMESPACES, NamespaceRecords
from kvshare_store.catalog.rows import Rows
from kvshare_store.catalog.table import Table
from kvshare_store.catalog.table_reader import Fields
from kvshare_store.errors import (
    HomeError,
    KVShareError,
    MissError,
    NewerRowError,
    NoSpaceError,
    StorageError,
)
from kvshare_store.keys import Keyring
from kvshare_store.nodes.node import Node, saw_stamps
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS, Vectors

T = TypeVar("T")

_ATTEMPTS = 4
_IDS = 512
"""Most ids that one condition names."""
_VECTOR = pa.list_(pa.float32(), VECTOR_DIMENSIONS)
_NODES = Fields(
    pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("namespace", pa.string(), nullable=False),
            pa.field("node", pa.binary(), nullable=False),
            pa.field("lexical", _VECTOR),
            pa.field("semantic", _VECTOR),
        ]
    ),
    "id",
)
_STAMPED = Fields(_NODES.schema.append(pa.field("stamp", pa.int64())), "id")
"""Where several machines write, each row has a column with the stamp of its node. Whoever replaces
or removes a row says which stamp is meant."""


class Catalog:
    """Rows of nodes and namespaces. Thread-safe: one handle under one lock.

    With `keys`, the contents of nodes and namespaces are encrypted, and vectors are not stored in
    clear; docs/design/encryption.md lists what is.

    LanceDB's concurrent `merge_insert` silently duplicates rows if the key is nullable or not
    declared, so the keys are non-nullable and declared.
    """

    def __init__(self, folder: Path | str, keys: Keyring | None = None) -> None:
        """`folder`: a `Path` for a catalogue of one home; text (a folder or `s3://bucket/prefix`)
        for one that several machines write to. `HomeError` if it cannot be opened."""
        self._lock = threading.Lock()
        self._rows = Rows(keys)
        self._ours: dict[str, int | None] = {}
        self._faults = Faults()
        self.place = Place(folder)
        try:
            with lance_errors():
                database = self.place.connect()
            fields = _STAMPED if self.place.shared else _NODES
            self._nodes = Table(self.place, database, "nodes", fields)
            self._nodes.complete()
            table = self._namespaces = Table(self.place, database, "namespaces", NAMESPACES)
            self.records = NamespaceRecords(table, self._rows, self._lock, self._faults)
            self.facts = Ledger(self.place, database, "facts", create=self.place.shared)
            self.uses = Ledger(self.place, database, "uses", create=self.place.shared)
            self._ledgers = {"facts": self.facts, "uses": self.uses}
        except (OSError, NoSpaceError) as error:
            if isinstance(error, HomeError):
                raise
            raise HomeError(f"catalogue {self.place} cannot be opened: {error}") from error

    # --- what is wrong -----------------------------------------------------------------------

    def take_faults(self) -> list[Fault]:
        """What was found to be wrong since the last call, by opening and by reading."""
        with self._lock:
            lost = [*self._namespaces.take_lost(), *self._nodes.take_lost()]
            return self._faults.take() + lost

    def verify(self, *, repair: bool) -> list[Fault]:
        """Read every row again and say what is wrong with it.

        `repair`: bad rows are removed; those that a newer release understands stay.
        """
        with self._lock:
            found: list[Fault] = []
            for table, rows_of, read in (
                (self._namespaces, namespace_rows, self._rows.namespace),
                (self._nodes, node_rows, self._rows.node),
            ):
                bad: list[int] = []
                for batch in table.salvage():
                    for row, number in zip(rows_of(batch), numbers(batch), strict=True):
                        error = _error_of(read, row)
                        if error is not None:
                            removed = repair and not isinstance(error, NewerRowError)
                            found.append(Fault(str(row[0]), error, removed))
                            bad += [int(number)] * removed
                table.delete_numbers(bad)
                found += table.take_lost()
            return found

    # --- nodes -------------------------------------------------------------------------------

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
        with self._lock:
            packed = [self._rows.node_row(*row) for row in rows]
            return self._nodes.merge(packed, replace=not self.place.shared)[0]

    def replace(self, node: Node, vectors: Vectors, expected: int) -> bool:
        """Replace a node's row, but only if it still has the stamp `expected`. False if it has
        another stamp by now, or no row is left."""
        known = f"target.stamp = {int(expected)}"
        where: bool | str = known if expected else f"{known} OR target.stamp IS NULL"
        if not self.place.shared:
            where = True  # nobody else writes here

        def change() -> int:
            with self._lock:
                row = self._rows.node_row(node, vectors)
                return self._nodes.merge([row], replace=where, insert=False)[1]

        replaced = bool(self._commit(change))
        if replaced:
            self._note({node.id: node.stamp})
        return replaced

    def delete(self, ids: Iterable[str], stamps: Collection[int] = ()) -> None:
        """Remove nodes; unknown ids are ignored. With `stamps`, rows of a shared catalogue are
        removed only if they have one of these stamps: what another machine has replaced meanwhile
        stays."""
        gone = list(ids)
        if not gone:
            return
        where = f"id IN ({quoted(gone)})"
        if stamps and self.place.shared:
            numbers_ = ", ".join(str(int(stamp)) for stamp in stamps)
            unstamped = " OR stamp IS NULL" if 0 in stamps else ""
            where += f" AND (stamp IN ({numbers_}){unstamped})"
        if self._commit(lambda: self._delete(where)) == len(gone):
            self._note(dict.fromkeys(gone))

    def _delete(self, where: str) -> int:
        with self._lock:
            return self._nodes.delete(where)

    def _commit(self, change: Callable[[], T]) -> T:
        """When two machines change a shared table at the same time, LanceDB refuses one of the
        commits: it is tried again."""
        for attempt in range(_ATTEMPTS if self.place.shared else 1):
            if attempt:
                time.sleep(random.uniform(0, 0.05 * 2**attempt))
                self.refresh()
            try:
                return change()
            except StorageError as error:
                failed = error
        raise failed

    def _note(self, changes: Mapping[str, int | None]) -> None:
        if self.place.shared:
            with self._lock:
                self._ours |= changes

    def take_changes(self) -> dict[str, int | None]:
        """What was committed to a shared catalogue through this handle since the last call: the
        stamps of rows by id, None for a row that was removed."""
        with self._lock:
            ours, self._ours = self._ours, {}
            return ours

    def stamps(self, since: int = 0, ids: Collection[str] | None = None) -> dict[str, int]:
        """Stamps of rows by id: of all rows, of those stamped at `since` or later, or of `ids`. In
        a catalogue that is not shared every stamp is 0."""
        columns, where = ["id"], ""
        if ids is not None:
            where = f"id IN ({quoted(ids)})" if ids else "false"
        if self.place.shared:
            columns.append("stamp")
            where = where or (f"stamp >= {int(since)}" if since else "")
        found: dict[str, int] = {}
        with self._lock:
            for batch in self._nodes.rows(where, columns):
                seen = batch.column("stamp").to_pylist() if "stamp" in columns else None
                for at, node_id in enumerate(texts(batch, "id")):
                    found[node_id] = (seen[at] or 0) if seen is not None else 0
        saw_stamps(found.values())
        return found

    def all_stamps(self) -> npt.NDArray[np.int64]:
        """The stamps of all rows of a shared catalogue, in no order; 0 of a row that has none."""
        with self._lock:
            batches = self._nodes.rows(columns=["stamp"])
            found = [batch.column("stamp").fill_null(0).to_numpy() for batch in batches]
        return np.concatenate([np.empty(0, np.int64), *found])

    def refresh(self) -> int:
        """See what others have committed; returns the version of the node table."""
        with self._lock:
            self._nodes.refresh()
            self._namespaces.refresh()  # later: whoever commits a node has committed its namespace
            return self._nodes.version

    def load(
        self, namespace: str | None = None, ids: Collection[str] | None = None
    ) -> Iterator[tuple[Node, Vectors]]:
        """Every committed node (of a namespace, or with one of `ids`), in the order of commits.

        Rows that are bad, or of a namespace whose record has not been read, are left out.
        """
        for batch in self.load_batches(namespace, ids):
            yield from batch

    def load_batches(
        self, namespace: str | None = None, ids: Collection[str] | None = None
    ) -> Iterator[list[tuple[Node, Vectors]]]:
        """As `load`, many at a time."""
        where = [f"namespace = '{hex_only(namespace)}'"] if namespace is not None else []
        where += [f"id IN ({quoted(ids)})"] if ids is not None else []
        with self._lock:
            batches = self._nodes.rows(" AND ".join(where)) if where else self._nodes.salvage()
            for batch in batches:
                found = []
                for row in node_rows(batch):
                    try:
                        found.append(self._rows.node(row))
                    except MissError as error:
                        self._faults.add(row.id, error)
                saw_stamps(node.stamp for node, _ in found)
                yield found

    def count(self) -> int:
        """How many nodes are committed."""
        with self._lock:
            return self._nodes.count()

    def ids(self) -> list[tuple[str, str]]:
        """Id and namespace of every committed row, as the table has them, repetitions included."""
        with self._lock:
            batches = list(self._nodes.rows(columns=["id", "namespace"]))
        return [
            pair
            for batch in batches
            for pair in zip(texts(batch, "id"), texts(batch, "namespace"), strict=True)
        ]

    # --- versions ----------------------------------------------------------------------------

    def old_versions(self) -> dict[str, int]:
        """How many versions of each table `compact` would drop."""
        with self._lock:
            if self.place.shared:
                self._namespaces.refresh()
            found = {
                "nodes": self._nodes.old_versions(),
                "namespaces": self._namespaces.old_versions(),
            }
        return found | {name: ledger.old_versions() for name, ledger in self._ledgers.items()}

    def compact(self, tables: Collection[str] | None = None) -> None:
        """Merge small fragments and drop old versions, of all tables or of some. Only the owner of
        the home may call it."""
        if self.place.shared:
            self.refresh()
        for name, ledger in self._ledgers.items():
            if tables is None or name in tables:
                ledger.compact()
        with self._lock:
            if tables is None or "nodes" in tables:
                self._nodes.compact()
            if (tables is None or "namespaces" in tables) and self._namespaces.old_versions():
                if self.place.shared:
                    self._namespaces.compact()
                else:
                    self._namespaces.rewrite()  # a file may hold the salt of what was purged

    @property
    def bytes(self) -> int:
        """Bytes of all files of a catalogue in a folder."""
        return sum(table.bytes for table in self._tables)

    @property
    def data_bytes(self) -> int:
        """How many of these bytes compaction may have to write again before it can delete
        anything."""
        return sum(table.data_bytes for table in self._tables)

    @property
    def _tables(self) -> tuple[Table | Ledger, ...]:
        return self._nodes, self._namespaces, self.facts, self.uses

    # --- namespaces --------------------------------------------------------------------------

    def store_id(self) -> str:
        """The id of the store, the same on every machine that shares the catalogue."""
        self.facts.create([Fact("store", time.time(), state=uuid.uuid4().hex)])
        return self.facts.facts("key = 'store'")[0].state

    @property
    def had_remote(self) -> bool:
        """Whether the store has ever been opened with a remote: then it has an id."""
        return bool(self.facts.facts("key = 'store'"))

    def purge(self, namespace: str) -> float:
        """Remove every row of a namespace, its record and its salt, from old versions too. Returns
        0, or for how many seconds old versions stay because another machine's clock is ahead.

        Commits wait meanwhile; lookups do not. It takes as long as writing the files again that
        hold rows of the namespace (docs/design/tree.md). Claims on blocks of a shared remote stay
        until whoever removes those blocks is done: saves wait for that.
        """
        digest = hex_only(namespace)
        with self._lock:
            ahead = self._nodes.erase(f"namespace = '{digest}'")
            ahead = max(ahead, self._namespaces.erase(f"digest = '{digest}'"))
        self.facts.erase(f"key LIKE 'block/{digest}/%' AND state = '{MARKED}'")
        self.uses.erase(f"by = '{digest}'")
        self._rows.forget(namespace)
        return ahead

    def forget_uses(self, namespace: str, keep: Collection[str]) -> None:
        """Remove what was written down of uses of a namespace's nodes, except those to `keep`, from
        old versions too. A machine may have written it before it had heard of a purge."""
        facts = self.uses.facts(f"by = '{hex_only(namespace)}'")
        for some in pieces([fact.key for fact in facts if fact.key not in keep], _IDS):
            self.uses.erase(within("key", some))

    def drop_unreadable(self, namespace: str) -> None:
        """Remove rows of a namespace that cannot be decrypted with the key of its record. A machine
        committed them with the old key before it had heard of the purge that destroyed that key."""
        if not self.records.read(namespace):
            return
        with self._lock:
            batches = list(self._nodes.rows(f"namespace = '{hex_only(namespace)}'"))
            rows = [row for batch in batches for row in node_rows(batch)]
            errors = [_error_of(self._rows.node, row) for row in rows]
        self.delete(
            row.id
            for row, error in zip(rows, errors, strict=True)
            if error is not None and not isinstance(error, NewerRowError)
        )


def _error_of(read: Callable[[Any], object], row: Any) -> KVShareError | None:
    try:
        read(row)
    except MissError as error:
        return error
    return None
