"""Contract tests of remotes: what every engine behind `Remote` must do.

Subclass `RemoteTests` in a test module and supply `make_remote`; subclass
`kvshare_store.testing.tiers.PersistentTierTests` over a `RemoteTier` on the same engine as well.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import blake3
import pytest

from kvshare_store.blocks.remotes.base import Remote
from kvshare_store.errors import MissingBlockError, StorageError, UnsupportedError
from kvshare_store.testing.scenario import scenario
from kvshare_store.testing.tiers import Damage

Scenario = Callable[[Remote], Awaitable[None]]


def value_of(seed: int, nbytes: int = 1000) -> bytes:
    """Bytes that depend on `seed`."""
    return blake3.blake3(f"value {seed}".encode()).digest(length=nbytes)


async def entries(remote: Remote, prefix: str) -> dict[str, int]:
    """Sizes by key of what `list` finds; each key once."""
    found = [entry async for entry in remote.list(prefix)]
    assert len({entry.key for entry in found}) == len(found)
    return {entry.key: entry.nbytes for entry in found}


async def spoil(remote: Remote, key: str, how: Damage) -> None:
    """Make a value absent, short or corrupt with the engine's own means."""
    value = bytes(await remote.get(key))
    await remote.delete(key)
    if how == "short":
        await remote.put(key, (value[: len(value) // 2],))
    elif how == "corrupt":
        await remote.put(key, (value[:-1], bytes([value[-1] ^ 0x10])))


class RemoteTests:
    """Every remote passes these."""

    def make_remote(self, folder: Path) -> Remote:
        """A remote on a corner of the engine that belongs to `folder` alone."""
        raise NotImplementedError

    def run(self, folder: Path, scenario: Scenario) -> None:
        """Run one scenario against a remote made for it."""

        async def conduct() -> None:
            remote = self.make_remote(folder)
            try:
                await scenario(remote)
            finally:
                await remote.close()

        asyncio.run(conduct())

    @scenario()
    async def test_parts_become_one_value(self, remote: Remote) -> None:
        head, payload = value_of(1), memoryview(bytearray(value_of(2, 300_000)))
        await remote.put("blocks/a/1", (head, payload))
        assert bytes(await remote.get("blocks/a/1")) == head + bytes(payload)
        await remote.put("blocks/a/2", (head,))
        assert bytes(await remote.get("blocks/a/2")) == head

    @scenario()
    async def test_put_is_idempotent(self, remote: Remote) -> None:
        for _ in range(3):
            await remote.put("blocks/a/1", (value_of(1),))
        assert bytes(await remote.get("blocks/a/1")) == value_of(1)
        await remote.delete("blocks/a/1")
        with pytest.raises(MissingBlockError):
            await remote.get("blocks/a/1")

    @scenario()
    async def test_a_buffer_is_not_looked_at_after_a_cancellation(self, remote: Remote) -> None:
        await remote.put("warm/up", (b"1",))
        for seed in range(5):
            key, buffer = f"blocks/a/{seed}", bytearray(value_of(seed, 2 << 20))
            put = asyncio.ensure_future(remote.put(key, (memoryview(buffer),)))
            for _ in range(seed):
                await asyncio.sleep(0)
            put.cancel()
            await asyncio.gather(put, return_exceptions=True)
            buffer[:] = bytes(len(buffer))
            await asyncio.sleep(0.05)
            with contextlib.suppress(MissingBlockError):
                assert bytes(await remote.get(key)) == value_of(seed, 2 << 20)

    @scenario()
    async def test_absent_is_missing_and_deleting_it_is_fine(self, remote: Remote) -> None:
        with pytest.raises(MissingBlockError):
            await remote.get("blocks/a/1")
        await remote.delete("blocks/a/1")
        await remote.put("blocks/a/1", (value_of(1),))
        await remote.delete("blocks/a/1")
        with pytest.raises(MissingBlockError):
            await remote.get("blocks/a/1")

    @scenario()
    async def test_list_and_delete_keep_to_the_prefix(self, remote: Remote) -> None:
        keys = ["blocks/a/1", "blocks/a/2", "blocks/ab/1", "blocks/b/1", "other/a/1"]
        for seed, key in enumerate(keys):
            await remote.put(key, (value_of(seed, 100 + seed),))
        if remote.properties.listing:
            assert await entries(remote, "blocks/a/") == {keys[0]: 100, keys[1]: 101}
            assert set(await entries(remote, "blocks/")) == set(keys[:4])
            assert set(await entries(remote, "")) == set(keys)
        else:
            with pytest.raises(UnsupportedError):
                await entries(remote, "")
        assert await remote.delete_prefix("blocks/a/") == 2
        assert await remote.delete_prefix("blocks/a/") == 0
        for seed, key in enumerate(keys[2:], 2):
            assert bytes(await remote.get(key)) == value_of(seed, 100 + seed)
        for key in keys[:2]:
            with pytest.raises(MissingBlockError):
                await remote.get(key)

    @scenario()
    async def test_long_lists_are_complete(self, remote: Remote) -> None:
        keys = [f"blocks/a/{number}" for number in range(1200)]
        # alone: rclone's server may refuse objects that come while it makes their folder
        await remote.put(keys[0], (b"value",))
        for start in range(1, len(keys), 50):
            page = keys[start : start + 50]
            await asyncio.gather(*(remote.put(key, (b"value",)) for key in page))
        if remote.properties.listing:
            assert set(await entries(remote, "blocks/a/")) == set(keys)
        assert await remote.delete_prefix("blocks/") == len(keys)

    @scenario()
    async def test_whole_values_or_none_while_they_come_and_go(self, remote: Remote) -> None:
        """Nobody reads half a value, whoever puts and removes it meanwhile; an engine may refuse
        calls that collide."""
        value, whole = value_of(1, 200_000), 0

        async def write() -> None:
            for _ in range(10):
                with contextlib.suppress(StorageError):
                    await remote.put("blocks/a/1", (value,))
                    await asyncio.sleep(0.002)
                    await remote.delete("blocks/a/1")

        async def read() -> None:
            nonlocal whole
            for _ in range(20):
                with contextlib.suppress(MissingBlockError, StorageError):
                    assert bytes(await remote.get("blocks/a/1")) == value
                    whole += 1

        await asyncio.gather(write(), write(), read(), read())
        await remote.put("blocks/a/1", (value,))
        await read()
        assert whole >= 20
