"""Opens and reads one LanceDB table, whatever became of its files.

LanceDB never calls fsync, and one file damaged by a power cut or a bad disk would make every start
and every commit fail. Here the contents of such a file are left out, and `take_lost` reports them.

A row's number (`_rowid`) consists of the number of its fragment and its place in there. Fragments
are written once and numbered upwards, so later commits have greater numbers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvshare_store.catalog.faults import Fault
from kvshare_store.catalog.lance import is_damage, lance_errors, newest_version
from kvshare_store.catalog.place import Place
from kvshare_store.errors import HomeError, StorageError, TornTableError

RowIds = npt.NDArray[np.uint64]

_READ_SLICE = 1 << 13
"""LanceDB reads ahead without a limit, so it is asked for so many rows at a time: about 60 MB for
prompts of 1,000 tokens."""
_READ_FIELDS = 1 << 16
"""Rows read at a time when only a few short columns are wanted."""
FRAGMENT = 1 << 32
"""Row numbers of one fragment."""
_KEY = b"lance-schema:unenforced-primary-key:position"
"""A key in the metadata of the column that was declared to be the primary key."""
_MOST_FRAGMENTS = 1 << 30
ASIDE = "torn"
"""The folder of versions that were given up."""
_PAUSE_S = 0.05


class Fields(NamedTuple):
    """Columns that this release writes. A table may have others, and may lack nullable ones."""

    schema: pa.Schema
    key: str

    def missing(self, names: list[str]) -> list[str]:
        """Required columns that a table lacks."""
        return [at.name for at in self.schema if not at.nullable and at.name not in names]


class TableReader:
    """The newest version of a table that can be read, or a new table where there is none. Not
    thread-safe. Every method raises `StorageError`."""

    read_rows = 1024
    """Rows read at a time, and left out at first where they cannot be read."""

    def __init__(self, place: Place, database: Any, name: str, fields: Fields) -> None:
        self._place = place
        self._database = database
        self._name = name
        self._fields = fields
        self._lost: list[Fault] = []
        self._folder = None
        if place.folder is not None:
            self._folder = place.folder / f"{name}.lance"
        self.torn = self._open()
        """Numbers of its fragments that cannot be read."""

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
                if newest is None or not self.is_damage(error):
                    raise
                if newest == failed:
                    self._set_aside(newest, error)
                else:  # another machine may have removed what was just being read
                    failed = newest
                    time.sleep(_PAUSE_S)

    def is_damage(self, error: StorageError) -> bool:
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

    def _set_aside(self, newest: Path, error: StorageError) -> None:
        """Give up the newest version, so that the one before it counts. If no version is left, the
        table starts empty."""
        aside = newest.parents[0 if newest == self._folder else 2] / ASIDE
        aside.mkdir(mode=0o700, exist_ok=True)
        os.replace(newest, aside / f"{self._name}.{newest.name}.{time.time_ns()}")
        text = f"its newest version cannot be read, the one before is used: {error}"
        self.lose(f"{self._name}/{newest.name}", text)

    def take_lost(self) -> list[Fault]:
        """Files that could not be read, since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def lose(self, what: str, text: str) -> None:
        """Contents of a file are left out."""
        self._lost.append(Fault(what, TornTableError(text), repaired=True))

    def _torn_fragments(self) -> list[int]:
        """`StorageError` if the table cannot be read for any other reason."""
        try:
            self.row_ids()
        except StorageError as error:
            if not self.is_damage(error):
                raise
            self.row_ids(between(_MOST_FRAGMENTS, _MOST_FRAGMENTS + 1))  # opens no fragment
            return list(self._search_torn(0, _MOST_FRAGMENTS))
        return []

    def _search_torn(self, first: int, end: int) -> Iterator[int]:
        """Bisect: LanceDB opens only those fragments that are in the range of row numbers."""
        try:
            self.row_ids(between(first, end))
        except StorageError as error:
            if not self.is_damage(error):
                raise
            if end - first == 1:
                yield first
                return
            middle = (first + end) // 2
            yield from self._search_torn(first, middle)
            yield from self._search_torn(middle, end)

    # --- reading -----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of the version that is read."""
        return int(self._handle.version)

    def refresh(self) -> None:
        """Read the newest version from now on."""
        with lance_errors():
            self._handle.checkout_latest()

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
                at_once = _READ_FIELDS if columns else self.read_rows
                yield from (query.where(where) if where else query).to_batches(at_once)
                return
            firsts = range(0, self._handle.count_rows(), _READ_SLICE)
            yield from _ahead(partial(self._slice, query), firsts)

    def _slice(self, query: Any, first: int) -> list[pa.RecordBatch]:
        return list(query.limit(_READ_SLICE).offset(first).to_batches(self.read_rows))


def _ahead(
    read: Callable[[int], list[pa.RecordBatch]], firsts: Iterable[int]
) -> Iterator[pa.RecordBatch]:
    """The batches of all slices, in order. While those of one are used, the next is read."""
    with ThreadPoolExecutor(1, "kvshare-read-ahead") as pool:
        ready: Future[list[pa.RecordBatch]] | None = None
        for first in firsts:
            following = pool.submit(read, first)
            if ready is not None:
                yield from ready.result()
            ready = following
        if ready is not None:
            yield from ready.result()


def between(first: int, end: int) -> str:
    """Rows of the fragments `first … end-1`."""
    return f"_rowid >= {first * FRAGMENT} AND _rowid < {end * FRAGMENT}"
