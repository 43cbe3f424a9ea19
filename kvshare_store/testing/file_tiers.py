"""More contract tests, for tiers that keep a block in a file."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import ClassVar

import pytest

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.errors import CorruptBlockError, MissingBlockError
from kvshare_store.testing.scenario import scenario
from kvshare_store.testing.tier_contract import check_use, damage_file, make_block, same
from kvshare_store.testing.tiers import Damage, PersistentTierTests


class FileTierTests(PersistentTierTests):
    """What lies in the medium is looked at through `file_of`, past the tier."""

    damages: ClassVar[frozenset[Damage]] = frozenset({"absent", "short", "corrupt"})

    async def damage(self, folder: Path, name: str, how: Damage) -> None:
        file = self.file_of(folder, name)
        if how == "absent":
            file.unlink()
        else:
            damage_file(file, {"short": "truncated", "corrupt": "last"}[how])

    def file_of(self, folder: Path, name: str) -> Path:
        """The file that holds a block, found without the tier's help."""
        raise NotImplementedError

    def unfinished(self, folder: Path) -> Path:
        """Where a write that was cut short leaves its file."""
        raise NotImplementedError

    def quarantined(self, folder: Path) -> list[Path]:
        """Files that were put away because they were corrupt."""
        raise NotImplementedError

    @scenario()
    async def test_use_counts_the_files(self, tier: Tier, tmp_path: Path) -> None:
        for seed in range(5):
            name, block = make_block(seed)
            await tier.put(name, block)
            assert tier.size(name) == self.file_of(tmp_path, name).stat().st_size

    @scenario()
    async def test_a_block_is_here_only_once_it_is_durable(
        self, tier: Tier, tmp_path: Path
    ) -> None:
        name, block = make_block(1, rows=512)
        writing = asyncio.ensure_future(tier.put(name, block))
        while not writing.done():
            if tier.size(name) is not None or name in tier.names():
                assert self.file_of(tmp_path, name).is_file()
            await asyncio.sleep(0)
        assert tier.size(name) is not None

    @pytest.mark.parametrize("damage", ["first", "header", "middle", "last", "truncated", "empty"])
    @scenario()
    async def test_damaged_bytes_are_noticed(self, tier: Tier, tmp_path: Path, damage: str) -> None:
        name, block = make_block(1)
        other, other_block = make_block(2)
        await tier.put(name, block)
        await tier.put(other, other_block)
        damage_file(self.file_of(tmp_path, name), damage)
        with pytest.raises(CorruptBlockError):
            await tier.get(name)
        assert not self.file_of(tmp_path, name).exists()
        assert len(self.quarantined(tmp_path)) == 1
        assert tier.size(name) is None
        with pytest.raises(MissingBlockError):
            await tier.get(name)
        check_use(tier)
        assert same(await tier.get(other), other_block)
        await tier.put(name, block)
        assert same(await tier.get(name), block)

    def test_damage_is_noticed_after_a_reopening(self, tmp_path: Path) -> None:
        name, block = make_block(1)

        async def fill(tier: Tier) -> None:
            await tier.put(name, block)

        async def look(tier: Tier) -> None:
            with pytest.raises(CorruptBlockError):
                await tier.get(name)
            assert tier.size(name) is None

        self.run(tmp_path, fill)
        damage_file(self.file_of(tmp_path, name), "last")
        self.run(tmp_path, look)

    @scenario()
    async def test_another_blocks_file_is_no_substitute(self, tier: Tier, tmp_path: Path) -> None:
        (name, block), (other, other_block) = make_block(1), make_block(2)
        await tier.put(name, block)
        await tier.put(other, other_block)
        self.file_of(tmp_path, name).write_bytes(self.file_of(tmp_path, other).read_bytes())
        with pytest.raises(CorruptBlockError):
            await tier.get(name)

    def test_unfinished_writes_are_swept_out(self, tmp_path: Path) -> None:
        name, block = make_block(1)

        async def fill(tier: Tier) -> None:
            await tier.put(name, block)

        async def look(tier: Tier) -> None:
            assert not leftover.exists()
            assert tier.names() == [name]

        self.run(tmp_path, fill)
        leftover = self.unfinished(tmp_path)
        leftover.write_bytes(b"half a block")
        self.run(tmp_path, look)

    @scenario()
    async def test_nobody_else_can_read_it(self, tier: Tier, tmp_path: Path) -> None:
        name, block = make_block(1)
        await tier.put(name, block)
        file = self.file_of(tmp_path, name)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
