"""One LanceDB table. A change is durable when it returns, and a table with damaged files still
opens.

LanceDB never calls fsync, and one file damaged by a power cut or a bad disk would make every start
and every commit fail. Here the contents of such a file are left out, and `take_lost` reports them.

A row's number (`_rowid`) consists of the number of its fragment and its place in there. Fragments
are written once and numbered upwards, so later commits have greater numbers.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvshare_store.blocks.tiers.disk import files
from kvshare_store.catalog.faults import Fault
from kvshare_store.catalog.lance import is_damage, lance_errors, newest_version
from kvshare_store.catalog.place import Place
from kvshare_store.catalog.sync import SyncedFolder
from kvshare_store.errors import HomeError, StorageError, TornTableError

RowIds = npt.NDArray[np.uint64]

_READ_ROWS = 1024
_READ_SLICE = 16 * _READ_ROWS
"""LanceDB reads ahead without a limit, so it is asked for so many rows at a time: about 120 MB for
prompts of 1,000 tokens."""
_READ_FIELDS = 1 << 16
"""Rows read at a time when only a few short columns are wanted."""
_FRAGMENT = 1 << 32
"""Row numbers of one fragment."""
_KEY = b"lance-schema:unenforced-primary-key:position"
"""A key in the metadata of the column that was declared to be the primary key."""
_MOST_FRAGMENTS = 1 << 30
_ASIDE = "torn"
_PAUSE_S = 0.05
_ALL_VERSIONS, _NO_VERSION = timedelta(days=36_500), timedelta(milliseconds=1)
_SHARED_VERSIONS = timedelta(hours=1)


class Fields(NamedTuple):
    """Columns that this release writes. A table may have others, and may lack nullable ones."""

    schema: pa.Schema
    key: str

    def missing(self, names: list[str]) -> list[str]:
        """Required columns that a table lacks."""
        return [at.name for at in self.schema if not at.nullable and at.name not in names]


class Table:
    """Not thread-safe: the `Catalog` holds its lock. Every method raises `StorageError`."""

    def __init__(self, place: Place, database: Any, name: str, fields: Fields) -> None:
        self._place = place
        self._database = database
        self._name = name
        self._fields = fields
        self._lost: list[Fault] = []
        self._folder = None
        if place.folder is not None:
            self._folder = place.folder / f"{name}.lance"
        self._synced = SyncedFolder(self._folder) if self._folder is not None else None
        self.bytes = self.data_bytes = 0
        """Bytes of all files of the table after the last change, and bytes of its data files; 0 in
        object storage."""
        for fragment in self._open():
            self._skip(fragment)
        self.sync()
        if place.folder is not None:
            files.sync_folder(str(place.folder))  # the table may be new

    # --- opening -----------------------------------------------------------------------------

    def _open(self) -> list[int]:
        """The newest version that can be read, or a new table where there is none; returns the
        numbers of its fragments that cannot be read."""
        failed: Path | None = None
        while True:
            try:
                with lance_errors():
                    self._handle = self._opened()
                return self._torn_fragments()
            except StorageError as error:
                newest = newest_version(self._folder) if self._folder is not None else None
                if newest is None or not self._is_damage(error):
                    raise
                if newest == failed:
                    self._set_aside(newest, error)
                else:  # another machine may have removed what was just being read
                    failed = newest
                    time.sleep(_PAUSE_S)

    def _is_damage(self, error: StorageError) -> bool:
        """Objects in object storage are complete or absent, never damaged."""
        return self._folder is not None and is_damage(error, shared=self._place.shared)

    def _opened(self) -> Any:
        fields = self._fields
        if self._name not in self._database.list_tables().tables:
            table = self._database.create_table(self._name, schema=fields.schema)
        else:
            table = self._database.open_table(self._name)
        missing = fields.missing(table.schema.names)
        if missing and table.schema.names:
            raise HomeError(
                f"catalogue table {self._name} of {self._place} has no {missing[0]}: it is of "
                "another format; use another home"
            )
        if missing:
            raise StorageError("its manifest names no columns")
        if _KEY not in (table.schema.field(fields.key).metadata or {}):  # its maker was killed here
            table.set_unenforced_primary_key(fields.key)
        return table

    def complete(self) -> None:
        """Add the columns that a table of an older release lacks. Another machine may be doing the
        same."""
        for field in self._fields.schema:
            if field.name in self._handle.schema.names:
                continue
            try:
                with lance_errors():
                    self._handle.add_columns(field)
            except StorageError:
                self.refresh()
                if field.name not in self._handle.schema.names:
                    raise
        self.sync()

    def _set_aside(self, newest: Path, error: StorageError) -> None:
        """Give up the newest version, so that the one before it counts. If no version is left, the
        table starts empty."""
        aside = newest.parents[0 if newest == self._folder else 2] / _ASIDE
        aside.mkdir(mode=0o700, exist_ok=True)
        os.replace(newest, aside / f"{self._name}.{newest.name}.{time.time_ns()}")
        text = f"its newest version cannot be read, the one before is used: {error}"
        self._lose(f"{self._name}/{newest.name}", text)

    def take_lost(self) -> list[Fault]:
        """Files that could not be read, since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def _lose(self, what: str, text: str) -> None:
        self._lost.append(Fault(what, TornTableError(text), repaired=True))

    # --- fragments that cannot be read -------------------------------------------------------

    def _torn_fragments(self) -> list[int]:
        """`StorageError` if the table cannot be read for any other reason."""
        try:
            self.row_ids()
        except StorageError as error:
            if not self._is_damage(error):
                raise
            self.row_ids(_between(_MOST_FRAGMENTS, _MOST_FRAGMENTS + 1))  # opens no fragment
            return list(self._search_torn(0, _MOST_FRAGMENTS))
        return []

    def _search_torn(self, first: int, end: int) -> Iterator[int]:
        """Bisect: LanceDB opens only those fragments that are in the range of row numbers."""
        try:
            self.row_ids(_between(first, end))
        except StorageError as error:
            if not self._is_damage(error):
                raise
            if end - first == 1:
                yield first
                return
            middle = (first + end) // 2
            yield from self._search_torn(first, middle)
            yield from self._search_torn(middle, end)

    def _skip(self, fragment: int) -> None:
        """Delete a fragment that LanceDB cannot open: while it is there, no commit succeeds."""
        rows = self.count()
        self.delete(_between(fragment, fragment + 1))
        text = f"a file cannot be read; {rows - self.count():,} rows were in it"
        self._lose(f"{self._name}/fragment {fragment}", text)

    # --- reading -----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of the version that is read."""
        return int(self._handle.version)

    def refresh(self) -> None:
        """Read the newest version from now on."""
        with lance_errors():
            self._handle.checkout_latest()

    def old_versions(self) -> int:
        """How many versions `compact` would drop: all but the newest; of a shared table only those
        older than an hour."""
        with lance_errors():
            *old, _ = self._handle.list_versions()
        if not self._place.shared:
            return len(old)
        latest = time.time() - _SHARED_VERSIONS.total_seconds()
        return sum(version["timestamp"].timestamp() < latest for version in old)

    def count(self) -> int:
        """How many rows there are."""
        with lance_errors():
            return int(self._handle.count_rows())

    def row_ids(self, where: str = "") -> RowIds:
        """The numbers of the rows, ascending. Reads one short column: without any column LanceDB
        would read all of them."""
        with lance_errors():
            query = self._handle.search().select([self._fields.key]).with_row_id(True).limit(None)
            found = (query.where(where) if where else query).to_arrow()
        numbers: RowIds = found.column("_rowid").to_numpy().astype(np.uint64)
        numbers.sort()
        return numbers

    def rows(self, where: str = "", columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Rows in the order of commits, with `_rowid`: of `columns`, else of all that are known."""
        known = self._handle.schema.names
        chosen = columns or [at.name for at in self._fields.schema if at.name in known]
        with lance_errors():
            query = self._handle.search().select(list(chosen)).with_row_id(True).limit(None)
            if where or columns:
                at_once = _READ_FIELDS if columns else _READ_ROWS
                yield from (query.where(where) if where else query).to_batches(at_once)
                return
            for first in range(0, self._handle.count_rows(), _READ_SLICE):
                yield from query.limit(_READ_SLICE).offset(first).to_batches(_READ_ROWS)

    def salvage(self) -> Iterator[pa.RecordBatch]:
        """All rows that can be read. The others are deleted and reported by `take_lost`."""
        done: dict[int, int] = {}
        """By fragment, the number after the last row that was read."""
        try:
            for batch in self.rows():
                for number in np.asarray(batch.column("_rowid").to_numpy())[-1:].tolist():
                    done[number // _FRAGMENT] = number + 1
                yield batch
            return
        except StorageError as error:
            if not self._is_damage(error):
                raise
        torn: list[str] = []
        for fragment, end in self._fragments():
            yield from self._salvage(done.get(fragment, fragment * _FRAGMENT), end, torn)
        for where in torn:
            self.delete(where)

    def _fragments(self) -> Iterator[tuple[int, int]]:
        """The number of each fragment, and the number after its last row."""
        numbers = self.row_ids()
        fragments, counts = np.unique(numbers // np.uint64(_FRAGMENT), return_counts=True)
        for fragment, last in zip(fragments, numbers[np.cumsum(counts) - 1], strict=True):
            yield int(fragment), int(last) + 1

    def _salvage(self, at: int, end: int, torn: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of one fragment. After a page that cannot be read the next ones may be
        intact."""
        skipped = 0
        while at < end:
            try:
                for batch in self.rows(f"_rowid >= {at} AND _rowid < {end}"):
                    if batch.num_rows:
                        at, skipped = int(pc.max(batch.column("_rowid")).as_py()) + 1, 0
                        yield batch
                return
            except StorageError as error:
                if not self._is_damage(error):
                    raise
                skipped = min(end - at, max(_READ_ROWS, 2 * skipped))
                self._lose(f"{self._name}/row {at}", f"up to {skipped:,} rows: {error}")
                torn.append(f"_rowid >= {at} AND _rowid < {at + skipped}")
                at += skipped

    # --- changing ----------------------------------------------------------------------------

    def merge(
        self, rows: Sequence[Mapping[str, Any]], *, replace: bool | str, insert: bool = True
    ) -> tuple[int, int]:
        """Commit rows in one version; returns how many were inserted and how many replaced.

        `replace`: rows replace those with the same key, always or where the SQL condition on
        `target` and `source` holds; otherwise existing rows stay. Without `insert`, rows with new
        keys are ignored. Columns that this release does not know keep their values.
        """
        names = self._handle.schema.names
        schema = pa.schema([field for field in self._fields.schema if field.name in names])
        with lance_errors():
            table = pa.Table.from_pylist(list(rows), schema)
            merge = self._handle.merge_insert(self._fields.key)
            if replace:
                where = replace if isinstance(replace, str) else None
                merge = merge.when_matched_update_all(where=where)
            if insert:
                merge = merge.when_not_matched_insert_all()
            # an absent text vector counts as a bad one
            done = merge.execute(table, on_bad_vectors="null")
        self.sync()
        return int(done.num_inserted_rows), int(done.num_updated_rows)

    def update(self, where: str, **values: Any) -> int:
        """Set columns of rows; returns how many."""
        with lance_errors():
            done = self._handle.update(where=where, values=values)
        self.sync()
        return int(done.rows_updated)

    def delete_numbers(self, numbers: Sequence[int]) -> None:
        """Remove rows by their numbers."""
        if numbers:
            self.delete(f"_rowid IN ({', '.join(map(str, numbers))})")

    def delete(self, where: str) -> int:
        """Remove rows; returns how many. Their bytes stay in files until `erase` or `compact`."""
        with lance_errors():
            done = self._handle.delete(where)
        self.sync()
        return int(done.num_deleted_rows)

    def erase(self, where: str) -> None:
        """Remove rows and every byte of them.

        Deleting only marks rows, and LanceDB never rewrites a file with few marks. So the remaining
        rows of the affected files are written to new files, and the old files are deleted.
        """
        held = np.unique(self.row_ids(where) // np.uint64(_FRAGMENT))
        self.delete(where)
        runs = np.split(held, np.flatnonzero(np.diff(held) > 1) + 1)
        ranges = [_between(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        self.rewrite(" OR ".join(f"({at})" for at in ranges))

    def rewrite(self, where: str = "true") -> None:
        """Write the rows that `where` selects to new files, then delete the old files. With an
        empty `where`, only delete files."""
        if where:
            key = self._fields.key
            with lance_errors():
                self._handle.update(where=where, values_sql={key: key})
        self.drop_versions()

    def compact(self) -> None:
        """Merge small fragments and drop old versions.

        Other machines may be reading an old version of a shared table, or writing the next: there
        versions stay for an hour. If two machines compact at once, LanceDB lets one of them win.
        """
        if self._place.shared:
            with lance_errors():
                self._handle.optimize(cleanup_older_than=_SHARED_VERSIONS)
            self.sync()
        else:
            self.drop_versions()

    def drop_versions(self) -> None:
        """Drop all versions but the newest, and files that belong to no version. In a shared table
        those files may belong to a version that another machine is writing: they stay."""
        with lance_errors():
            self._handle.optimize(cleanup_older_than=_ALL_VERSIONS)
        self._fsync()  # or a power cut could find neither the new files nor the old ones
        # zero would warn of other readers, and those of a shared table ask again. A version
        # is kept unless it was that old when this began.
        time.sleep(0.002)
        with lance_errors():
            self._handle.optimize(
                cleanup_older_than=_NO_VERSION, delete_unverified=not self._place.shared
            )
        self._remove_aside()
        self.sync()

    def _remove_aside(self) -> None:
        if self._folder is not None:
            for path in (self._folder.parent / _ASIDE).glob(f"{self._name}.*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # --- on disk -----------------------------------------------------------------------------

    def sync(self) -> None:
        """Return once all that was committed is durable."""
        self._fsync()
        if self._synced is not None:
            self.bytes, self.data_bytes = self._synced.bytes(), self._synced.bytes("data")

    def _fsync(self) -> None:
        if self._synced is not None:
            with lance_errors():
                self._synced.sync()


def _between(first: int, end: int) -> str:
    """Rows of the fragments `first … end-1`."""
    return f"_rowid >= {first * _FRAGMENT} AND _rowid < {end * _FRAGMENT}"
