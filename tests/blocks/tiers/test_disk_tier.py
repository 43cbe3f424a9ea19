"""The disk tier: files that others add or remove, and a folder with very many files."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from kvshare_store.blocks.tiers.base import Beside
from kvshare_store.blocks.tiers.disk import files, inventory
from kvshare_store.blocks.tiers.disk.inventory import Inventory
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.errors import CorruptBlockError, HomeError, NoSpaceError, StorageError
from kvshare_store.testing.tiers import check_use, damage_file, make_block, same
from tests.support.faulty_files import Fault, FaultyFiles, refusal, slow

ROOMY = 1 << 20


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan the folders before every put, as if no scan were recent enough."""
    monkeypatch.setattr(inventory, "_EVERY", 0.0)
    monkeypatch.setattr(inventory, "_REST", 0)


def file_of(folder: Path, name: str) -> Path:
    return folder / "blocks" / name[:2] / f"{name}.kvb"


# --- durable folders ----------------------------------------------------------------------------


def test_a_block_is_not_stored_before_the_folder_that_another_put_makes_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut takes the folder, and the block of a committed node with it."""
    first, second = (f"ab{at}" * 21 + "f" for at in "01")
    sync, reached, go_on = files.sync_folder, threading.Event(), threading.Event()
    durable: list[str] = []

    def slow_at_first(path: str) -> None:
        if path == str(tmp_path / "blocks") and not reached.is_set():
            reached.set()
            go_on.wait(30)
        sync(path)
        durable.append(path)

    async def scenario() -> None:
        tier = await DiskTier.open(tmp_path, ROOMY)
        monkeypatch.setattr(files, "sync_folder", slow_at_first)
        block = make_block(1)[1]
        makes = asyncio.create_task(tier.put(first, block))
        await asyncio.to_thread(reached.wait, 30)
        await tier.put(second, block)
        assert str(tmp_path / "blocks") in durable
        go_on.set()
        await makes
        await tier.close()

    asyncio.run(scenario())


# --- files of others ----------------------------------------------------------------------------


async def _two_writers(folder: Path) -> None:
    one, two = await DiskTier.open(folder, ROOMY), await DiskTier.open(folder, ROOMY)
    blocks = [make_block(seed) for seed in range(12)]
    both = [tier.put(*block) for block in blocks for tier in (one, two)]
    await asyncio.gather(*both)
    for name, block in blocks:
        assert same(await one.get(name), block)
        assert same(await two.get(name), block)
    assert len(list((folder / "blocks").glob("*/*"))) == 12
    assert list((folder / "tmp").iterdir()) == []
    check_use(one)
    assert one.use() == two.use()
    await one.close()
    await two.close()


@pytest.mark.usefixtures("hasty")
def test_two_writers_of_the_same_blocks(tmp_path: Path) -> None:
    asyncio.run(_two_writers(tmp_path))


@pytest.mark.usefixtures("hasty")
def test_what_another_writer_does_is_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, two = await DiskTier.open(tmp_path, ROOMY), await DiskTier.open(tmp_path, ROOMY)
        blocks = dict(make_block(seed) for seed in range(8))
        names = list(blocks)
        for name in names:
            await one.put(name, blocks[name])
        assert same(await two.get(names[0]), blocks[names[0]]), "asked for, it is looked for"
        other, other_block = make_block(99)
        await two.put(other, other_block)
        assert sorted(two.names()) == sorted([*names, other])
        check_use(two)
        await one.delete(names[1])
        await two.put(*make_block(100))
        assert two.size(names[1]) is None
        assert two.use().blocks == 9
        check_use(two)
        await one.put(*make_block(101))
        assert one.use().bytes == two.use().bytes + (one.size(make_block(101)[0]) or 0)
        await one.close()
        await two.close()

    asyncio.run(scenario())


@pytest.mark.usefixtures("hasty")
def test_the_budget_counts_what_other_writers_wrote(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, two = await DiskTier.open(tmp_path, 8192), await DiskTier.open(tmp_path, 8192)
        while (use := one.use()).bytes + 2048 < use.budget:
            await two.put(*make_block(2 * use.blocks))
            await one.put(*make_block(2 * use.blocks + 1))
        more = [two.put(*make_block(seed)) for seed in range(100, 104)]
        ends = await asyncio.gather(*more, return_exceptions=True)
        refused = [end for end in ends if end is not None]
        assert refused
        assert all(isinstance(end, NoSpaceError) for end in refused)
        assert sum(file.stat().st_size for file in (tmp_path / "blocks").glob("*/*")) <= 8192
        for name in one.names()[:2]:
            await one.delete(name)
        await two.put(*make_block(200))
        check_use(two)
        await one.close()
        await two.close()

    asyncio.run(scenario())


def test_a_bad_file_of_another_writer_is_written_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, two = await DiskTier.open(tmp_path, ROOMY), await DiskTier.open(tmp_path, ROOMY)
        two.names()
        name, block = make_block(1)
        await one.put(name, block)
        damage_file(file_of(tmp_path, name), "middle")
        await two.put(name, block)
        assert same(await two.get(name), block)
        assert same(await one.get(name), block)
        await one.close()
        await two.close()

    asyncio.run(scenario())


# --- the first look -----------------------------------------------------------------------------


async def _filled(folder: Path, count: int) -> list[str]:
    tier = await DiskTier.open(folder, ROOMY)
    blocks = [make_block(seed) for seed in range(count)]
    for at, (name, block) in enumerate(blocks):
        await tier.put(name, block)
        os.utime(file_of(folder, name), (1000 + at, 1000 + at))
    await tier.close()
    return [name for name, _ in blocks]


@pytest.fixture
def idle_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first scan pauses after each file, longer than any test, until its result is needed."""
    monkeypatch.setattr(inventory, "_PACE", 1)
    monkeypatch.setattr(inventory, "_PAUSE", 600.0)


@pytest.mark.usefixtures("idle_look")
def test_it_answers_while_it_is_still_looking(tmp_path: Path) -> None:
    async def scenario() -> None:
        names = await _filled(tmp_path, 20)
        tier = await DiskTier.open(tmp_path, ROOMY)
        assert tier.size(names[7]) == file_of(tmp_path, names[7]).stat().st_size
        assert tier.size(make_block(99)[0]) is None
        assert same(await tier.get(names[3]), make_block(3)[1])
        assert await tier.delete(names[4]) is True
        assert tier.use().blocks == 19
        assert tier.names() == [n for n in names if n not in (names[3], names[4])] + [names[3]]
        check_use(tier)
        await tier.close()

    asyncio.run(scenario())


@pytest.mark.usefixtures("idle_look")
def test_what_is_there_is_known_without_a_look_at_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        names = await _filled(tmp_path, 20)
        measured: list[str] = []
        measure = files.measure
        monkeypatch.setattr(files, "measure", lambda path: measured.append(path) or measure(path))
        tier = await DiskTier.open(tmp_path, ROOMY)
        assert all(tier.has(name) for name in names)
        assert not tier.has(make_block(99)[0])
        assert sum(path.endswith(".kvb") for path in measured) <= 1
        assert tier.use().blocks == 20
        check_use(tier)
        await tier.close()
        tier = await DiskTier.open(tmp_path, ROOMY)
        await tier.put(*make_block(99))
        assert tier.use().blocks == 21
        await tier.close()
        await (await DiskTier.open(tmp_path, ROOMY)).close()

    asyncio.run(scenario())


def test_a_put_waits_until_the_budget_is_known(tmp_path: Path) -> None:
    async def scenario() -> None:
        names = await _filled(tmp_path, 5)
        full = sum(file_of(tmp_path, name).stat().st_size for name in names)
        with FaultyFiles() as disk:
            disk.arm(slow(0.01))
            tier = await DiskTier.open(tmp_path, full)
            with pytest.raises(NoSpaceError):
                await tier.put(*make_block(99))
            await tier.close()

    asyncio.run(scenario())


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        names = await _filled(tmp_path, 5)
        unreadable = Fault("EIO", frozenset({"listdir", "stat"}), refusal(errno.EIO).happen)
        with FaultyFiles() as disk:
            tier = DiskTier(tmp_path, ROOMY, "none", None, Beside)
            tier.prepare()
            disk.arm(unreadable)
            tier.look_around()
            with pytest.raises(StorageError):
                tier.size(names[0])
            with pytest.raises(StorageError):
                tier.names()
            with pytest.raises(StorageError):
                await tier.put(*make_block(99))
            disk.heal()
        assert tier.size(names[0]) is not None
        await tier.put(*make_block(99))
        assert tier.use().blocks == 6
        check_use(tier)
        await tier.close()

    asyncio.run(scenario())


def test_what_happens_during_a_look_counts_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing is outdated when it is evaluated: a block was deleted and stored again since."""
    (tmp_path / "blocks" / "ab").mkdir(parents=True)
    known = Inventory(tmp_path / "blocks", ROOMY)
    back, new = "ab" * 32, "ab" + "cd" * 31
    known.add(back, 3)
    listed = files.names

    def late(folder: str) -> list[str]:
        names = listed(folder)
        if folder.endswith("ab"):
            for name in (back, new):
                Path(known.path(name)).write_bytes(b"abc")
                known.add(name, 3)
        return names

    monkeypatch.setattr(files, "names", late)
    known.look()
    assert known.names() == [back, new]
    assert (known.use().bytes, known.use().blocks) == (6, 2)


def test_calls_from_other_threads(tmp_path: Path) -> None:
    """The store calls from its callers' threads while the tier works in its own."""
    failed: list[BaseException] = []
    done = threading.Event()

    def ask(tier: DiskTier) -> None:
        try:
            while not done.is_set():
                for name in tier.names():
                    tier.touch(name)
                    tier.size(name)
                tier.use()
        except BaseException as error:
            failed.append(error)
            raise

    async def scenario() -> None:
        tier = await DiskTier.open(tmp_path, ROOMY)
        asking = threading.Thread(target=ask, args=(tier,))
        asking.start()
        for seed in range(60):
            name, block = make_block(seed)
            await tier.put(name, block)
            if seed % 3 == 0:
                await tier.delete(name)
        done.set()
        await asyncio.to_thread(asking.join)
        check_use(tier)
        await tier.close()

    asyncio.run(scenario())
    assert not failed


# --- the rest -----------------------------------------------------------------------------------


def test_a_caller_that_gives_up_leaves_no_half_written_block(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = await DiskTier.open(tmp_path, ROOMY)
        tier.use()
        name, block = make_block(1)
        buffer = bytearray(block.data)
        lent = type(block)(block.namespace, block.layout, memoryview(buffer))
        with FaultyFiles() as disk:
            disk.arm(slow(0.01))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(tier.put(name, lent), 0.03)
            buffer[:] = bytes(len(buffer))  # it is the caller's again
            disk.heal()
        assert same(await tier.get(name), block)
        check_use(tier)
        await tier.close()

    asyncio.run(scenario())


def test_a_closed_tier_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = await DiskTier.open(tmp_path, ROOMY)
        await tier.close()
        with pytest.raises(StorageError):
            await tier.get(make_block(1)[0])
        with pytest.raises(StorageError):
            await tier.put(*make_block(1))

    asyncio.run(scenario())


def test_quarantine_does_not_grow_without_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = await DiskTier.open(tmp_path, ROOMY)
        for seed in range(40):
            name, block = make_block(seed)
            await tier.put(name, block)
            damage_file(file_of(tmp_path, name), "last")
            with pytest.raises(CorruptBlockError):
                await tier.get(name)
        kept = {file.name for file in (tmp_path / "quarantine").iterdir()}
        assert len(kept) == 32
        assert make_block(39)[0] in kept
        await tier.close()

    asyncio.run(scenario())


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blocks").write_text("not a folder")
    (tmp_path / "tmp").write_text("not a folder")
    with pytest.raises(HomeError):
        asyncio.run(DiskTier.open(tmp_path, ROOMY))


def test_everything_is_the_owners_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = await DiskTier.open(tmp_path / "deep" / "home", ROOMY)
        name, block = make_block(1)
        await tier.put(name, block)
        bad, bad_block = make_block(2)
        await tier.put(bad, bad_block)
        damage_file(file_of(tmp_path / "deep" / "home", bad), "last")
        with pytest.raises(CorruptBlockError):
            await tier.get(bad)
        for found in (tmp_path / "deep" / "home").rglob("*"):
            assert found.stat().st_mode & 0o777 == (0o700 if found.is_dir() else 0o600), found
        assert (tmp_path / "deep" / "home").stat().st_mode & 0o777 == 0o700
        await tier.close()

    before = os.umask(0)
    try:
        asyncio.run(scenario())
    finally:
        os.umask(before)
