"""Leases end, and a block is pinned exactly as long as a lease holds it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.blocks.leases import Lease, LeaseBook
from kvshare_store.errors import LeaseError

NAMES = ("a", "b", "c", "d")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


steps = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), st.lists(st.sampled_from(NAMES)), st.sampled_from("xy")),
        st.tuples(st.just("end"), st.integers(0, 20), st.none()),
        st.tuples(st.just("end_owner"), st.sampled_from("xy"), st.none()),
        st.tuples(st.just("wait"), st.floats(0, 15), st.none()),
    ),
    max_size=60,
)


@given(steps)
def test_pins_against_a_plain_list(plan: list[tuple[str, object, object]]) -> None:
    clock = Clock()
    book, held = LeaseBook(clock), list[Lease]()
    for what, first, second in plan:
        if what == "grant":
            assert isinstance(first, list)
            held.append(book.grant(first, str(second), 10.0))
        elif what == "end" and held:
            lease = held.pop(int(str(first)) % len(held))
            assert book.end(lease.id) == lease
            with pytest.raises(LeaseError):
                book.end(lease.id)
        elif what == "end_owner":
            assert book.of_owner(str(first)) == [h for h in held if h.owner == first]
            for lease in book.of_owner(str(first)):
                book.end(lease.id)
            held = [lease for lease in held if lease.owner != first]
        elif what == "wait":
            clock.now += float(str(first))
            over = book.expired()
            assert sorted(over) == sorted(one for one in held if one.expires <= clock.now)
            for lease in over:
                book.end(lease.id)
            held = [lease for lease in held if lease.expires > clock.now]
        pins = Counter(name for lease in held for name in lease.names)
        assert [book.pinned(name) for name in NAMES] == [pins[name] > 0 for name in NAMES]
        assert len(book) == len(held)
        for owner in "xy":
            assert book.count(owner) == len([lease for lease in held if lease.owner == owner])


def test_a_lease_of_nothing_is_a_lease() -> None:
    book = LeaseBook()
    lease = book.grant([], "x", 10.0)
    assert len(book) == 1
    book.end(lease.id)
    assert len(book) == 0
