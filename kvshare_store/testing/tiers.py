"""The law of tiers: what every tier and every wrapper around one must do.

Subclass `TierTests` (or `PersistentTierTests`) in a test module and supply `make_tier`; the laws
are inherited. A law talks to the tier through its interface only; what lies in the medium is looked
at through `file_of`, past the tier.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import blake3
import msgspec
import pytest

from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.errors import CorruptBlockError, MissingBlockError, NoSpaceError
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
    # spelled out here and not taken from the store: the name is part of the law
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


class TierTests:
    """Laws of every tier."""

    async def make_tier(self, folder: Path, budget: int) -> Tier:
        """A tier with its data under `folder`; a persistent one finds there what it left."""
        raise NotImplementedError

    def law(self, folder: Path, scenario: Scenario, budget: int = ROOMY) -> None:
        """Run one scenario against a tier made for it."""

        async def conduct() -> None:
            await _conducted(await self.make_tier(folder, budget), scenario)

        asyncio.run(conduct())

    # --- put and get --------------------------------------------------------------------------

    @pytest.mark.parametrize("rows", [1, 7, 64])
    def test_what_was_put_is_got(self, tmp_path: Path, rows: int) -> None:
        async def scenario(tier: Tier) -> None:
            name, block = make_block(1, rows)
            await tier.put(name, block)
            assert same(await tier.get(name), block)

        self.law(tmp_path, scenario)

    def test_put_is_idempotent(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            name, block = make_block(1)
            await tier.put(name, block)
            before = tier.use()
            await tier.put(name, block)
            assert tier.use() == before
            assert tier.names() == [name]
            assert same(await tier.get(name), block)

        self.law(tmp_path, scenario)

    def test_an_absent_block_is_missing(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            with pytest.raises(MissingBlockError):
                await tier.get(ABSENT)
            name, block = make_block(1)
            await tier.put(name, block)
            await tier.delete(name)
            with pytest.raises(MissingBlockError):
                await tier.get(name)

        self.law(tmp_path, scenario)

    def test_put_does_not_keep_the_callers_buffer(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            name, block = make_block(1)
            buffer = bytearray(block.data)
            await tier.put(name, Block(block.namespace, block.layout, memoryview(buffer)))
            buffer[:] = bytes(len(buffer))
            assert same(await tier.get(name), block)

        self.law(tmp_path, scenario)

    def test_what_was_got_belongs_to_the_caller(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            name, block = make_block(1)
            await tier.put(name, block)
            got = await tier.get(name)
            await tier.delete(name)
            for seed in range(2, 6):  # whatever room it had is used for something else
                await tier.put(*make_block(seed))
            assert same(got, block)

        self.law(tmp_path, scenario)

    # --- delete ---------------------------------------------------------------------------------

    def test_delete_says_whether_it_was_there(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
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

        self.law(tmp_path, scenario)

    # --- what is there --------------------------------------------------------------------------

    def test_size_names_and_use_agree(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            assert (tier.use().bytes, tier.use().blocks, tier.names()) == (0, 0, [])
            assert tier.size(ABSENT) is None
            blocks = [make_block(seed, rows) for seed, rows in ((1, 1), (2, 8), (3, 64), (4, 7))]
            for name, block in blocks:
                await tier.put(name, block)
                check_use(tier)
            assert sorted(tier.names()) == sorted(name for name, _ in blocks)
            for name, block in blocks:
                size = tier.size(name)
                assert size is not None
                assert size >= len(block.data) or tier.properties.persistent  # may be compressed
            for name, _ in blocks:
                await tier.delete(name)
                assert tier.size(name) is None
                check_use(tier)
            assert tier.use().bytes == 0

        self.law(tmp_path, scenario)

    def test_touch_puts_a_block_last(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
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

        self.law(tmp_path, scenario)

    # --- the budget -----------------------------------------------------------------------------

    def test_a_full_tier_refuses_and_loses_nothing(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
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

        self.law(tmp_path, scenario, budget=8192)

    def test_a_block_larger_than_the_budget_is_refused(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            with pytest.raises(NoSpaceError):
                await tier.put(*make_block(1, rows=512))
            assert (tier.use().bytes, tier.names()) == (0, [])

        self.law(tmp_path, scenario, budget=8192)

    def test_concurrent_puts_share_one_budget(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            blocks = [make_block(seed) for seed in range(40)]
            ended = await asyncio.gather(
                *(tier.put(name, block) for name, block in blocks), return_exceptions=True
            )
            assert {type(end) for end in ended} == {type(None), NoSpaceError}
            check_use(tier)
            for (name, block), end in zip(blocks, ended, strict=True):
                if end is None:
                    assert same(await tier.get(name), block)
                else:
                    assert tier.size(name) is None

        self.law(tmp_path, scenario, budget=8192)

    # --- at the same time -------------------------------------------------------------------------

    def test_one_block_put_got_and_deleted_at_once(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            name, block = make_block(1)
            makers: list[Callable[[], Awaitable[Any]]] = [
                lambda: tier.put(name, block),
                lambda: tier.get(name),
                lambda: tier.delete(name),
            ]
            for round_ in range(10):
                calls = [makers[(round_ + i) % 3]() for i in range(9)]
                for end in await asyncio.gather(*calls, return_exceptions=True):
                    assert not isinstance(end, BaseException) or isinstance(end, MissingBlockError)
                    assert not isinstance(end, Block) or same(end, block)
                check_use(tier)
                if tier.size(name) is None:
                    with pytest.raises(MissingBlockError):
                        await tier.get(name)
                else:
                    assert same(await tier.get(name), block)

        self.law(tmp_path, scenario)


def check_use(tier: Tier) -> None:
    """`use`, `size` and `names` tell the same story, within the budget."""
    use, names = tier.use(), tier.names()
    assert len(names) == len(set(names)) == use.blocks
    assert sum(tier.size(name) or 0 for name in names) == use.bytes
    assert use.bytes <= use.budget


class PersistentTierTests(TierTests):
    """Further laws of tiers whose blocks survive the process."""

    def file_of(self, folder: Path, name: str) -> Path:
        """The file that holds a block, found without the tier's help."""
        raise NotImplementedError

    def unfinished(self, folder: Path) -> Path:
        """Where a write that was cut short leaves its file."""
        raise NotImplementedError

    def quarantined(self, folder: Path) -> list[Path]:
        """Files that were put away because they were corrupt."""
        raise NotImplementedError

    def test_its_properties_say_so(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            assert tier.properties.persistent

        self.law(tmp_path, scenario)

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

        self.law(tmp_path, fill)
        self.law(tmp_path, look)

    def test_use_counts_the_files(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            for seed in range(5):
                name, block = make_block(seed)
                await tier.put(name, block)
                assert tier.size(name) == self.file_of(tmp_path, name).stat().st_size

        self.law(tmp_path, scenario)

    def test_a_block_is_here_only_once_it_is_durable(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            name, block = make_block(1, rows=512)
            writing = asyncio.ensure_future(tier.put(name, block))
            while not writing.done():
                if tier.size(name) is not None or name in tier.names():
                    assert self.file_of(tmp_path, name).is_file()
                await asyncio.sleep(0)
            assert tier.size(name) is not None

        self.law(tmp_path, scenario)

    @pytest.mark.parametrize("damage", ["first", "header", "middle", "last", "truncated", "empty"])
    def test_damaged_bytes_are_noticed(self, tmp_path: Path, damage: str) -> None:
        name, block = make_block(1)
        other, other_block = make_block(2)

        async def scenario(tier: Tier) -> None:
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

        self.law(tmp_path, scenario)

    def test_damage_is_noticed_after_a_reopening(self, tmp_path: Path) -> None:
        name, block = make_block(1)

        async def fill(tier: Tier) -> None:
            await tier.put(name, block)

        async def look(tier: Tier) -> None:
            with pytest.raises(CorruptBlockError):
                await tier.get(name)
            assert tier.size(name) is None

        self.law(tmp_path, fill)
        damage_file(self.file_of(tmp_path, name), "last")
        self.law(tmp_path, look)

    def test_another_blocks_file_is_no_substitute(self, tmp_path: Path) -> None:
        (name, block), (other, other_block) = make_block(1), make_block(2)

        async def scenario(tier: Tier) -> None:
            await tier.put(name, block)
            await tier.put(other, other_block)
            self.file_of(tmp_path, name).write_bytes(self.file_of(tmp_path, other).read_bytes())
            with pytest.raises(CorruptBlockError):
                await tier.get(name)

        self.law(tmp_path, scenario)

    def test_a_file_that_was_taken_away_is_missing(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            name, block = make_block(1)
            await tier.put(name, block)
            self.file_of(tmp_path, name).unlink()
            with pytest.raises(MissingBlockError):
                await tier.get(name)
            assert tier.size(name) is None
            check_use(tier)

        self.law(tmp_path, scenario)

    def test_unfinished_writes_are_swept_out(self, tmp_path: Path) -> None:
        name, block = make_block(1)

        async def fill(tier: Tier) -> None:
            await tier.put(name, block)

        async def look(tier: Tier) -> None:
            assert not leftover.exists()
            assert tier.names() == [name]

        self.law(tmp_path, fill)
        leftover = self.unfinished(tmp_path)
        leftover.write_bytes(b"half a block")
        self.law(tmp_path, look)

    def test_nobody_else_can_read_it(self, tmp_path: Path) -> None:
        async def scenario(tier: Tier) -> None:
            name, block = make_block(1)
            await tier.put(name, block)
            file = self.file_of(tmp_path, name)
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700

        self.law(tmp_path, scenario)


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
