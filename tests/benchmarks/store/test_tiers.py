"""Every arm puts, gets and deletes everything."""

from __future__ import annotations

from pathlib import Path

from benchmarks.data import kv_blocks
from benchmarks.store import media, tiers
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.host.arena import Arena
from kvshare_store.blocks.tiers.host.tier import HostTier


def test_arms_put_and_get_everything(tmp_path: Path) -> None:
    named = kv_blocks.random_blocks(2)
    kept: list[Tier] = []

    async def make() -> Tier:
        kept.append(HostTier(Arena.create(1 << 23)))
        return kept[-1]

    (tmp_path / "files").mkdir()
    for arm in (
        media.memcpy(named),
        tiers.through(make, named, lambda: None),
        media.raw_files(tmp_path / "files", named),
    ):
        put, got = arm()
        assert put > 0
        assert got > 0
    assert list((tmp_path / "files").iterdir()) == []
    assert kept[0].use().blocks == 0
