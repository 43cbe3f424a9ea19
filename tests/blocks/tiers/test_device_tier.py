"""The device tier passes the contract tests, and a hit copies exactly the stored rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kvshare_connectors.vllm.resident import Resident

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.device import DeviceTier
from kvshare_store.blocks.tiers.host.arena import Arena
from kvshare_store.errors import NoSpaceError, PlanError
from kvshare_store.plan import BlockRef
from kvshare_store.plan.editor import Editor
from kvshare_store.plan.spans import Span
from kvshare_store.testing.tiers import LAYOUT, TierTests, make_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TestDeviceTier(TierTests):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return DeviceTier(budget, DEVICE)


@pytest.fixture
def arena() -> Arena:
    return Arena.create(1 << 16)


def placed(arena: Arena, seed: int, offset: int = 0, *, lossy: bool = False) -> BlockRef:
    """A block in the arena; `lossy`: its rows are all ones."""
    name, block = make_block(seed)
    arena.clear_label(offset)
    data = bytes([1]) * len(block.data) if lossy else block.data
    arena.rows(offset, len(data))[:] = data
    seq = arena.set_label(offset, name, lossy=lossy)
    return BlockRef(name, block.rows, len(data), offset, seq, lossy)


def used_twice(resident: Resident, arena: Arena, ref: BlockRef) -> None:
    for _ in range(2):
        resident.used(arena, [ref])
    resident.fill()


def test_what_is_used_least_recently_makes_room() -> None:
    blocks = [make_block(seed) for seed in range(3)]
    nbytes = len(blocks[0][1].data)
    tier = DeviceTier(2 * nbytes, DEVICE)
    for name, block in blocks[:2]:
        tier.keep(name, block)
    tier.rows(blocks[0][0])
    tier.keep(*blocks[2])
    assert [tier.size(name) is not None for name, _ in blocks] == [True, False, True]
    with pytest.raises(NoSpaceError):
        tier.keep(*make_block(9, rows=100))


def test_blocks_used_again_become_resident_and_serve_the_same_rows(arena: Arena) -> None:
    ref = placed(arena, 1)
    resident = Resident(1 << 16, DEVICE, LAYOUT)
    editor = Editor(LAYOUT, None, DEVICE)
    spans = [Span(3, 4, 3, 0, 2)]

    def load() -> torch.Tensor:
        edited = editor.edit(
            spans, [ref], lambda block: arena.rows(block.offset, block.nbytes), resident.rows
        )
        return edited.rows.cpu().clone().view(torch.int32)  # random bytes may be NaN

    first = load()
    for _ in range(2):
        assert resident.rows(ref) is None
        resident.used(arena, [ref])
        resident.fill()
    assert resident.rows(ref) is not None
    arena.rows(ref.offset, ref.nbytes)[:] = bytes(ref.nbytes)
    assert torch.equal(load(), first), "the rows came from the device"


def test_a_block_that_left_the_arena_does_not_become_resident(arena: Arena) -> None:
    ref = placed(arena, 1)
    resident = Resident(1 << 16, DEVICE, LAYOUT)
    resident.used(arena, [ref])
    resident.used(arena, [ref])
    placed(arena, 2)
    resident.fill()
    assert resident.rows(ref) is None


def test_rounded_rows_on_the_device_never_serve_as_exact(arena: Arena) -> None:
    """A block keeps its name when a codec rounds its rows, so provenance must travel with the
    rows."""
    rounded = placed(arena, 1, lossy=True)
    resident = Resident(1 << 16, DEVICE, LAYOUT)
    used_twice(resident, arena, rounded)
    assert resident.rows(rounded) is not None
    exact = placed(arena, 1)
    assert resident.rows(exact) is None
    edited = Editor(LAYOUT, None, DEVICE).edit(
        [Span(0, exact.rows, 0, 0, 0, True)],
        [exact],
        lambda ref: arena.rows(ref.offset, ref.nbytes),
        resident.rows,
    )
    assert edited.rows.cpu().view(torch.uint8).numpy().tobytes() == make_block(1)[1].data


def test_exact_rows_take_the_place_of_rounded_ones_on_the_device(arena: Arena) -> None:
    resident = Resident(1 << 16, DEVICE, LAYOUT)
    used_twice(resident, arena, placed(arena, 1, lossy=True))
    exact = placed(arena, 1)
    used_twice(resident, arena, exact)
    rows = resident.rows(exact)
    assert rows is not None
    assert rows.contiguous().cpu().view(torch.uint8).numpy().tobytes() == make_block(1)[1].data
    rounded = placed(arena, 1, lossy=True)
    used_twice(resident, arena, rounded)
    kept = resident.rows(exact)
    assert kept is not None
    assert torch.equal(kept.view(torch.uint8), rows.view(torch.uint8))


def test_an_exact_span_of_rounded_rows_is_refused(arena: Arena) -> None:
    ref = placed(arena, 1, lossy=True)
    with pytest.raises(PlanError, match="lossy"):
        Editor(LAYOUT, None, DEVICE).edit(
            [Span(0, 4, 0, 0, 0, True)], [ref], lambda _: arena.rows(ref.offset, ref.nbytes)
        )


def test_a_purge_leaves_no_row_on_the_device(arena: Arena) -> None:
    """Not of blocks that are there, of those that made room for them, nor of those that are about
    to be copied."""
    refs = [placed(arena, seed, seed << 12) for seed in range(4)]
    resident = Resident(2 * refs[0].nbytes, DEVICE, LAYOUT)
    assert resident.tier is not None
    resident.purged("before")
    places = []
    for ref in refs[:3]:
        used_twice(resident, arena, ref)
        places.append(resident.rows(ref))
    assert resident.rows(refs[0]) is None, "another block has made it leave"
    resident.purged("before")
    assert resident.rows(refs[2]) is not None, "nothing has been purged"
    for _ in range(2):
        resident.used(arena, [refs[3]])
    resident.purged("after")
    resident.fill()
    assert resident.tier.names() == []
    assert all(place is not None and not place.view(torch.uint8).any() for place in places)
    used_twice(resident, arena, refs[0])
    assert resident.rows(refs[0]) is not None


def test_no_budget_keeps_nothing(arena: Arena) -> None:
    ref = placed(arena, 1)
    resident = Resident(0, DEVICE, LAYOUT)
    resident.purged("before")
    for _ in range(3):
        resident.used(arena, [ref])
        resident.fill()
    assert resident.rows(ref) is None
