"""Reads rows of the catalogue out of Arrow. No content of a column makes it fail."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvshare_store.catalog.rows import NamespaceRow, Row
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS


def node_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """Rows of the table `nodes`."""
    lexical, semantic = (_vectors(batch, name) for name in ("lexical", "semantic"))
    columns = texts(batch, "id"), texts(batch, "namespace"), _binary(batch, "node")
    for at, (node_id, namespace, node) in enumerate(zip(*columns, strict=True)):
        yield Row(node_id, namespace, node or b"", lexical[at], semantic[at])


def namespace_rows(batch: pa.RecordBatch) -> Iterator[NamespaceRow]:
    """Rows of the table `namespaces`."""
    columns = texts(batch, "digest"), _binary(batch, "namespace"), _binary(batch, "salt")
    for digest, namespace, salt in zip(*columns, strict=True):
        yield NamespaceRow(digest, namespace or b"", salt)


def numbers(batch: pa.RecordBatch) -> npt.NDArray[np.uint64]:
    """Row numbers."""
    found: npt.NDArray[np.uint64] = batch.column("_rowid").to_numpy().astype(np.uint64)
    return found


def texts(batch: pa.RecordBatch, name: str) -> list[str]:
    """A column of text. Bytes that are not UTF-8 become replacement characters."""
    column = batch.column(name)
    try:
        return [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        raw = column.cast(pa.binary()).to_pylist()
        return [(text or b"").decode("utf-8", "replace") for text in raw]


def _binary(batch: pa.RecordBatch, name: str) -> Iterator[bytes | None]:
    """A column of bytes; empty ones where a table of another release has no such column. The
    values are made one at a time: thousands at once would fragment the memory between those that
    are kept."""
    if name not in batch.schema.names:
        return iter([None] * batch.num_rows)
    return (value.as_py() for value in batch.column(name))


def _vectors(batch: pa.RecordBatch, name: str) -> list[np.ndarray | None]:
    """float32 vectors, views of the batch; None where there is none."""
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column(name)
    first = column.offset * VECTOR_DIMENSIONS
    flat = column.values[first : first + len(column) * VECTOR_DIMENSIONS]
    matrix = flat.to_numpy(zero_copy_only=False).reshape(len(column), VECTOR_DIMENSIONS)
    if not column.null_count:
        return list(matrix)
    if column.null_count == len(column):
        return [None] * len(column)
    valid = column.is_valid().to_pylist()
    return [row if ok else None for row, ok in zip(matrix, valid, strict=True)]
