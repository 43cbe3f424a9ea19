"""What the contract tests of tiers share: blocks, a tier to test, and checks of its state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import blake3
import msgspec

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.tensors.frame import Block
from kvshare_store.tensors.layout import KVLayout

LAYOUT = KVLayout(2, 1, 4, "float32")
NAMESPACE = blake3.blake3(b"tier tests").hexdigest()
ROOMY = 1 << 20
ABSENT = blake3.blake3(b"never stored").hexdigest()

Scenario = Callable[[Tier], Awaitable[None]]


def make_block(seed: int, rows: int = 8, namespace: str = NAMESPACE) -> tuple[str, Block]:
    """A block of `rows` rows with bytes that depend on `seed`, and its name."""
    data = blake3.blake3(f"rows {seed}".encode()).digest(length=rows * LAYOUT.row_bytes)
    # spelled out here and not taken from the store: the name is part of the contract
    hasher = blake3.blake3(msgspec.msgpack.encode((namespace, LAYOUT)))
    hasher.update(data)
    return hasher.hexdigest(), Block(namespace, LAYOUT, data)


def same(found: Block, stored: Block) -> bool:
    """Equal in namespace, layout and every byte."""
    return (found.namespace, found.layout) == (stored.namespace, stored.layout) and bytes(
        found.data
    ) == bytes(stored.data)


async def _conducted(tier: Tier, scenario: Scenario) -> None:
    try:
        await scenario(tier)
    finally:
        await tier.close()


class TierContract:
    """Makes the tier under test and runs scenarios against it."""

    async def make_tier(self, folder: Path, budget: int) -> Tier:
        """A tier with its data under `folder`; a persistent one finds there what it left."""
        raise NotImplementedError

    def run(self, folder: Path, scenario: Scenario, budget: int = ROOMY) -> None:
        """Run one scenario against a tier made for it."""

        async def conduct() -> None:
            await _conducted(await self.make_tier(folder, budget), scenario)

        asyncio.run(conduct())

    def medium_bytes(self, folder: Path) -> int:
        """Bytes of blocks in the medium, unfinished ones included, counted without the tier's help.

        0 where nothing but the tier can look.
        """
        return 0


def check_use(tier: Tier) -> None:
    """`use`, `size` and `names` tell the same story, within the budget."""
    use, names = tier.use(), tier.names()
    assert len(names) == len(set(names)) == use.blocks
    assert sum(tier.size(name) or 0 for name in names) == use.bytes
    assert all(tier.has(name) for name in names)
    assert use.bytes <= use.budget


def damage_file(file: Path, how: str) -> None:
    """Flip one bit (`first`, `header`, `middle`, `last` byte), or cut the file."""
    data = bytearray(file.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data.clear()
    else:
        at = {"first": 0, "header": 20, "middle": len(data) // 2, "last": len(data) - 1}[how]
        data[at] ^= 0x10
    file.write_bytes(bytes(data))
