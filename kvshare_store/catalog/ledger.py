"""A small LanceDB table of facts that machines with one catalogue change conditionally.

LanceDB makes every change atomic. If two machines change the same fact at the same time, the second
change is evaluated again on the result of the first.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from kvshare_store.catalog.place import Place
from kvshare_store.catalog.table import Table
from kvshare_store.catalog.table_reader import Fields
from kvshare_store.errors import StorageError

T = TypeVar("T")

MARKED = "marked"
"""State of the fact of a block that is condemned, and that nobody has claimed yet."""
_ATTEMPTS = 6
_SAFE = re.compile(r"^[\w/.-]+$")
"""What may stand in SQL text."""
_FIELDS = Fields(
    pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("at", pa.float64()),
            pa.field("by", pa.string()),
            pa.field("state", pa.string()),
        ]
    ),
    "key",
)


class Fact(NamedTuple):
    """One row. `at` is in seconds since 1970, by the clock of whoever wrote it."""

    key: str
    at: float
    by: str = ""
    state: str = ""


class Ledger:
    """One table. Thread-safe. It is made by the first write, or at once (`create`)."""

    def __init__(self, place: Place, database: Any, name: str, *, create: bool) -> None:
        self._place = place
        self._database = database
        self._name = name
        self._lock = threading.Lock()
        self._table: Table | None = None
        if create or name in database.list_tables().tables:
            self._do(lambda table: None)

    def _do(self, change: Callable[[Table], T], *, fresh: bool = False) -> T:
        """Run `change(table)`, and again on the newest version if another machine was faster."""
        for attempt in range(_ATTEMPTS):
            try:
                with self._lock:
                    if self._table is None:
                        self._table = Table(self._place, self._database, self._name, _FIELDS)
                    if fresh or attempt:
                        self._table.refresh()
                    return change(self._table)
            except StorageError as error:
                failed = error
                time.sleep(random.uniform(0, 0.05 * 2**attempt))
        raise failed

    def refresh(self) -> int:
        """See what others have written; the version of the table, 0 while there is none."""
        if self._table is None:
            return 0
        return self._do(lambda table: table.version, fresh=True)

    def facts(self, where: str = "") -> list[Fact]:
        """All facts, or those that the SQL condition `where` selects."""
        if self._table is None:
            return []

        def read(table: Table) -> list[Fact]:
            rows = [row for batch in table.rows(where) for row in batch.to_pylist()]
            return [
                Fact(row["key"], row["at"], row["by"] or "", row["state"] or "") for row in rows
            ]

        return self._do(read, fresh=True)

    def create(self, facts: Sequence[Fact]) -> int:
        """Write those whose key does not exist yet; returns how many."""
        return self._merged(facts, replace=False)

    def overwrite(self, fact: Fact) -> None:
        """Write a fact, whether one with its key exists or not."""
        self._merged([fact], replace=True)

    def put(self, facts: Sequence[Fact]) -> int:
        """Write all, in place of older facts with the same keys."""
        return self._merged(facts, replace="target.at < source.at")

    def _merged(self, facts: Sequence[Fact], *, replace: bool | str) -> int:
        if not facts:
            return 0
        rows = [fact._asdict() for fact in facts]
        return self._do(lambda table: table.merge(rows, replace=replace)[0])

    def change(self, where: str, **values: Any) -> int:
        """Set columns of the facts that `where` selects; returns how many."""
        if self._table is None:
            return 0
        return self._do(lambda table: table.update(where, **values))

    def remove(self, where: str) -> int:
        """Remove the facts that `where` selects; returns how many."""
        if self._table is None:
            return 0
        return self._do(lambda table: table.delete(where))

    def old_versions(self) -> int:
        """How many versions `compact` would drop."""
        if self._table is None:
            return 0
        return self._do(lambda table: table.old_versions(), fresh=True)

    def compact(self) -> None:
        """Join small files and drop old versions."""
        if self._table is not None:
            self._do(lambda table: table.compact())

    def erase(self, where: str) -> None:
        """Remove facts, from old versions too."""
        if self._table is not None:
            self._do(lambda table: table.erase(where))

    @property
    def bytes(self) -> int:
        """Bytes of all files of the table; 0 in object storage."""
        return 0 if self._table is None else self._table.bytes

    @property
    def data_bytes(self) -> int:
        """Of these, bytes of files with rows."""
        return 0 if self._table is None else self._table.data_bytes


def within(column: str, values: Collection[str]) -> str:
    """SQL: the column is one of the values; `ValueError` for text that SQL could misread."""
    for value in values:
        if not _SAFE.match(value):
            raise ValueError(f"{value!r} cannot be a key")
    quoted = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({quoted})" if values else "false"
