"""`SlotSizes`: the running sum equals the sum made anew."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.blocks.slot_sizes import SlotSizes
from kvshare_store.blocks.tiers.host.arena import slot_bytes

CHANGES = st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 10_000)))


@given(CHANGES)
def test_the_sum_is_that_of_the_slots(changes: list[tuple[str, int | None]]) -> None:
    sizes: SlotSizes[str] = SlotSizes()
    plain: dict[str, int] = {}
    for key, nbytes in changes:
        if nbytes is None:
            assert sizes.pop(key, None) == plain.pop(key, None)
        else:
            sizes[key] = plain[key] = nbytes
        assert dict(sizes) == plain
        assert sizes.slots == sum(map(slot_bytes, plain.values()))
