"""A small table of facts in LanceDB, which machines that share a catalogue change conditionally.

LanceDB makes every change atomic: of two that concern the same fact at the same moment the second
is evaluated again, on what the first has left.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from kvshare_store.errors import StorageError

T = TypeVar("T")

_ATTEMPTS = 6
_SAFE = re.compile(r"^[\w/.-]+$")
"""What may stand in SQL text."""
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("at", pa.float64()),
        pa.field("by", pa.string()),
        pa.field("state", pa.string()),
    ]
)


class Fact(NamedTuple):
    """One row. `at` is in seconds since 1970, by the clock of whoever wrote it."""

    key: str
    at: float
    by: str = ""
    state: str = ""


class Ledger:
    """One table. Thread-safe. It is made by the first write, or at once (`create`)."""

    def __init__(self, database: Any, name: str, *, create: bool) -> None:
        self._database = database
        self._name = name
        self._lock = threading.Lock()
        self._table: Any = None
        if create or name in database.list_tables().tables:
            self._table = self._opened()

    def _opened(self) -> Any:
        for attempt in range(_ATTEMPTS):  # others may be making it as well
            try:
                if self._name in self._database.list_tables().tables:
                    table = self._database.open_table(self._name)
                else:
                    table = self._database.create_table(self._name, schema=_SCHEMA)
                if not table.schema.field("key").metadata:  # the only one there is says that
                    table.set_unenforced_primary_key("key")
                return table
            except (OSError, RuntimeError, ValueError):
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0, 0.05 * 2**attempt))
        return None

    def _do(self, change: Callable[[Any], T], *, fresh: bool = False) -> T:
        """Run `change(table)`; again, on the newest version, when another machine was faster."""
        for attempt in range(_ATTEMPTS):
            try:
                with self._lock:
                    if self._table is None:
                        self._table = self._opened()
                    if fresh or attempt:
                        self._table.checkout_latest()
                    return change(self._table)
            except (OSError, RuntimeError, ValueError) as error:
                failed = error
                time.sleep(random.uniform(0, 0.02 * 2**attempt))
        raise StorageError(f"catalogue refused: {failed}") from failed

    def refresh(self) -> int:
        """See what others have written; the version of the table, 0 while there is none."""
        if self._table is None:
            return 0
        return self._do(lambda table: int(table.version), fresh=True)

    def facts(self, where: str = "") -> list[Fact]:
        """Those that are there now, or those of them that the SQL `where` picks."""
        if self._table is None:
            return []

        def read(table: Any) -> list[Fact]:
            query = table.search().limit(None)
            rows = (query.where(where) if where else query).to_arrow().to_pylist()
            return [
                Fact(row["key"], row["at"], row["by"] or "", row["state"] or "") for row in rows
            ]

        return self._do(read, fresh=True)

    def create(self, facts: Sequence[Fact]) -> int:
        """Write those whose key is not there; how many that were."""
        return self._merged(facts)

    def put(self, facts: Sequence[Fact]) -> int:
        """Write all, in the place of those that are there and not as late."""
        return self._merged(facts, replaced="target.at < source.at")

    def _merged(self, facts: Sequence[Fact], replaced: str = "") -> int:
        if not facts:
            return 0
        rows = pa.Table.from_pylist([fact._asdict() for fact in facts], _SCHEMA)

        def merge(table: Any) -> int:
            builder = table.merge_insert("key").when_not_matched_insert_all()
            if replaced:
                builder = builder.when_matched_update_all(where=replaced)
            return int(builder.execute(rows).num_inserted_rows)

        return self._do(merge)

    def change(self, where: str, **values: Any) -> int:
        """Set columns of the facts that `where` picks; how many there were."""
        if self._table is None:
            return 0
        return self._do(lambda table: int(table.update(where=where, values=values).rows_updated))

    def remove(self, where: str) -> int:
        """Remove the facts that `where` picks; how many there were."""
        if self._table is None:
            return 0
        return self._do(lambda table: int(table.delete(where).num_deleted_rows))

    def compact(self, older: timedelta) -> None:
        """Join small files and drop versions that are older than that."""
        if self._table is not None:
            self._do(lambda table: table.optimize(cleanup_older_than=older))

    def erase(self, where: str) -> None:
        """Remove facts, from old versions too: what stays is written anew."""
        if self._table is None:
            return
        self.remove(where)
        self._do(lambda table: table.update(where="true", values_sql={"key": "key"}))
        time.sleep(0.002)  # a version is kept unless it was that old when this began
        self.compact(timedelta(milliseconds=1))


def within(column: str, values: Collection[str]) -> str:
    """SQL: the column is one of the values; `ValueError` for text that SQL could misread."""
    for value in values:
        if not _SAFE.match(value):
            raise ValueError(f"{value!r} cannot be a key")
    quoted = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({quoted})" if values else "false"
