"""The disk tier through aiofiles writes the same files."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.data import kv_blocks
from benchmarks.store import async_files
from kvshare_store.blocks.tiers.disk.tier import DiskTier


def test_both_ways_with_files_leave_the_same_files(tmp_path: Path) -> None:
    """Byte for byte, at the same paths; each implementation reads what the other wrote."""
    named = kv_blocks.random_blocks(2)

    async def written(kind: type[DiskTier], folder: Path) -> dict[str, bytes]:
        tier = await kind.open(folder, 1 << 24)
        for name, block in named:
            await tier.put(name, block)
        for name, block in named:
            assert (await tier.get(name)).data == block.data
        await tier.close()
        found = (folder / "blocks").glob("*/*")
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    async def read(kind: type[DiskTier], folder: Path) -> None:
        tier = await kind.open(folder, 1 << 24)
        for name, block in named:
            assert (await tier.get(name)).data == block.data
        await tier.close()

    ours = asyncio.run(written(DiskTier, tmp_path / "ours"))
    theirs = asyncio.run(written(async_files.AsyncDiskTier, tmp_path / "theirs"))
    assert ours == theirs
    assert len(ours) == 2
    asyncio.run(read(DiskTier, tmp_path / "theirs"))
    asyncio.run(read(async_files.AsyncDiskTier, tmp_path / "ours"))
