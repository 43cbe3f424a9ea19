"""The host tier: blocks that move, rows that are replaced, and what a reader sees meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvshare_store.blocks.eviction import LRU
from kvshare_store.blocks.tiers.host.arena import Arena, ArenaView, slot_bytes
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.errors import LeaseError, NoSpaceError
from kvshare_store.tensors.frame import Block
from kvshare_store.testing.tiers import LAYOUT, make_block, same

SLOT = slot_bytes(8 * LAYOUT.row_bytes)


@pytest.fixture
def host(tmp_path: Path) -> HostTier:
    """Room for ten blocks of 8 rows; the least recently used goes first."""
    return HostTier(Arena.create(10 * SLOT), LRU())


def stored(host: HostTier, seed: int, rows: int = 8) -> tuple[str, Block]:
    name, block = make_block(seed, rows)
    fill(host, name, block)
    return name, block


def fill(host: HostTier, name: str, block: Block, *, leased: bool = False) -> None:
    offset = host.reserve(len(block.data), lambda name: True)
    host.arena.rows(offset, len(block.data))[:] = block.data
    host.seal(offset, name, block, leased=leased)


def test_scattered_room_is_gathered(host: HostTier) -> None:
    blocks = [stored(host, seed) for seed in range(10)]
    for index in (2, 5):
        host.drop(blocks[index][0])
    with pytest.raises(NoSpaceError):
        host.reserve(16 * LAYOUT.row_bytes)
    large = stored(host, 99, 16)
    kept = [pair for index, pair in enumerate(blocks) if index not in (2, 5)] + [large]
    assert len(host.names()) == 9
    for name, block in kept:
        assert same(host.peek(name), block)
        ref = host.ref(name)
        assert ref is not None
        host.arena.check(ref)


def test_pinned_blocks_stay_where_they_are(host: HostTier) -> None:
    blocks = [stored(host, seed) for seed in range(10)]
    for index in (2, 5):
        host.drop(blocks[index][0])
    pinned = {blocks[3][0], blocks[4][0]}
    places = {name: host.ref(name) for name, _ in blocks}
    with pytest.raises(NoSpaceError):
        host.reserve(16 * LAYOUT.row_bytes, lambda name: name not in pinned)
    assert {name: host.ref(name) for name, _ in blocks} == places
    host.drop(blocks[4][0])
    host.reserve(16 * LAYOUT.row_bytes, lambda name: name not in pinned)
    assert all(host.ref(name) == places[name] for name in pinned if name != blocks[4][0])


def test_slots_that_are_being_filled_stay_where_they_are(host: HostTier) -> None:
    first, _ = stored(host, 1)
    offsets = [host.reserve(8 * LAYOUT.row_bytes) for _ in range(8)]
    last, _ = stored(host, 2)
    host.drop(first)
    host.drop(last)
    with pytest.raises(NoSpaceError):
        host.reserve(16 * LAYOUT.row_bytes, lambda name: True)
    for offset in offsets:
        host.cancel(offset)
    assert host.use().bytes == 0


def test_a_late_reader_notices_that_its_block_has_moved(host: HostTier) -> None:
    blocks = [stored(host, seed) for seed in range(10)]
    reader = ArenaView.attach(host.arena.descriptor)
    late = host.ref(blocks[3][0])
    assert late is not None
    reader.check(late)
    for index in (2, 5):
        host.drop(blocks[index][0])
    stored(host, 99, 16)
    assert host.ref(blocks[3][0]) != late
    with pytest.raises(LeaseError):
        reader.check(late)


def test_blocks_survive_any_number_of_moves(tmp_path: Path) -> None:
    host, chance = HostTier(Arena.create(40 * SLOT), LRU()), random.Random(1)
    live: dict[str, Block] = {}
    moved = 0
    for seed in range(1500):
        name, block = make_block(seed, chance.choice([1, 3, 8, 20]))
        before = {name: host.ref(name) for name in live}
        while True:
            try:
                fill(host, name, block)
                break
            except NoSpaceError:
                victim = next(host.victims())
                host.drop(victim)
                del live[victim]
        moved += any(host.ref(other) != before[other] for other in live)
        live[name] = block
        if chance.random() < 0.3:
            host.touch(chance.choice(list(live)))
    assert moved > 20, "nothing was put to the test"
    for name, block in live.items():
        assert same(host.peek(name), block)
        assert host.arena.label(host.ref(name).offset).name == name  # type: ignore[union-attr]
    assert sorted(host.names()) == sorted(live)
    assert host.use().bytes == sum(host.size(name) or 0 for name in live)


# --- lossy rows ---------------------------------------------------------------------------------


def rounded(block: Block) -> Block:
    return Block(block.namespace, block.layout, bytes(len(block.data)), lossy=True)


def test_exact_rows_take_the_place_of_lossy_ones(host: HostTier) -> None:
    name, block = make_block(1)
    fill(host, name, rounded(block))
    assert host.lossy(name)
    assert host.peek(name).lossy
    fill(host, name, block)
    assert not host.lossy(name)
    assert same(host.peek(name), block)
    assert (host.use().bytes, host.use().blocks) == (SLOT, 1)


def test_leased_rows_are_not_replaced(host: HostTier) -> None:
    name, block = make_block(1)
    fill(host, name, rounded(block))
    place = host.ref(name)
    fill(host, name, block, leased=True)
    assert host.lossy(name)
    assert host.ref(name) == place
    assert host.use().bytes == SLOT


def test_exact_rows_are_not_replaced_by_lossy_ones(host: HostTier) -> None:
    name, block = stored(host, 1)
    fill(host, name, rounded(block))
    assert not host.lossy(name)
    assert same(host.peek(name), block)
    assert not host.lossy("another")


def test_a_dear_block_outlives_cheap_ones(tmp_path: Path) -> None:
    host = HostTier(Arena.create(10 * SLOT))
    names = [stored(host, seed)[0] for seed in range(3)]
    host.weigh(names[0], 2)
    host.weigh("another", 2)
    assert list(host.victims()) == [names[1], names[2], names[0]]
    assert host.names() == [names[1], names[2], names[0]]
