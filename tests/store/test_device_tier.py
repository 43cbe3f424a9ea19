"""The device tier keeps the law of tiers, and a hit copies the very rows from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kvshare_connectors.vllm.resident import Resident

from kvshare_store.blocks.arena import Arena
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.device import DeviceTier
from kvshare_store.editor import Editor
from kvshare_store.errors import NoSpaceError
from kvshare_store.plan import BlockRef, Span
from kvshare_store.testing.tiers import LAYOUT, TierTests, make_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TestDeviceTier(TierTests):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return DeviceTier(budget, DEVICE)


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena.create(tmp_path / "arena", 1 << 16)


def placed(arena: Arena, seed: int, offset: int = 0) -> BlockRef:
    """A block in the arena."""
    name, block = make_block(seed)
    arena.set_label(offset, name)
    arena.rows(offset, len(block.data))[:] = block.data
    return BlockRef(name, block.rows, len(block.data), offset)


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
        return edited.rows.cpu().clone().view(torch.int32)  # random bytes may be no numbers

    first = load()
    for _ in range(2):
        assert resident.rows(ref.name) is None
        resident.used(arena, [ref])
        resident.fill()
    assert resident.rows(ref.name) is not None
    arena.rows(ref.offset, ref.nbytes)[:] = bytes(ref.nbytes)
    assert torch.equal(load(), first), "the rows came from the device"


def test_a_block_that_left_the_arena_does_not_become_resident(arena: Arena) -> None:
    ref = placed(arena, 1)
    resident = Resident(1 << 16, DEVICE, LAYOUT)
    resident.used(arena, [ref])
    resident.used(arena, [ref])
    placed(arena, 2)
    resident.fill()
    assert resident.rows(ref.name) is None


def test_no_budget_keeps_nothing(arena: Arena) -> None:
    ref = placed(arena, 1)
    resident = Resident(0, DEVICE, LAYOUT)
    for _ in range(3):
        resident.used(arena, [ref])
        resident.fill()
    assert resident.rows(ref.name) is None
