"""Tests of the checkers: each error that other tests look for is detected here."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvshare_store.plan import BlockRef, ReusePlan
from kvshare_store.plan.spans import Span
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import (
    RowBook,
    Rows,
    check_partition,
    gather,
    pick,
    prompt,
    row_keys,
    rows_for,
)

LAYOUT = KVLayout(2, 1, 4, "float32")
TOKENS = prompt(1, 20)
SPANS = (Span(0, 8, 0, 0, 0, True), Span(10, 6, 12, 1, 2))
BLOCKS = (BlockRef("a", 8, 512, 0), BlockRef("b", 8, 512, 640))
PLAN = ReusePlan(namespace="n", tokens=20, exact=8, spans=SPANS, blocks=BLOCKS, generation=1)
DONOR = [*TOKENS[:8], 1, 2, 3, 4, *TOKENS[10:20]]


def test_rows_depend_on_the_prefix_and_nothing_else() -> None:
    first, second = rows_for(TOKENS, LAYOUT), rows_for([*TOKENS[:10], 7, *TOKENS[11:]], LAYOUT)
    assert row_keys(first)[:10] == row_keys(second)[:10]
    assert not set(row_keys(first)[10:]) & set(row_keys(second)[10:])
    assert len(set(row_keys(first))) == 20


def test_rows_after_an_edit_are_nobody_elses() -> None:
    plain = rows_for(TOKENS, LAYOUT)
    edited = rows_for(TOKENS, LAYOUT, exact=5, salt="a")
    again = rows_for(TOKENS, LAYOUT, exact=5, salt="b")
    assert row_keys(plain)[:5] == row_keys(edited)[:5]
    assert not set(row_keys(plain)[5:]) & set(row_keys(edited)[5:])
    assert not set(row_keys(edited)[5:]) & set(row_keys(again)[5:])


def test_pick_and_gather_are_inverse() -> None:
    donor = rows_for(DONOR, LAYOUT)
    blocks = {"a": pick(donor, range(8)), "b": pick(donor, range(10, 18))}
    found = gather(PLAN, LAYOUT, lambda ref: blocks[ref.name])
    assert row_keys(found)[:8] == row_keys(donor)[:8]
    assert row_keys(found)[10:16] == row_keys(donor)[12:18]
    assert not found[:, :, 8:10].any()
    assert not found[:, :, 16:].any()


@pytest.fixture
def served() -> tuple[RowBook, Rows]:
    """A book with the donor's rows, and what `PLAN` serves from them."""
    book, donor = RowBook(LAYOUT), rows_for(DONOR, LAYOUT)
    book.write(DONOR, donor, range(22), 22)
    rows = np.zeros(LAYOUT.shape(20), np.uint32)
    rows[:, :, :8], rows[:, :, 10:16] = donor[:, :, :8], donor[:, :, 12:18]
    return book, rows


def test_right_rows_pass(served: tuple[RowBook, Rows]) -> None:
    check_partition(PLAN)
    served[0].check(TOKENS, PLAN, served[1])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("flipped", "nobody saved"),
        ("shifted", "another token"),
        ("source", "root"),
        ("token", "another token"),
        ("prefix", "another prefix"),
        ("posing", "poses as exact"),
    ],
)
def test_wrong_rows_do_not(served: tuple[RowBook, Rows], wrong: str, says: str) -> None:
    (book, rows), plan, tokens = served, PLAN, list(TOKENS)
    if wrong == "flipped":
        rows[1, 0, 3, 0, 2] ^= 1
    elif wrong == "shifted":
        rows[:, :, 10:15] = rows[:, :, 11:16].copy()
    elif wrong == "source":
        moved = msgspec.structs.replace(SPANS[1], source=11)
        plan = msgspec.structs.replace(PLAN, spans=(SPANS[0], moved))
    elif wrong == "token":
        tokens[12] += 1
    elif wrong == "prefix":
        other = rows_for([9, *TOKENS[1:]], LAYOUT)
        book.write([9, *TOKENS[1:]], other, range(20), 20)
        rows[:, :, 3] = other[:, :, 3]
    else:
        edited = rows_for(TOKENS, LAYOUT, exact=2, salt="x")
        book.write(TOKENS, edited, range(2, 20), 2)
        rows[:, :, 5] = edited[:, :, 5]
    with pytest.raises(AssertionError, match=says):
        book.check(tokens, plan, rows)


@pytest.mark.parametrize(
    "change",
    [
        {"exact": 7},
        {"exact": 9},
        {"tokens": 16},
        {"spans": (SPANS[0], Span(6, 10, 12, 1, 0))},
        {"spans": (SPANS[0], Span(10, 6, 12, 1, 3))},
        {"spans": (Span(0, 8, 1, 0, 0, True), SPANS[1])},
        {"spans": (SPANS[1], SPANS[0])},
    ],
    ids=["exact short", "exact long", "last kept", "overlap", "over block", "moved exact", "order"],
)
def test_plans_that_contradict_themselves(change: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        check_partition(msgspec.structs.replace(PLAN, **change))
