"""A made-up next release. It only adds: fields of records, a column, and a mark of the home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lancedb
import msgspec
import pyarrow as pa

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.config import StoreConfig, master_key
from kvshare_store.keys import Keyring, seal
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node

_COLUMN = "later"


class NextNode(Node, frozen=True, kw_only=True, eq=False, gc=False):
    """A node record of the next release."""

    score: float = 0.5


class NextNamespace(Namespace, frozen=True, kw_only=True):
    """A namespace record of the next release. At its default the new field does not change the
    digest."""

    adapter_rank: int = 0


def write_as_next_release(config: StoreConfig) -> None:
    """Rewrite every row of a home as the next release would. No process may have it open."""
    home = config.home_path
    keys = Keyring(master_key(config.encryption_key)) if config.encryption_key else None
    catalog = Catalog(home / "catalog", keys)
    spaces = catalog.records.read()
    catalog.add([(NextNode(**_fields(node)), vectors) for node, vectors in catalog.load()])
    _write_namespaces(home / "catalog", spaces, keys)
    for name in ("nodes", "namespaces"):
        _add_column(home / "catalog", name)
    (home / "format").write_text("2.1")


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def _write_namespaces(folder: Path, spaces: list[Namespace], keys: Keyring | None) -> None:
    table = lancedb.connect(str(folder)).open_table("namespaces")
    rows = {row["digest"]: row for row in table.search().limit(None).to_list()}
    for space in spaces:
        encoded = msgspec.msgpack.encode(NextNamespace(**_fields(space)))
        if keys is not None:
            encoded = bytes(seal(keys.of_table("namespaces"), encoded, space.digest.encode()))
        rows[space.digest]["namespace"] = encoded
    written = pa.Table.from_pylist(list(rows.values()), table.schema)
    table.merge_insert("digest").when_matched_update_all().execute(written)


def _add_column(folder: Path, name: str) -> None:
    table = lancedb.connect(str(folder)).open_table(name)
    if _COLUMN not in table.schema.names:
        table.add_columns(pa.schema([pa.field(_COLUMN, pa.string())]))
        table.update(where="true", values={_COLUMN: "said by the next release"})
