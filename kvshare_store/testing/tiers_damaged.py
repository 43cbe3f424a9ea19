"""Absent, short and corrupt blocks: a part of `kvshare_store.testing.tiers.TierTests`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.errors import (
    CorruptBlockError,
    DeadlineError,
    KVShareError,
    MissingBlockError,
    ShortBlockError,
    StorageError,
    UnavailableError,
)
from kvshare_store.tensors.frame import Block
from kvshare_store.testing.scenario import scenario
from kvshare_store.testing.tier_contract import TierContract, check_use, make_block, same

Damage = Literal["absent", "short", "corrupt", "slow", "refused"]
"""What may happen to a block in its medium: gone, cut off, other bytes; or to the medium: it does
not answer in time, it answers with an error."""
_ENDS: dict[Damage, set[type[KVShareError]]] = {
    "absent": {MissingBlockError},
    "short": {ShortBlockError},
    "corrupt": {CorruptBlockError},
    "slow": {DeadlineError},
    "refused": {UnavailableError, StorageError},
}


class DamageTests(TierContract):
    """What a tier says when a block, or the whole medium, is not as it should be."""

    damages: ClassVar[frozenset[Damage]] = frozenset()
    """What `damage` can do; tests of the rest are skipped, with that as their reason."""

    async def damage(self, folder: Path, name: str, how: Damage) -> None:
        """Do that to block `name`, or to the whole medium, past the tier."""
        raise NotImplementedError

    async def heal(self, folder: Path) -> None:
        """End what `damage` did to the whole medium."""

    @pytest.mark.parametrize("how", list(_ENDS))
    @scenario()
    async def test_what_is_wrong_is_told_apart(
        self, tier: Tier, tmp_path: Path, how: Damage
    ) -> None:
        if how not in self.damages:
            pytest.skip(f"nothing past this tier can make a block {how}")
        (name, block), (other, other_block) = make_block(1), make_block(2)
        await tier.put(name, block)
        await tier.put(other, other_block)
        await self.damage(tmp_path, name, how)
        (end,) = await asyncio.gather(tier.get(name), return_exceptions=True)
        await self.heal(tmp_path)
        if how == "slow" and isinstance(end, Block):
            assert same(end, block)
        else:
            assert type(end) in _ENDS[how], repr(end)
        assert same(await tier.get(other), other_block)
        if how in ("slow", "refused"):
            assert same(await tier.get(name), block), "nothing happened to the block"
        else:
            await self._is_gone_and_comes_back(tier, name, block)

    async def _is_gone_and_comes_back(self, tier: Tier, name: str, block: Block) -> None:
        assert tier.size(name) is None
        check_use(tier)
        with pytest.raises(MissingBlockError):
            await tier.get(name)
        await tier.put(name, block)
        assert same(await tier.get(name), block)
