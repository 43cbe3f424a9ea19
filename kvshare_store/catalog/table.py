"""One LanceDB table that can be changed: a change is durable when it returns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvshare_store.blocks.tiers.disk import files
from kvshare_store.catalog.lance import lance_errors, manifests
from kvshare_store.catalog.place import Place
from kvshare_store.catalog.sync import SyncedFolder
from kvshare_store.catalog.table_reader import ASIDE, FRAGMENT, Fields, TableReader, between
from kvshare_store.errors import StorageError

_ALL_VERSIONS, _NO_VERSION = timedelta(days=36_500), timedelta(milliseconds=1)
_SHARED_VERSIONS = timedelta(hours=1)
_TRIES, _TRY_S = 100, 0.002
_AHEAD_S = _TRIES * _TRY_S
"""A version that is further ahead of the clock is not waited for."""


class Table(TableReader):
    """Not thread-safe: the `Catalog` holds its lock. Every method raises `StorageError`."""

    def __init__(self, place: Place, database: Any, name: str, fields: Fields) -> None:
        super().__init__(place, database, name, fields)
        self._synced = SyncedFolder(self._folder) if self._folder is not None else None
        self.bytes = self.data_bytes = 0
        """Bytes of all files of the table after the last change, and bytes of its data files; 0 in
        object storage."""
        for fragment in self.torn:
            self._skip(fragment)
        self.sync()
        if place.folder is not None:
            files.sync_folder(str(place.folder))  # the table may be new

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

    # --- fragments that cannot be read -------------------------------------------------------

    def _skip(self, fragment: int) -> None:
        """Delete a fragment that LanceDB cannot open: while it is there, no commit succeeds."""
        rows = self.count()
        self.delete(between(fragment, fragment + 1))
        text = f"a file cannot be read; {rows - self.count():,} rows were in it"
        self.lose(f"{self._name}/fragment {fragment}", text)

    def salvage(self) -> Iterator[pa.RecordBatch]:
        """All rows that can be read. The others are deleted and reported by `take_lost`."""
        done: dict[int, int] = {}
        """By fragment, the number after the last row that was read."""
        try:
            for batch in self.rows():
                for number in np.asarray(batch.column("_rowid").to_numpy())[-1:].tolist():
                    done[number // FRAGMENT] = number + 1
                yield batch
            return
        except StorageError as error:
            if not self.is_damage(error):
                raise
        torn: list[str] = []
        for fragment, end in self._fragments():
            yield from self._salvage(done.get(fragment, fragment * FRAGMENT), end, torn)
        for where in torn:
            self.delete(where)

    def _fragments(self) -> Iterator[tuple[int, int]]:
        """The number of each fragment, and the number after its last row."""
        numbers = self.row_ids()
        fragments, counts = np.unique(numbers // np.uint64(FRAGMENT), return_counts=True)
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
                if not self.is_damage(error):
                    raise
                skipped = min(end - at, max(self.read_rows, 2 * skipped))
                self.lose(f"{self._name}/row {at}", f"up to {skipped:,} rows: {error}")
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

    def erase(self, where: str) -> float:
        """Remove rows and every byte of them; returns as `drop_versions` does.

        Deleting only marks rows, and LanceDB never rewrites a file with few marks. So the remaining
        rows of the affected files are written to new files, and the old files are deleted.
        """
        held = np.unique(self.row_ids(where) // np.uint64(FRAGMENT))
        self.delete(where)
        runs = np.split(held, np.flatnonzero(np.diff(held) > 1) + 1)
        ranges = [between(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        return self.rewrite(" OR ".join(f"({at})" for at in ranges))

    def rewrite(self, where: str = "true") -> float:
        """Write the rows that `where` selects to new files, then delete the old files. With an
        empty `where`, only delete files. Returns as `drop_versions` does."""
        if where:
            key = self._fields.key
            with lance_errors():
                self._handle.update(where=where, values_sql={key: key})
        return self.drop_versions()

    def old_versions(self) -> int:
        """How many versions `compact` would drop: all but the newest; of a shared table only those
        older than an hour."""
        with lance_errors():
            *old, _ = self._handle.list_versions()
        if not self._place.shared:
            return len(old)
        latest = time.time() - _SHARED_VERSIONS.total_seconds()
        return sum(version["timestamp"].timestamp() < latest for version in old)

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

    def drop_versions(self) -> float:
        """Drop all versions but the newest, and files that belong to no version. In a shared table
        those files may belong to a version that another machine is writing: they stay.

        Returns 0, or for how many seconds old versions of a shared table stay: LanceDB keeps what
        was made later than now, and whoever made it has a clock that is ahead.
        """
        with lance_errors():
            self._handle.optimize(cleanup_older_than=_ALL_VERSIONS)
        self._fsync()  # or a power cut could find neither the new files nor the old ones
        self._drop_ahead()
        newest = self.version  # others may go on committing to a shared table
        # zero would warn of other readers, and those of a shared table ask again. A version
        # is kept unless it was that old when this began.
        for _ in range(_TRIES):
            time.sleep(_TRY_S)
            with lance_errors():
                self._handle.optimize(
                    cleanup_older_than=_NO_VERSION, delete_unverified=not self._place.shared
                )
            ahead = self._ahead(newest)
            if not ahead or ahead > _AHEAD_S:
                break
        self._remove_aside()
        self.sync()
        return ahead

    def _ahead(self, newest: int) -> float:
        """Seconds until the clock is past all versions before this one; 0 if there are none."""
        with lance_errors():
            versions = self._handle.list_versions()
        made = [at["timestamp"].timestamp() for at in versions if at["version"] < newest]
        return max(_NO_VERSION.total_seconds(), *(at - time.time() for at in made)) if made else 0.0

    def _drop_ahead(self) -> None:
        """Where the clock was set back, drop the old versions without LanceDB, which would keep
        them, and every row in them, until the clock is past them. The newest one stays."""
        if self._place.shared or self._folder is None or self._ahead(self.version) <= _AHEAD_S:
            return
        for manifest in manifests(self._folder)[:-1]:
            manifest.unlink()

    def _remove_aside(self) -> None:
        if self._folder is not None:
            for path in (self._folder.parent / ASIDE).glob(f"{self._name}.*"):
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
