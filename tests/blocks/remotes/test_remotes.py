"""Every remote against its real engine: the contract tests of remotes, and those of tiers on top of
them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvshare_store.blocks.remotes import mooncake, open_remote
from kvshare_store.blocks.remotes.base import Remote
from kvshare_store.blocks.remotes.mooncake_settings import load_library as mooncake_library
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.breaker import Breaker
from kvshare_store.blocks.tiers.remote import RemoteTier
from kvshare_store.blocks.tiers.wrappers import RetryTier, resilient
from kvshare_store.errors import (
    DeadlineError,
    KVShareError,
    NoSpaceError,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from kvshare_store.tensors.frame import Block
from kvshare_store.testing.remotes import RemoteTests, spoil
from kvshare_store.testing.tier_contract import NAMESPACE, make_block, same
from kvshare_store.testing.tiers import Damage, PersistentTierTests
from tests.support.needs import need
from tests.support.servers import (
    MooncakeClient,
    MooncakeMaster,
    RedisServer,
    S3Server,
    free_port,
)

TIMEOUT_S = 4.0


def corner(folder: Path) -> str:
    """A prefix for one test alone."""
    return hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()


class Engine:
    """A running engine that the tests below share; each test uses a prefix of its own."""

    timeout_s = TIMEOUT_S

    def url(self, folder: Path) -> str:
        raise NotImplementedError

    def remote(self, folder: Path) -> Remote:
        return open_remote(self.url(folder), self.timeout_s)

    async def damage(self, how: Damage) -> None:
        """Make the whole engine slow or dead."""
        raise NotImplementedError

    async def heal(self) -> None:
        """Undo it."""


class FolderEngine(Engine):
    def url(self, folder: Path) -> str:
        return f"file://{folder}/shared"


class ServerEngine(Engine):
    def __init__(
        self, server: RedisServer | S3Server | MooncakeMaster, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.server = server
        self.timeout_s = timeout_s

    def url(self, folder: Path) -> str:
        return self.server.url(corner(folder))

    async def damage(self, how: Damage) -> None:
        if how == "slow":
            self.server.pause()
        else:
            self.server.kill()

    async def heal(self) -> None:
        if self.server.process is None:
            await asyncio.to_thread(self.server.start)
        else:
            self.server.resume()


@pytest.fixture(scope="module")
def folder_engine() -> Engine:
    return FolderEngine()


@pytest.fixture(scope="module")
def redis_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    need(RedisServer.installed(), "redis-server")
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield ServerEngine(server)


@pytest.fixture(scope="module")
def s3_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    need(S3Server.installed(), "rclone")
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield ServerEngine(server, TIMEOUT_S / 4)  # its client asks several times


@pytest.fixture(scope="module")
def mooncake_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    need(MooncakeMaster.installed(), "Mooncake (Debian: libibverbs1, librdmacm1)")
    folder = tmp_path_factory.mktemp("mooncake")
    with MooncakeMaster(folder / "master") as master, MooncakeClient(folder / "client", master):
        yield ServerEngine(master)


class Connections:
    """Mooncake's library for tests that follow each other: opening and closing a connection takes
    it a second, so connections stay open."""

    def __init__(self) -> None:
        self.open: dict[str, Any] = {}

    def MooncakeDistributedStore(self) -> Connection:  # noqa: N802 - as the library calls it
        return Connection(self)


class Connection:
    """One of them: what is called reaches the real one, but for the end."""

    def __init__(self, kept: Connections) -> None:
        self._kept = kept
        self._real: Any = None

    def setup(self, settings: dict[str, str]) -> int:
        name, code = str(settings), 0
        if name not in self._kept.open:
            real = mooncake_library().MooncakeDistributedStore()
            if not (code := real.setup(settings)):
                self._kept.open[name] = real
        self._real = self._kept.open.get(name)
        return int(code)

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture(scope="module")
def connections(mooncake_engine: Engine) -> Iterator[Connections]:
    kept = Connections()
    yield kept
    for real in kept.open.values():
        real.close()


class OnEngine(RemoteTests):
    """The contract tests of remotes on one of the engines above."""

    engine: Engine

    def make_remote(self, folder: Path) -> Remote:
        return self.engine.remote(folder)


class TierOnEngine(PersistentTierTests):
    """The contract tests of tiers on one of the engines above."""

    engine: Engine
    damages: ClassVar[frozenset[Damage]] = frozenset(
        {"absent", "short", "corrupt", "slow", "refused"}
    )

    @pytest.fixture(autouse=True)
    def _impatient(
        self, _engine: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if "slow" in request.node.name:  # it waits until its patience ends
            monkeypatch.setattr(self.engine, "timeout_s", self.engine.timeout_s / 2)

    async def make_tier(self, folder: Path, budget: int) -> Tier:
        tier = RemoteTier(self.engine.remote(folder), budget=budget)
        await tier.discover()
        return tier

    async def damage(self, folder: Path, name: str, how: Damage) -> None:
        if how in ("slow", "refused"):
            await self.engine.damage(how)
            return
        remote = self.engine.remote(folder)
        await spoil(remote, f"blocks/{NAMESPACE}/{name}", how)
        await remote.close()

    async def heal(self, folder: Path) -> None:
        await self.engine.heal()


class _Folder:
    @pytest.fixture(autouse=True)
    def _engine(self, folder_engine: Engine) -> None:
        self.engine: Any = folder_engine


class _Redis:
    @pytest.fixture(autouse=True)
    def _engine(self, redis_engine: Engine) -> None:
        self.engine: Any = redis_engine


class _S3:
    @pytest.fixture(autouse=True)
    def _engine(self, s3_engine: Engine) -> None:
        self.engine: Any = s3_engine


class _Mooncake:
    @pytest.fixture(autouse=True)
    def _engine(
        self,
        mooncake_engine: Engine,
        connections: Connections,
        request: pytest.FixtureRequest,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.engine: Any = mooncake_engine
        if "clos" not in request.node.name:  # the others are about what a test leaves open
            monkeypatch.setattr(mooncake, "load_library", lambda: connections)


class TestFolder(_Folder, OnEngine):
    pass


class TestRedis(_Redis, OnEngine):
    pass


class TestS3(_S3, OnEngine):
    pass


class TestMooncake(_Mooncake, OnEngine):
    pass


class TestFolderTier(_Folder, TierOnEngine):
    damages = frozenset({"absent", "short", "corrupt"})


class TestRedisTier(_Redis, TierOnEngine):
    pass


class TestS3Tier(_S3, TierOnEngine):
    async def make_tier(self, folder: Path, budget: int) -> Tier:
        # rclone removes a folder with its last object, also when the next is being put there
        return RetryTier(await super().make_tier(folder, budget), attempts=8)


class TestMooncakeTier(_Mooncake, TierOnEngine):
    # a master that is killed takes its objects with it: they are missing then, not refused
    damages = frozenset({"absent", "short", "corrupt", "slow"})


def test_mooncake_without_its_http_server_cannot_list(
    mooncake_engine: ServerEngine, tmp_path: Path
) -> None:
    async def scenario() -> None:
        address = mooncake_engine.url(tmp_path).partition("?")[0]
        remote = open_remote(f"{address}?buffer=32MiB", TIMEOUT_S)
        assert not remote.properties.listing
        with pytest.raises(UnsupportedError, match="admin"):
            await anext(aiter(remote.list("")))
        await remote.put("blocks/a/1", (b"value",))
        assert await remote.delete_prefix("blocks/a/") == 1
        await remote.close()

    asyncio.run(scenario())


def test_values_that_are_too_large_are_refused_as_such(
    mooncake_engine: ServerEngine, tmp_path: Path
) -> None:
    async def scenario() -> None:
        remote = mooncake_engine.remote(tmp_path)
        with pytest.raises(NoSpaceError, match="buffer"):
            await remote.put("blocks/a/1", (bytes(33 << 20),))
        await remote.close()

    asyncio.run(scenario())


# --- servers that hang, die and come back ---------------------------------------------------------


async def end_of(call: Awaitable[Any]) -> Any:
    """How a call ended."""
    (end,) = await asyncio.gather(call, return_exceptions=True)
    return end


class Clock:
    """The clock of a breaker: its pauses end when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def until_it_answers(tier: Tier, name: str, clock: Clock) -> Block:
    """Ask until the breaker has probed with success."""
    deadline = time.monotonic() + 60
    while True:
        clock.now += 60
        try:
            return await tier.get(name)
        except (UnavailableError, DeadlineError, StorageError):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


@pytest.mark.fault
@pytest.mark.parametrize("how", ["slow", "refused"])
@pytest.mark.parametrize("engine", ["redis_engine", "s3_engine"])
def test_a_server_that_is_gone_costs_a_deadline_then_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, engine: str, how: Damage
) -> None:
    server: ServerEngine = request.getfixturevalue(engine)
    name, block = make_block(1)

    async def scenario() -> None:
        # the engine's own client would wait far longer than the caller does
        inner, clock = RemoteTier(open_remote(server.url(tmp_path), timeout_s=120)), Clock()
        tier = resilient(inner, deadline_ms=200 if how == "slow" else 10_000)
        tier.breaker = Breaker(clock=clock)
        await inner.put(name, block)
        await server.damage(how)
        try:
            for _ in range(3):
                end = await end_of(tier.get(name))
                assert isinstance(end, DeadlineError if how == "slow" else UnavailableError)
                assert how != "slow" or "within 200 ms" in str(end), "the caller's own deadline"
            assert tier.breaker.state == "open"
            end = await end_of(tier.get(name))
            assert "asked again later" in str(end), "it is not even asked"
            assert tier.size(name) is not None, "nobody said that the block is gone"
        finally:
            await server.heal()
        assert same(await until_it_answers(tier, name, clock), block)
        assert tier.breaker.state == "closed"
        await tier.close()

    asyncio.run(scenario())


@pytest.mark.fault
def test_mooncake_loses_its_memory_and_its_master(tmp_path: Path) -> None:
    """Whichever process is paused or killed: calls miss or fail in time, and work again later."""
    need(MooncakeMaster.installed(), "Mooncake (Debian: libibverbs1, librdmacm1)")
    blocks = dict(make_block(seed) for seed in range(8))

    async def ends(tier: Tier) -> set[type]:
        found = set()
        for name, block in blocks.items():
            end = await end_of(tier.get(name))
            assert not isinstance(end, Block) or same(end, block)
            assert isinstance(end, Block | KVShareError), repr(end)
            ours = not isinstance(end, DeadlineError) or "within 500 ms" in str(end)
            assert ours, f"the library's own patience ended it, not the caller's: {end}"
            found.add(type(end))
        return found

    async def refill(tier: Tier) -> None:
        deadline = time.monotonic() + 120
        for name, block in blocks.items():
            got: Any = None
            while not isinstance(got, Block):
                assert time.monotonic() < deadline, repr(got)
                await end_of(tier.put(name, block))
                got = await end_of(tier.get(name))
            assert same(got, block)

    async def scenario(master: MooncakeMaster, lender: MooncakeClient) -> None:
        remote = open_remote(master.url("faults"), TIMEOUT_S)
        tier = resilient(RemoteTier(remote), deadline_ms=500)
        await refill(tier)
        for server in (lender, master):
            server.pause()
            assert Block not in await ends(tier)
            server.resume()
            await refill(tier)
        lender.kill()
        assert Block not in await ends(tier)
        await asyncio.to_thread(lender.start)
        await refill(tier)
        master.kill()
        assert Block not in await ends(tier)
        await asyncio.to_thread(master.start)
        await refill(tier)
        await tier.close()

    with (
        MooncakeMaster(tmp_path / "master") as master,
        MooncakeClient(tmp_path / "lender", master) as lender,
    ):
        asyncio.run(scenario(master, lender))


@pytest.mark.fault
@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:{port}/0",
        "s3://bucket/x?endpoint=http%3A%2F%2F127.0.0.1%3A{port}&allow_http=true",
        "mooncake://127.0.0.1:{port}",
    ],
)
def test_nobody_there_is_unavailable_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    if url.startswith("mooncake"):
        need(MooncakeMaster.installed(), "Mooncake (Debian: libibverbs1, librdmacm1)")

    # Mooncake's library takes its patience from the environment, once for the whole process
    patience = TIMEOUT_S if url.startswith("mooncake") else 3600.0

    async def scenario() -> None:
        remote = open_remote(url.format(port=free_port()), timeout_s=patience)
        for call in (remote.get("blocks/a/1"), remote.put("blocks/a/1", (b"x",))):
            end = await asyncio.wait_for(end_of(call), 60)
            assert isinstance(end, UnavailableError), repr(end)
        await remote.close()

    asyncio.run(scenario())
