"""Calls at the same time: a part of `kvshare_store.testing.tiers.TierTests`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.errors import KVShareError, MissingBlockError, NoSpaceError
from kvshare_store.tensors.frame import Block
from kvshare_store.testing.scenario import scenario
from kvshare_store.testing.tier_contract import TierContract, check_use, make_block, same

_CALLS = ("put", "get", "delete")


async def _after(steps: int, call: Callable[[], Awaitable[Any]]) -> Any:
    """Begin a call after others have had `steps` turns."""
    for _ in range(steps):
        await asyncio.sleep(0)
    return await call()


def calls_of(tier: Tier, name: str, block: Block) -> dict[str, Callable[[], Awaitable[Any]]]:
    """The three calls about one block."""
    return {
        "put": lambda: tier.put(name, block),
        "get": lambda: tier.get(name),
        "delete": lambda: tier.delete(name),
    }


async def check_ends(tier: Tier, name: str, block: Block, ends: list[Any]) -> None:
    """Every call ended well or found nothing, and what is there now is right."""
    for end in ends:
        assert not isinstance(end, BaseException) or isinstance(end, MissingBlockError), repr(end)
        assert not isinstance(end, Block) or same(end, block)
    check_use(tier)
    if tier.size(name) is None:
        with pytest.raises(MissingBlockError):
            await tier.get(name)
    else:
        assert same(await tier.get(name), block)


class AtOnceTests(TierContract):
    """Concurrent calls, and a tier that is closed while it is in use."""

    @pytest.mark.parametrize("stagger", [0, 1, 5])
    @scenario()
    async def test_calls_about_one_block_in_every_order(self, tier: Tier, stagger: int) -> None:
        name, block = make_block(1, rows=64)
        calls = calls_of(tier, name, block)
        for order in itertools.product(_CALLS, repeat=3):
            begun = [_after(at * stagger, calls[call]) for at, call in enumerate(order)]
            ends = await asyncio.gather(*begun, return_exceptions=True)
            await check_ends(tier, name, block, ends)

    @scenario()
    async def test_many_calls_about_one_block(self, tier: Tier) -> None:
        name, block = make_block(1)
        calls = list(calls_of(tier, name, block).values())
        for round_ in range(10):
            begun = [calls[(round_ + i) % 3]() for i in range(9)]
            ends = await asyncio.gather(*begun, return_exceptions=True)
            await check_ends(tier, name, block, ends)

    @scenario(budget=1 << 22)
    async def test_deleting_what_is_being_read(self, tier: Tier) -> None:
        for seed in range(8):
            name, block = make_block(seed, rows=2048)
            await tier.put(name, block)
            begun = [tier.get(name), _after(seed, calls_of(tier, name, block)["delete"])]
            got, deleted = await asyncio.gather(*begun, return_exceptions=True)
            assert deleted is True
            await check_ends(tier, name, block, [got])
            assert tier.size(name) is None

    @scenario(budget=8192)
    async def test_the_budget_holds_at_every_moment(self, tier: Tier, tmp_path: Path) -> None:
        block_bytes = 2048
        writes = [asyncio.ensure_future(tier.put(*make_block(seed))) for seed in range(40)]
        while not all(write.done() for write in writes):
            use = tier.use()
            assert use.bytes <= use.budget
            assert self.medium_bytes(tmp_path) <= use.budget + block_bytes
            for name in tier.names()[:1]:
                await tier.delete(name)  # room comes while others wait for it
            await asyncio.sleep(0)
        ends = await asyncio.gather(*writes, return_exceptions=True)
        assert all(end is None or isinstance(end, NoSpaceError) for end in ends)
        check_use(tier)

    @scenario()
    async def test_closing_in_the_middle_of_everything(self, tier: Tier) -> None:
        old, new = ([make_block(seed) for seed in range(at, at + 8)] for at in (0, 8))
        for name, block in old:
            await tier.put(name, block)
        reads = [asyncio.ensure_future(tier.get(name)) for name, _ in old]
        writes = [asyncio.ensure_future(tier.put(name, block)) for name, block in new]
        await asyncio.sleep(0)
        await asyncio.wait_for(tier.close(), 30)
        ends = await asyncio.gather(*reads, *writes, return_exceptions=True)
        for (_, block), end in zip([*old, *new], ends, strict=True):
            assert not isinstance(end, BaseException) or isinstance(end, KVShareError)
            assert not isinstance(end, Block) or same(end, block)
