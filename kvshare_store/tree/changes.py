"""What became of the rows of a table between two versions, without reading all of them again."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_store.tree.batches import numbers, texts
from kvshare_store.tree.table import RowIds, Table


class Changes(NamedTuple):
    """Ids of nodes."""

    added: Set[str] = frozenset()
    removed: Set[str] = frozenset()
    replaced: Set[str] = frozenset()
    """Their rows were written again: pinned, merged, or with another vector."""


class Seen(NamedTuple):
    """The nodes of one version of a catalogue, 40 bytes each."""

    version: int
    numbers: RowIds
    """Row numbers, ascending."""
    ids: npt.NDArray[np.bytes_]
    """The id of each."""


NOTHING = Seen(-1, np.zeros(0, np.uint64), np.zeros(0, "S32"))


def changes_since(table: Table, seen: Seen) -> tuple[Changes, Seen]:
    """Reads rows that are new, and the numbers of the others only if some of those are gone."""
    version = table.version
    if version == seen.version:
        return Changes(), seen
    if version < seen.version:  # the newest versions were lost
        changes, now = changes_since(table, NOTHING)
        return Changes(changes.added, set(_names(seen.ids)) - changes.added), now
    fresh = list(table.rows(table.after(seen.numbers), ["id"]))
    new_numbers = np.concatenate([np.zeros(0, np.uint64), *map(numbers, fresh)])
    new_ids = [node_id for batch in fresh for node_id in texts(batch, "id")]
    kept = np.ones(len(seen.numbers), bool)
    if table.count() != len(seen.numbers) + len(new_ids):
        kept = np.isin(seen.numbers, table.row_ids(), assume_unique=True)
    before, after = set(_names(seen.ids[~kept])), set(new_ids)
    ids = np.concatenate([seen.ids[kept], np.array([i.encode() for i in new_ids], "S32")])
    now = Seen(version, np.concatenate([seen.numbers[kept], new_numbers]), ids)
    return Changes(after - before, before - after, after & before), now


def _names(ids: npt.NDArray[np.bytes_]) -> list[str]:
    return [node_id.decode("utf-8", "replace") for node_id in ids.tolist()]
