"""What the remote tier knows, shares, quarantines and purges; addresses of remotes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.remotes import objects, open_remote
from kvshare_store.blocks.remotes.base import Entry, Part, Remote
from kvshare_store.blocks.remotes.urls import parse_url
from kvshare_store.blocks.tiers.remote import RemoteTier
from kvshare_store.errors import (
    ConfigError,
    CorruptBlockError,
    MissingBlockError,
    NoSpaceError,
    ShortBlockError,
    StorageError,
    UnsupportedError,
)
from kvshare_store.tensors.frame import encode_frame
from kvshare_store.testing.remotes import entries, spoil
from kvshare_store.testing.tiers import NAMESPACE, check_use, make_block, same

NAME, BLOCK = make_block(1)
KEY = f"blocks/{NAMESPACE}/{NAME}"


def run(folder: Path, scenario: Callable[[RemoteTier, RemoteTier], Awaitable[None]]) -> None:
    """A scenario with the tiers of two machines on one shared folder."""

    async def conduct() -> None:
        one, two = (RemoteTier(open_remote(f"file://{folder}/shared")) for _ in range(2))
        try:
            await scenario(one, two)
        finally:
            await one.close()
            await two.close()

    asyncio.run(conduct())


# --- what is known --------------------------------------------------------------------------------


def test_a_block_of_another_machine_is_found_by_being_told(tmp_path: Path) -> None:
    async def scenario(one: RemoteTier, two: RemoteTier) -> None:
        await one.put(NAME, BLOCK)
        assert two.size(NAME) is None
        with pytest.raises(MissingBlockError):
            await two.get(NAME)
        two.expect(NAME, NAMESPACE, 1)
        assert two.size(NAME) == 1
        assert same(await two.get(NAME), BLOCK)
        assert two.size(NAME) == one.size(NAME), "now the size is known"
        two.expect(NAME, NAMESPACE, 1)
        assert two.use().bytes == one.use().bytes, "being told again changes nothing"

    run(tmp_path, scenario)


def test_what_another_put_is_read_and_removed(tmp_path: Path) -> None:
    async def scenario(one: RemoteTier, two: RemoteTier) -> None:
        await one.put(NAME, BLOCK)
        two.expect(NAME, NAMESPACE, 1)
        assert same(await two.get(NAME), BLOCK)
        assert two.names() == [NAME]
        assert await two.delete(NAME) is True
        with pytest.raises(MissingBlockError):
            await one.get(NAME)
        assert (one.names(), one.use().bytes) == ([], 0)

    run(tmp_path, scenario)


def test_discover_lists_what_others_put_but_not_what_is_in_quarantine(tmp_path: Path) -> None:
    async def scenario(one: RemoteTier, two: RemoteTier) -> None:
        blocks = [make_block(seed, 4, space) for seed in range(4) for space in ("a" * 64, "b" * 64)]
        for name, block in blocks:
            await one.put(name, block)
        await one.remote.put(f"quarantine/{NAMESPACE}/{NAME}", (b"bad",))
        assert await two.discover() == len(blocks)
        assert await two.discover() == 0
        assert sorted(two.names()) == sorted(one.names())
        assert two.use().bytes == one.use().bytes
        for name, block in blocks:
            assert same(await two.get(name), block)

    run(tmp_path, scenario)


def test_forgetting_leaves_the_block_to_the_others(tmp_path: Path) -> None:
    async def scenario(one: RemoteTier, two: RemoteTier) -> None:
        await one.put(NAME, BLOCK)
        one.forget(NAME)
        one.forget(NAME)
        assert (one.names(), one.use().bytes) == ([], 0)
        two.expect(NAME, NAMESPACE, 1)
        assert same(await two.get(NAME), BLOCK)

    run(tmp_path, scenario)


# --- what is bad ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["short", "corrupt"])
def test_bad_bytes_are_put_away_for_everybody(tmp_path: Path, how: str) -> None:
    kind = {"short": ShortBlockError, "corrupt": CorruptBlockError}[how]

    async def scenario(one: RemoteTier, two: RemoteTier) -> None:
        await one.put(NAME, BLOCK)
        two.expect(NAME, NAMESPACE, 1)
        await spoil(one.remote, KEY, how)  # type: ignore[arg-type]
        bad = bytes(await one.remote.get(KEY))
        with pytest.raises(kind):
            await two.get(NAME)
        assert two.quarantined == 1
        assert two.names() == []
        assert set(await entries(one.remote, "")) == {f"quarantine/{NAMESPACE}/{NAME}"}
        assert bytes(await one.remote.get(f"quarantine/{NAMESPACE}/{NAME}")) == bad
        with pytest.raises(MissingBlockError):
            await one.get(NAME)
        await one.put(NAME, BLOCK)
        assert same(await one.get(NAME), BLOCK)

    run(tmp_path, scenario)


def test_a_machine_with_another_setting_does_not_remove_what_it_cannot_read(tmp_path: Path) -> None:
    keys = {None: NAME, lambda digest: bytes(32): make_block(2)[0]}

    async def conduct() -> None:
        plain, sealed = (
            RemoteTier(open_remote(f"file://{tmp_path}/shared"), key=key) for key in keys
        )
        other, other_block = make_block(2)
        await plain.put(NAME, BLOCK)
        await sealed.put(other, other_block)
        for tier, name in ((plain, other), (sealed, NAME)):
            tier.expect(name, NAMESPACE, 1)
            with pytest.raises(CorruptBlockError, match="setting"):
                await tier.get(name)
            assert (tier.quarantined, tier.size(name)) == (0, None)
        assert same(await plain.get(NAME), BLOCK)
        assert same(await sealed.get(other), other_block)

    asyncio.run(conduct())


def test_another_blocks_bytes_are_no_substitute(tmp_path: Path) -> None:
    async def scenario(one: RemoteTier, two: RemoteTier) -> None:
        other, other_block = make_block(2)
        await one.put(NAME, BLOCK)
        await one.remote.put(KEY, encode_frame(other, other_block))
        with pytest.raises(CorruptBlockError):
            await one.get(NAME)

    run(tmp_path, scenario)


def test_a_block_in_the_corner_of_another_namespace_is_not_served(tmp_path: Path) -> None:
    """Namespaces stay isolated even when objects are copied: a block name belongs to one
    namespace."""

    async def scenario(one: RemoteTier, two: RemoteTier) -> None:
        await one.put(NAME, BLOCK)
        frame = await one.remote.get(KEY)
        await one.remote.put(f"blocks/{'f' * 64}/{NAME}", (frame,))
        two.expect(NAME, "f" * 64, 1)
        assert (await two.get(NAME)).namespace == NAMESPACE, "the block itself says whose it is"

    run(tmp_path, scenario)


# --- purging, budgets, closing --------------------------------------------------------------------


def test_a_purge_leaves_nothing_of_a_namespace_and_all_of_the_others(tmp_path: Path) -> None:
    gone, stays = "a" * 64, "ab" * 32

    async def scenario(one: RemoteTier, two: RemoteTier) -> None:
        blocks = [make_block(seed, 4, space) for seed in range(3) for space in (gone, stays)]
        for name, block in blocks:
            await one.put(name, block)
        await one.remote.put(f"quarantine/{gone}/{NAME}", (b"bad",))
        two.expect(blocks[0][0], gone, 1)
        await two.purge(gone, [])  # blocks that this machine has never seen are purged too
        left = await entries(one.remote, "")
        assert set(left) == {f"blocks/{stays}/{name}" for name, b in blocks if b.namespace == stays}
        assert not [file for file in (tmp_path / "shared").rglob("*") if gone in str(file)
                    and file.is_file()]  # fmt: skip
        assert two.names() == []
        for name, block in blocks:
            if block.namespace == stays:
                assert same(await one.get(name), block)
            else:
                with pytest.raises(MissingBlockError):
                    await one.get(name)
        check_known(one)

    run(tmp_path, scenario)


def check_known(tier: RemoteTier) -> None:
    """Sizes and sum agree."""
    assert tier.use().bytes == sum(tier.size(name) or 0 for name in tier.names())


def test_without_a_budget_the_engine_decides(tmp_path: Path) -> None:
    async def conduct() -> None:
        remote = open_remote(f"file://{tmp_path}/shared")
        open_end, small = RemoteTier(remote), RemoteTier(remote, budget=2000)
        for seed in range(10):
            await open_end.put(*make_block(seed))
        assert (open_end.use().budget, open_end.use().blocks) == (0, 10)
        small.expect(*make_block(1)[:1], NAMESPACE, 1900)
        with pytest.raises(NoSpaceError):
            await small.put(*make_block(20))
        check_use(small)

    asyncio.run(conduct())


class StuckRemote(Remote):
    """A get that returns only when told to."""

    name = "stuck"

    def __init__(self, inner: Remote) -> None:
        self.inner = inner
        self.properties = inner.properties
        self.go = asyncio.Event()
        self.closed = False

    async def put(self, key: str, parts: Sequence[Part]) -> None:
        await self.inner.put(key, parts)

    async def get(self, key: str) -> bytes | memoryview:
        await self.go.wait()
        assert not self.closed
        return await self.inner.get(key)

    async def delete(self, key: str) -> None:
        await self.inner.delete(key)

    def list(self, prefix: str) -> AsyncIterator[Entry]:
        return self.inner.list(prefix)

    async def close(self) -> None:
        self.closed = True


def test_closing_waits_for_calls_and_refuses_new_ones(tmp_path: Path) -> None:
    async def conduct() -> None:
        remote = StuckRemote(open_remote(f"file://{tmp_path}/shared"))
        tier = RemoteTier(remote)
        await tier.put(NAME, BLOCK)
        reading = asyncio.ensure_future(tier.get(NAME))
        await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(tier.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        for call in (tier.get(NAME), tier.put(NAME, BLOCK), tier.delete(NAME), tier.discover()):
            with pytest.raises(StorageError, match="closed"):
                await call
        remote.go.set()
        assert same(await reading, BLOCK)
        await closing
        assert remote.closed

    asyncio.run(conduct())


def test_a_block_that_is_put_again_while_it_is_missed_stays_known(tmp_path: Path) -> None:
    async def conduct() -> None:
        remote = StuckRemote(open_remote(f"file://{tmp_path}/shared"))
        tier = RemoteTier(remote)
        await tier.put(NAME, BLOCK)
        await remote.delete(KEY)  # the engine evicted it
        missing = asyncio.ensure_future(tier.get(NAME))
        await asyncio.sleep(0.01)
        tier.forget(NAME)
        tier.expect(NAME, NAMESPACE, 7)
        remote.go.set()
        with pytest.raises(MissingBlockError):
            await missing
        assert tier.size(NAME) == 7

    asyncio.run(conduct())


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "ftp://host/x",
        "s3:///no-bucket",
        "s3://bucket/x?unknown=1",
        "s3://bucket/x?allow_http=perhaps",
        "s3://key:secret@bucket/x",
        "s3://bucket:99999/x",
        "redis://host/not-a-number",
        "redis://host/0?timeout=1",
        "mooncake://host",
        "mooncake://u:secret@host:1",
        "mooncake://host:1?buffer=much",
        "file:///tmp/x?mode=600",
    ],
)
def test_addresses_that_make_no_sense_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_remote(url)
    assert "secret" not in str(caught.value)


def test_an_address_is_taken_apart() -> None:
    url = parse_url("redis://me:p%40ss@Host.example:7000/3?prefix=a%2Fb")
    assert url == ("redis", "me", "p@ss", "Host.example", 7000, "/3", {"prefix": "a/b"})
    assert parse_url("s3://Bucket_1/p/q").host == "Bucket_1"


def test_a_password_is_in_no_message(tmp_path: Path) -> None:
    async def conduct() -> None:
        remote = open_remote("redis://user:hush-hush@127.0.0.1:1/0", 1.0)
        with pytest.raises(ConnectionError) as caught:
            await remote.get(KEY)
        seen: BaseException | None = caught.value
        while seen is not None:
            assert "hush" not in f"{seen} {seen!r}"
            seen = seen.__cause__
        assert "hush" not in f"{remote.name} {remote!r}"
        await remote.close()

    asyncio.run(conduct())


@pytest.mark.parametrize(
    ("url", "library", "extra"),
    [
        ("s3://bucket/x", "obstore", "s3"),
        ("redis://host", "redis", "redis"),
        ("mooncake://host:1", "mooncake", "mooncake"),
    ],
)
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, url: str, library: str, extra: str
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == library or name.startswith("kvshare_store.blocks.remotes."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnsupportedError, match=rf"kvshare-store\[{extra}\]"):
        open_remote(url)


def test_a_bucket_that_keeps_versions_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers carry the version of the object."""
    remote = open_remote(f"file://{tmp_path}")
    get = objects.obstore.get_async

    class Versioned:
        def __init__(self, answer: Any) -> None:
            self.meta = {**answer.meta, "version": "3HL4kqtJlcpXroDTDmJ"}
            self.bytes_async = answer.bytes_async

    async def get_versioned(*arguments: Any) -> Versioned:
        return Versioned(await get(*arguments))

    async def scenario() -> None:
        await remote.put("kvshare-store.json", (b"{}",))
        await remote.get("kvshare-store.json")
        assert not remote.keeps_versions
        monkeypatch.setattr(objects.obstore, "get_async", get_versioned)
        assert bytes(await remote.get("kvshare-store.json")) == b"{}"
        assert remote.keeps_versions

    asyncio.run(scenario())
