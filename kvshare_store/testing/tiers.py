"""Contract tests of tiers: what every tier and every wrapper around one must do.

Subclass `TierTests` in a test module (`PersistentTierTests` for what survives the process,
`kvshare_store.testing.file_tiers.FileTierTests` for what keeps files) and supply `make_tier`; the
tests are inherited. They use the tier through its interface only. Where the medium can be damaged,
supply `damage` and list in `damages` what it can do.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.errors import MissingBlockError, NoSpaceError
from kvshare_store.tensors.frame import Block
from kvshare_store.testing.scenario import scenario
from kvshare_store.testing.tier_contract import (
    ABSENT,
    LAYOUT,
    NAMESPACE,
    check_use,
    damage_file,
    make_block,
    same,
)
from kvshare_store.testing.tiers_at_once import AtOnceTests
from kvshare_store.testing.tiers_damaged import Damage, DamageTests

__all__ = [
    "ABSENT",
    "LAYOUT",
    "NAMESPACE",
    "Damage",
    "PersistentTierTests",
    "TierTests",
    "check_use",
    "damage_file",
    "make_block",
    "same",
]


class TierTests(AtOnceTests, DamageTests):
    """Every tier passes these."""

    # --- put and get --------------------------------------------------------------------------

    @pytest.mark.parametrize("rows", [1, 7, 64])
    @scenario()
    async def test_what_was_put_is_got(self, tier: Tier, rows: int) -> None:
        name, block = make_block(1, rows)
        await tier.put(name, block)
        assert same(await tier.get(name), block)

    @scenario()
    async def test_put_is_idempotent(self, tier: Tier) -> None:
        name, block = make_block(1)
        await tier.put(name, block)
        before = tier.use()
        await tier.put(name, block)
        assert tier.use() == before
        assert tier.names() == [name]
        assert same(await tier.get(name), block)

    @scenario()
    async def test_an_absent_block_is_missing(self, tier: Tier) -> None:
        with pytest.raises(MissingBlockError):
            await tier.get(ABSENT)
        name, block = make_block(1)
        await tier.put(name, block)
        await tier.delete(name)
        with pytest.raises(MissingBlockError):
            await tier.get(name)

    @scenario()
    async def test_put_does_not_keep_the_callers_buffer(self, tier: Tier) -> None:
        name, block = make_block(1)
        buffer = bytearray(block.data)
        await tier.put(name, Block(block.namespace, block.layout, memoryview(buffer)))
        buffer[:] = bytes(len(buffer))
        assert same(await tier.get(name), block)

    @scenario()
    async def test_what_was_got_belongs_to_the_caller(self, tier: Tier) -> None:
        name, block = make_block(1)
        await tier.put(name, block)
        got = await tier.get(name)
        await tier.delete(name)
        for seed in range(2, 6):  # whatever room it had is used for something else
            await tier.put(*make_block(seed))
        assert same(got, block)

    # --- delete ---------------------------------------------------------------------------------

    @scenario()
    async def test_delete_says_whether_it_was_there(self, tier: Tier) -> None:
        name, block = make_block(1)
        other, other_block = make_block(2)
        assert await tier.delete(name) is False
        await tier.put(name, block)
        await tier.put(other, other_block)
        assert await tier.delete(name) is True
        assert await tier.delete(name) is False
        assert same(await tier.get(other), other_block)
        await tier.put(name, block)
        assert same(await tier.get(name), block)

    # --- what is there --------------------------------------------------------------------------

    @scenario()
    async def test_size_names_and_use_agree(self, tier: Tier) -> None:
        assert (tier.use().bytes, tier.use().blocks, tier.names()) == (0, 0, [])
        assert tier.size(ABSENT) is None
        blocks = [make_block(seed, rows) for seed, rows in ((1, 1), (2, 8), (3, 64), (4, 7))]
        for name, block in blocks:
            await tier.put(name, block)
            check_use(tier)
        assert sorted(tier.names()) == sorted(name for name, _ in blocks)
        for name, _ in blocks:
            assert (tier.size(name) or 0) > 0
        for name, _ in blocks:
            await tier.delete(name)
            assert tier.size(name) is None
            check_use(tier)
        assert tier.use().bytes == 0

    @scenario()
    async def test_touch_puts_a_block_last(self, tier: Tier) -> None:
        names = []
        for seed in range(4):
            name, block = make_block(seed)
            names.append(name)
            await tier.put(name, block)
        assert tier.names() == names
        tier.touch(names[0])
        await tier.get(names[1])
        tier.touch(ABSENT)
        assert tier.names() == [names[2], names[3], names[0], names[1]]

    # --- the budget -----------------------------------------------------------------------------

    @scenario(budget=8192)
    async def test_a_full_tier_refuses_and_loses_nothing(self, tier: Tier) -> None:
        stored: list[tuple[str, Block]] = []
        refused = False
        while not refused:
            name, block = make_block(len(stored))
            try:
                await tier.put(name, block)
                stored.append((name, block))
            except NoSpaceError:
                refused = True
            check_use(tier)
            assert len(stored) < 1000
        assert stored, "the budget should hold a few blocks"
        check_use(tier)
        assert sorted(tier.names()) == sorted(name for name, _ in stored)
        for name, block in stored:
            assert same(await tier.get(name), block)
        await tier.delete(stored[0][0])
        name, block = make_block(5000)
        await tier.put(name, block)
        assert same(await tier.get(name), block)

    @scenario(budget=8192)
    async def test_a_block_larger_than_the_budget_is_refused(self, tier: Tier) -> None:
        with pytest.raises(NoSpaceError):
            await tier.put(*make_block(1, rows=512))
        assert (tier.use().bytes, tier.names()) == (0, [])

    @scenario(budget=8192)
    async def test_concurrent_puts_share_one_budget(self, tier: Tier) -> None:
        blocks = [make_block(seed) for seed in range(40)]
        ended = await asyncio.gather(
            *(tier.put(name, block) for name, block in blocks), return_exceptions=True
        )
        refused = [end for end in ended if end is not None]
        assert 0 < len(refused) < len(ended)
        assert all(isinstance(end, NoSpaceError) for end in refused)
        check_use(tier)
        for (name, block), end in zip(blocks, ended, strict=True):
            if end is None:
                assert same(await tier.get(name), block)
            else:
                assert tier.size(name) is None


class PersistentTierTests(TierTests):
    """More tests, of tiers whose blocks survive the process."""

    def test_reopened_it_finds_everything(self, tmp_path: Path) -> None:
        blocks = [make_block(seed, rows) for seed, rows in ((1, 1), (2, 8), (3, 64))]
        before: list[Any] = []

        async def fill(tier: Tier) -> None:
            for name, block in blocks:
                await tier.put(name, block)
            before.append((sorted(tier.names()), tier.use()))

        async def look(tier: Tier) -> None:
            assert (sorted(tier.names()), tier.use()) == before[0]
            check_use(tier)
            for name, block in blocks:
                assert same(await tier.get(name), block)

        self.run(tmp_path, fill)
        self.run(tmp_path, look)

    def test_closed_in_the_middle_of_everything_it_holds_whole_blocks(self, tmp_path: Path) -> None:
        blocks = dict(make_block(seed) for seed in range(16))

        async def interrupt(tier: Tier) -> None:
            writes = [asyncio.ensure_future(tier.put(*block)) for block in blocks.items()]
            await asyncio.sleep(0)
            await tier.close()
            await asyncio.gather(*writes, return_exceptions=True)

        async def look(tier: Tier) -> None:
            check_use(tier)
            for name in tier.names():
                assert same(await tier.get(name), blocks[name])

        self.run(tmp_path, interrupt)
        self.run(tmp_path, look)
