"""Every tier and every wrapper passes the contract tests. A tier without a class here fails a
test."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvshare_store.blocks.tiers import wrappers
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.disk import tier as disk
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.blocks.tiers.host import tier as host
from kvshare_store.blocks.tiers.host.arena import Arena
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.blocks.tiers.wrappers import WrapperTier
from kvshare_store.errors import NoSpaceError, StorageError
from kvshare_store.testing.file_tiers import FileTierTests
from kvshare_store.testing.tiers import Damage, TierTests, make_block, same
from tests.support import faulty
from tests.support.faulty import FaultyTier, SlowTier
from tests.support.faulty_files import FaultyFiles, refusal, slow


def size_of(file: Path) -> int:
    """Size of a file in bytes; 0 if it has gone."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


class TestHostTier(TierTests):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return HostTier(Arena.create(budget))


class _OnDisk(FileTierTests):
    damages = FileTierTests.damages | {"slow", "refused"}

    async def damage(self, folder: Path, name: str, how: Damage) -> None:
        if how in ("slow", "refused"):
            self._disk = FaultyFiles().__enter__()
            self._disk.arm(slow(0.05) if how == "slow" else refusal(errno.EIO))
        else:
            await super().damage(folder, name, how)

    async def heal(self, folder: Path) -> None:
        if hasattr(self, "_disk"):
            self._disk.__exit__()

    def medium_bytes(self, folder: Path) -> int:
        return sum(size_of(file) for file in folder.glob("blocks/*/*")) + sum(
            size_of(file) for file in (folder / "tmp").iterdir()
        )

    def file_of(self, folder: Path, name: str) -> Path:
        return folder / "blocks" / name[:2] / f"{name}.kvb"

    def unfinished(self, folder: Path) -> Path:
        return folder / "tmp" / "0123"

    def quarantined(self, folder: Path) -> list[Path]:
        return list((folder / "quarantine").iterdir())


class TestDiskTier(_OnDisk):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return await DiskTier.open(folder, budget)


class TestCompressedDiskTier(_OnDisk):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return await DiskTier.open(folder, budget, "zstd")


class TestFaultyTier(_OnDisk):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return FaultyTier(await DiskTier.open(folder, budget))

    def test_it_fails_when_told_to(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            assert isinstance(tier, FaultyTier)
            name, block = make_block(1)
            tier.fail("put", NoSpaceError("full"), skip=1, times=2)
            await tier.put(name, block)
            for _ in range(2):
                with pytest.raises(NoSpaceError):
                    await tier.put(name, block)
            await tier.put(name, block)
            tier.fail_always("get", StorageError("broken"))
            for _ in range(3):
                with pytest.raises(StorageError):
                    await tier.get(name)
            tier.fail_always("get", None)
            assert same(await tier.get(name), block)
            assert tier.calls == {"put": 4, "get": 4}

        self.run(tmp_path, scenario)


class TestSlowTier(_OnDisk):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return SlowTier(await DiskTier.open(folder, budget), put=1e-3, get=1e-3, delete=1e-3)


class TestSlowHostTier(TierTests):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        return SlowTier(HostTier(Arena.create(budget)), get=1e-3)


def test_every_tier_has_a_class_here() -> None:
    here = {
        HostTier: TestHostTier,
        DiskTier: TestDiskTier,
        FaultyTier: TestFaultyTier,
        SlowTier: TestSlowTier,
    }
    found = {
        kind
        for module in (disk, host, wrappers, faulty)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Tier)
    }
    # those around a remote are tested on real servers, in test_remotes.py
    around = {wrappers.RetryTier, wrappers.DeadlineTier, wrappers.HedgedTier, wrappers.BreakerTier}
    never_done = {faulty.GatedTier}  # until its gate opens
    assert found - {Tier, WrapperTier} - around - never_done == set(here)
