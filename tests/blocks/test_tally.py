"""Sums that are kept, not made again for each block of a save."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.blocks.tally import Tally
from kvshare_store.blocks.tiers.host.arena import slot_bytes

CHANGES = st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 10_000)))


@given(CHANGES)
def test_the_sum_is_that_of_the_slots(changes: list[tuple[str, int | None]]) -> None:
    tally: Tally[str] = Tally()
    plain: dict[str, int] = {}
    for key, nbytes in changes:
        if nbytes is None:
            assert tally.pop(key, None) == plain.pop(key, None)
        else:
            tally[key] = plain[key] = nbytes
        assert dict(tally) == plain
        assert tally.slots == sum(map(slot_bytes, plain.values()))
