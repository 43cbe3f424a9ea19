"""Rows of a node that is merged: copied as they are, and only from its own namespace."""

from __future__ import annotations

import pytest

from kvshare_store.errors import NamespaceError
from kvshare_store.maintenance.merging import copy_rows
from kvshare_store.plan.spans import Span
from kvshare_store.tensors.frame import Block
from kvshare_store.tensors.layout import KVLayout
from tests.nodes.test_repacking import block, node
from tests.support.oracle import row_keys, rows_for

LAYOUT = KVLayout(2, 1, 4, "float32")


def test_rows_are_copied_as_they_are() -> None:
    first, second = rows_for(range(8), LAYOUT), rows_for(range(50, 58), LAYOUT)
    blocks = {
        block(name): Block("n", LAYOUT, rows.tobytes())
        for name, rows in (("a", first), ("b", second))
    }
    old = node("x", [Span(0, 2, 1, 0, 1), Span(2, 3, 4, 1, 4), Span(5, 1, 0, 0, 0)], ("a", "b"))
    keys = [row_keys(first)[at] for at in (1, 2)] + row_keys(second)[4:7] + [row_keys(first)[0]]
    target = bytearray(4 * LAYOUT.row_bytes)
    copied = copy_rows(old, 1, 5, blocks.__getitem__, target)
    assert copied.namespace == "n"
    assert row_keys(LAYOUT.words(target, 4)) == keys[1:5]


def test_rows_of_another_namespace_are_refused() -> None:
    stranger = Block("other", LAYOUT, rows_for(range(4), LAYOUT).tobytes())
    mine = node("x", [Span(0, 4, 0, 0, 0)], ("a",))
    with pytest.raises(NamespaceError):
        copy_rows(mine, 0, 4, lambda name: stranger, bytearray(4 * LAYOUT.row_bytes))
