"""The records of namespaces: what their digests stand for, and the salts of their keys."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pyarrow as pa

from kvshare_store.catalog.batches import namespace_rows, texts
from kvshare_store.catalog.faults import Faults
from kvshare_store.catalog.lance import quoted
from kvshare_store.catalog.rows import Rows, opens, rekeyed
from kvshare_store.catalog.table import Table
from kvshare_store.catalog.table_reader import Fields
from kvshare_store.errors import MissError
from kvshare_store.keys import Keyring
from kvshare_store.namespace import Namespace

NAMESPACES = Fields(
    pa.schema(
        [
            pa.field("digest", pa.string(), nullable=False),
            pa.field("namespace", pa.binary(), nullable=False),
            pa.field("salt", pa.binary()),
        ]
    ),
    "digest",
)


class NamespaceRecords:
    """A row for each namespace that was ever saved into. Thread-safe under the catalogue's lock."""

    def __init__(self, table: Table, rows: Rows, lock: threading.Lock, faults: Faults) -> None:
        self._table = table
        self._rows = rows
        self._lock = lock
        self._faults = faults

    def digests(self) -> set[str]:
        """The digests of all namespaces."""
        with self._lock:
            batches = list(self._table.rows(columns=["digest"]))
        return {digest for batch in batches for digest in texts(batch, "digest")}

    def add(self, namespaces: Sequence[Namespace]) -> None:
        """Record what digests stand for, and the salts of their keys, in one commit.

        An existing record stays: another writer may have been first, and only one salt may count. A
        record that cannot be read is replaced.
        """
        rows = {each.digest: self._rows.namespace_row(each) for each in namespaces}
        if not rows:
            return
        with self._lock:
            self._table.merge(list(rows.values()), replace=False)
        bad = rows.keys() - {each.digest for each in self.read(*rows)}
        if bad:
            with self._lock:
                self._table.merge([rows[digest] for digest in sorted(bad)], replace=True)
            self.read(*bad)

    def remove(self, digests: Sequence[str]) -> None:
        """Delete the records of namespaces, with their salts. No row and no block of theirs may be
        left."""
        if digests:
            with self._lock:
                self._table.delete(f"digest IN ({quoted(digests)})")
        for digest in digests:
            self.forget_key(digest)

    def read(self, *digests: str) -> list[Namespace]:
        """The namespaces of all records, or of those of `digests`; their keys are known then.

        Bad records, and records that only a newer release understands, are left out. `ConfigError`
        if they were encrypted with another key than ours, or with none.
        """
        with self._lock:
            if digests:
                batches = list(self._table.rows(f"digest IN ({quoted(digests)})"))
            else:
                batches = list(self._table.salvage())
            found = []
            for row in (row for batch in batches for row in namespace_rows(batch)):
                try:
                    found.append(self._rows.namespace(row))
                except MissError as error:
                    self._faults.add(row.digest, error)
        return found

    def rekey(self, old: Keyring, new: Keyring) -> tuple[int, int]:
        """Seal all records with another master key, in one commit, then remove every byte of what
        they were. Those that have the new key already stay. Returns how many were sealed, and how
        many there are. `ConfigError`, and nothing is changed, if one has neither key.

        Nobody else may use the catalogue meanwhile.
        """
        with self._lock:
            rows = [row for batch in self._table.rows() for row in namespace_rows(batch)]
            sealed = [rekeyed(row, old, new) for row in rows if not opens(row, new)]
            if sealed:
                self._table.merge(sealed, replace=True)
            self._table.rewrite()
        return len(sealed), len(rows)

    def forget_key(self, digest: str) -> None:
        """Forget the key of a namespace that was purged, here or by another machine. If a new
        record exists, the next `read` learns its key."""
        self._rows.forget(digest)
