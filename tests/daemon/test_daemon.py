"""The daemon in a process of its own: sessions, shared memory, and what happens when clients or
daemons die."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.commit.home import FORMAT
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.address import answers, socket_path
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.spawn import ensure_daemon
from kvshare_store.errors import (
    ConfigError,
    DeadlineError,
    LeaseError,
    NodeError,
    PlanError,
    UnavailableError,
)
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome
from kvshare_store.plan.spans import Span
from kvshare_store.save.staging import Reuse, Staged, packed
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, Daemon
from tests.support.oracle import Driver, pick, positions_of, prompt
from tests.support.peer import Peer
from tests.support.waiting import eventually

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
Config = Callable[..., StoreConfig]
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the tests that leave it intact; each uses prompts of its own."""
    home = tmp_path_factory.mktemp("daemon") / "home"
    config = StoreConfig(
        home=str(home), block_tokens=8, host_bytes=1 << 20, disk_bytes=1 << 24,
        min_prompt_tokens=8, min_saving_ms=0.0, policy="aggressive", semantic="never",
        plan_deadline_ms=20_000.0,
    )  # fmt: skip
    with Daemon(config) as daemon:
        yield daemon


@pytest.fixture
def daemon(config: Config) -> Iterator[Callable[..., Daemon]]:
    """`daemon(field=value)`: a daemon that a test may kill."""
    started: list[Daemon] = []

    def start(**changes: Any) -> Daemon:
        started.append(Daemon(config(**changes)))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.__exit__(None, None, None)


@pytest.fixture
def engine(shared: Daemon) -> Iterator[ClientDriver]:
    with Client(shared.config.home_path, timeout=PATIENCE_S) as client:
        yield ClientDriver(client, NAMESPACE)


@pytest.fixture
def wire(shared: Daemon) -> Iterator[Peer]:
    with Peer(shared.config.home_path) as opened:
        yield opened


# --- hello --------------------------------------------------------------------------------------


def test_hello(shared: Daemon, engine: ClientDriver) -> None:
    welcome = engine.client.greet()
    assert shared.process is not None
    assert (welcome.version, welcome.pid) == (protocol.NEWEST, shared.process.pid)
    assert welcome.policy == "aggressive"
    engine.save(prompt(102, 40))
    assert engine.serve(prompt(102, 40)).arena == welcome.arena
    assert engine.client.mapped(welcome.arena).nbytes == shared.config.host_bytes


@pytest.mark.parametrize("version", [0, protocol.OLDEST - 1, protocol.NEWEST + 1])
def test_another_version_is_refused(wire: Peer, version: int) -> None:
    reply = wire.ask(protocol.Hello(version, version))
    assert reply.error == "protocol"
    assert "same kvshare-store release" in reply.message
    assert wire.receive() is None, "no session was opened"


def test_releases_that_share_a_version_understand_each_other(wire: Peer) -> None:
    assert wire.ask(protocol.Hello(1, protocol.NEWEST + 7)).result["version"] == protocol.NEWEST


def test_nothing_without_a_hello(wire: Peer) -> None:
    reply = wire.ask(protocol.Stats())
    assert (reply.error, reply.message) == ("protocol", "say hello first")
    assert wire.receive() is None


def test_malformed_messages_are_refused(wire: Peer, engine: ClientDriver) -> None:
    wire.ask(protocol.Hello())
    for body in (
        b"",
        b"\xc1",
        b"text",
        msgspec.msgpack.encode({"type": "explode"}),
        os.urandom(99),
    ):
        wire.send(body)
        reply = wire.receive()
        assert reply is not None
        assert reply.error == "protocol"
    nonsense = {"type": "plan", "namespace": {"model": 3}, "tokens": b"", "policy": None}
    wire.send(msgspec.msgpack.encode(nonsense))
    reply = wire.receive()
    assert reply is not None
    assert reply.error == "protocol"
    assert wire.ask(protocol.Stats()).result["lookups"] >= 0
    engine.save(prompt(100, 40))
    assert engine.serve(prompt(100, 40)).exact == 39


@pytest.mark.parametrize("tokens", [b"123", b"12345"])
def test_tokens_that_are_no_int32(wire: Peer, tokens: bytes) -> None:
    wire.ask(protocol.Hello())
    for message in (
        protocol.Plan(NAMESPACE, tokens),
        protocol.Stage(NAMESPACE, tokens, Reuse()),
    ):
        assert wire.ask(message).error == "plan"


@pytest.mark.parametrize(
    ("extends", "kind"),
    [(-1, "protocol"), (1 << 50, "protocol"), ("4", "protocol"), (40, "plan"), (1 << 40, "plan")],
)
def test_an_answer_that_extends_too_much(wire: Peer, extends: Any, kind: str) -> None:
    wire.ask(protocol.Hello())
    tokens = np.asarray(prompt(101, 40), np.int32).tobytes()
    assert wire.ask(protocol.Stage(NAMESPACE, tokens, Reuse(), extends)).error == kind


def test_a_client_of_the_release_before_saves_prompts(wire: Peer) -> None:
    wire.ask(protocol.Hello())
    stage = protocol.Stage(NAMESPACE, np.asarray(prompt(172, 40), np.int32).tobytes(), Reuse())
    fields = msgspec.msgpack.decode(protocol.encode(stage))
    assert fields.pop("extends") == 0
    wire.send(msgspec.msgpack.encode(fields))
    reply = wire.receive()
    assert reply is not None
    assert msgspec.convert(reply.result, Staged).rows == 40


def test_an_answer_over_the_socket(engine: ClientDriver) -> None:
    told, answer = prompt(103, 40), prompt(104, 10)
    engine.save(told)
    whole = [*told, *answer]
    raw = np.asarray(whole, np.int32).tobytes()
    named = "engines may choose such names: " * 20
    staged = engine.client.stage_bytes(raw, NAMESPACE, Reuse(), 40, request=named)
    assert positions_of(staged.fresh) == list(range(40, 50))
    rows = engine.book.computed(whole, 50, "")
    engine.book.write(whole, rows, range(40, 50), 50)
    data = packed(pick(rows, range(40, 50)), staged.sizes, NAMESPACE.layout)
    sizes = [size * NAMESPACE.layout.row_bytes for size in staged.sizes]
    blocks = [data[sum(sizes[:at]) : sum(sizes[: at + 1])] for at in range(len(sizes))]
    assert engine.client.commit(staged, blocks)
    assert engine.serve([*whole, 7]).exact == 50
    assert engine.client.stage_bytes(raw, NAMESPACE, Reuse(), 40).known


def test_errors_arrive_as_they_were_raised(engine: ClientDriver) -> None:
    client = engine.client
    with pytest.raises(ConfigError, match="reckless"):
        client.plan(prompt(1, 40), NAMESPACE, policy="reckless")
    with pytest.raises(LeaseError):
        client.commit(Staged(id="no such save"), ())
    with pytest.raises(PlanError):
        client.stage(
            np.asarray(prompt(101, 40), np.int32), NAMESPACE, Reuse((Span(0, 99, 0, 0, 0),), ("b",))
        )
    with pytest.raises(NodeError, match="nodes begin with"):
        client.call(protocol.ShowNode("zz"))
    client.finish("no such lease", Outcome())
    assert client.stats()["lookups"] >= 0


def test_negative_tokens_are_refused(engine: ClientDriver) -> None:
    raw = np.asarray([-1] * 40, np.int32)
    with pytest.raises(PlanError):
        engine.client.call(protocol.Plan(NAMESPACE, raw.tobytes()))


# --- sharing ------------------------------------------------------------------------------------


def test_two_clients_share(shared: Daemon, engine: ClientDriver) -> None:
    tokens = prompt(110, 80)
    engine.save(tokens)
    with Client(shared.config.home_path, timeout=PATIENCE_S) as other:
        second = ClientDriver(other, NAMESPACE, engine.book)
        assert second.serve(tokens).exact == 79
        changed = [*tokens[:30], 7, *tokens[31:]]
        plan = second.plan(changed)
        assert (plan.exact, plan.generation) == (30, 1)
        second.finish(plan)
        second.save(changed, plan)
        assert engine.serve(changed).reused == 79
        stranger = ClientDriver(other, NAMESPACE.for_tenant("stranger"))
        assert stranger.serve(tokens).declined == "empty_store"


def test_two_clients_that_save_the_same_prompt(shared: Daemon, engine: ClientDriver) -> None:
    tokens = np.asarray(prompt(111, 40), np.int32)
    staged = engine.client.stage(tokens, NAMESPACE, Reuse())
    with Client(shared.config.home_path, timeout=PATIENCE_S) as other:
        assert other.stage(tokens, NAMESPACE, Reuse()).known
    engine.client.abandon(staged.id)


def test_requests_in_flight_are_answered_by_their_ids(engine: ClientDriver) -> None:
    for seed in (120, 121, 122):
        engine.save(prompt(seed, 40))
    client = engine.client
    client.greet()
    requests = [
        client.send(protocol.Plan(NAMESPACE, np.asarray(prompt(seed, 24 + at), np.int32).tobytes()))
        for at, seed in enumerate((120, 121, 122, 999))
    ]
    client.forget(requests[1])
    lengths = [client.receive(at, PATIENCE_S)["tokens"] for at in (requests[3], *requests[::2])]
    assert lengths == [27, 24, 26]
    assert client.stats()["lookups"] > 0


def test_only_the_owner_can_reach_it(shared: Daemon) -> None:
    home = shared.config.home_path
    for path, mode in (
        (socket_path(home), 0o600),
        (home, 0o700),
        (home / "daemon.log", 0o600),
        (home / "lock", 0o600),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    with Client(home, timeout=PATIENCE_S) as client:
        ClientDriver(client, NAMESPACE).save(prompt(77, 40))
        client.flush()
    written = [path for path in home.rglob("*") if path.exists() and not path.is_socket()]
    assert any(path.suffix == ".lance" for path in written)
    assert any(path.suffix == ".kvb" for path in written)
    for path in written:  # LanceDB's files too
        mode = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_the_socket_of_a_deep_home_is_in_it(config: Config, tmp_path: Path) -> None:
    """Not in a folder that others can write to, where an attacker could create a socket first."""
    deep = tmp_path / ("d" * 90) / ("e" * 90) / "home"
    with Daemon(config(home=str(deep))) as daemon, Client(deep, timeout=PATIENCE_S) as client:
        path = deep / "kvshare.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert client.greet().pid == daemon.process.pid  # type: ignore[union-attr]
        assert daemon.end() == 0
        assert not path.exists()


# --- the end of a daemon ------------------------------------------------------------------------


def test_no_daemon(home: Path) -> None:
    with Client(home) as client, pytest.raises(UnavailableError, match="no daemon serves"):
        client.stats()


def test_ending_in_good_order(daemon: Callable[..., Daemon], home: Path, config: Config) -> None:
    running = daemon()
    with Client(home, timeout=PATIENCE_S) as client:
        engine = ClientDriver(client, NAMESPACE)
        engine.save(prompt(1, 40))
        assert running.end() == 0
        assert not socket_path(home).exists()
        with pytest.raises((UnavailableError, DeadlineError)):
            client.plan(prompt(1, 40), NAMESPACE, timeout=0.5)
    with Store(config()) as store:
        assert Driver(store, NAMESPACE, engine.book).serve(prompt(1, 40)).exact == 39


def test_a_client_asks_it_to_stop(daemon: Callable[..., Daemon], home: Path) -> None:
    running = daemon()
    with Client(home, timeout=PATIENCE_S) as client:
        client.call(protocol.Stop())
    assert running.process is not None
    assert running.process.wait(PATIENCE_S) == 0


def test_a_killed_daemon_comes_back_and_the_client_recovers(
    daemon: Callable[..., Daemon], home: Path
) -> None:
    running = daemon()
    with Client(home, timeout=PATIENCE_S) as client:
        engine = ClientDriver(client, NAMESPACE)
        engine.save(prompt(1, 40))
        client.flush()
        held = engine.plan(prompt(1, 40))
        running.kill()
        with pytest.raises(UnavailableError):
            client.plan(prompt(1, 40), NAMESPACE, timeout=PATIENCE_S)
        running.start()
        plan = engine.serve(prompt(1, 40))
        assert plan.exact == 39
        assert client.stats()["leases"] == 0
        client.finish(held.lease, Outcome())  # a lease of the previous daemon: ignored
        engine.save(prompt(2, 40))
        assert engine.serve(prompt(2, 40)).exact == 39


def test_rows_of_the_daemon_before_are_refused(daemon: Callable[..., Daemon], home: Path) -> None:
    """The offsets in a plan mean something else in the arena of the next daemon."""
    running = daemon()
    with Client(home, timeout=PATIENCE_S) as client:
        engine = ClientDriver(client, NAMESPACE)
        engine.save(prompt(1, 40))
        client.flush()
        plan = engine.plan(prompt(1, 40))
        running.kill()
        (home / "blocks").rename(home / "elsewhere")  # so that nothing old can be put there
        running.start()
        engine.book.check(prompt(1, 40), plan, engine.load(plan))  # nobody changes them any more
        for seed in range(2, 6):
            engine.save(prompt(seed, 40))
        assert engine.serve(prompt(2, 40)).exact == 39
        with pytest.raises(LeaseError):
            engine.load(plan)
        with pytest.raises(LeaseError):
            client.check(plan.arena, plan.blocks)


def test_a_stale_socket_is_no_obstacle(daemon: Callable[..., Daemon], home: Path) -> None:
    running = daemon()
    running.kill()
    assert socket_path(home).exists()
    assert not answers(home)
    running.start()
    with Client(home, timeout=PATIENCE_S) as client:
        assert client.stats()["nodes"] == 0


def test_a_socket_in_use_is_left_alone(config: Config, home: Path) -> None:
    home.mkdir()
    (home / "format").write_text(FORMAT)
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.bind(str(socket_path(home)))
        somebody.listen()
        command = [sys.executable, "-m", "kvshare_store.cli.main", "serve", "--home", str(home)]
        command += ["--set", "host_bytes=1MiB", "--set", "semantic=never"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 4
        assert "in use by another process" in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def test_one_daemon_a_home(shared: Daemon) -> None:
    home = shared.config.home_path
    second = Daemon(shared.config)
    second.process = None
    ended = subprocess.run(
        [sys.executable, "-m", "kvshare_store.cli.main", "serve", "--home", str(home)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 4
    assert "belongs to a running store" in ended.stderr
    with ensure_daemon(shared.config) as client:
        assert shared.process is not None
        assert client.greet().pid == shared.process.pid


# --- a daemon that does not answer --------------------------------------------------------------


def test_a_stopped_daemon_costs_no_more_than_the_deadline(
    daemon: Callable[..., Daemon], home: Path
) -> None:
    running = daemon()
    with Client(home, timeout=PATIENCE_S) as client:
        engine = ClientDriver(client, NAMESPACE)
        engine.save(prompt(1, 40))
        running.send(signal.SIGSTOP)
        try:
            for _ in range(3):
                with pytest.raises(DeadlineError, match=r"in 0\.20 s"):
                    client.plan(prompt(1, 40), NAMESPACE, timeout=0.2)
        finally:
            running.send(signal.SIGCONT)
        assert engine.serve(prompt(1, 40)).exact == 39, "late answers are not taken for this one"
        assert eventually(lambda: client.stats()["leases"] == 3, PATIENCE_S), (
            "their plans were granted late"
        )


# --- clients that die ---------------------------------------------------------------------------


def test_what_a_killed_client_held_is_released(daemon: Callable[..., Daemon], home: Path) -> None:
    daemon(lease_seconds=600.0)
    with Client(home, timeout=PATIENCE_S) as client:
        engine = ClientDriver(client, NAMESPACE)
        engine.save(prompt(1, 40))
        engine.save(prompt(2, 40))
        client.flush()
        before = client.stats()["tiers"]["host"]["bytes"]
        code = (
            "import sys, time\nimport numpy as np\n"
            "from kvshare_store.daemon.client import Client\n"
            "from kvshare_store.namespace import Namespace\n"
            "from kvshare_store.save.staging import Reuse\n"
            "from kvshare_store.tensors.layout import KVLayout\n"
            "from tests.support.oracle import prompt\n"
            "space = Namespace('model', KVLayout(2, 1, 4, 'float32'))\n"
            "client = Client(sys.argv[1])\n"
            "assert client.plan(prompt(1, 40), space).exact == 39\n"
            "tokens = np.asarray(prompt(9, 40), np.int32)\n"
            "assert client.stage(tokens, space, Reuse()).rows == 40\n"
            "print('holding', flush=True)\ntime.sleep(600)\n"
        )
        environment = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
        victim = subprocess.Popen(
            [sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, env=environment
        )
        assert victim.stdout is not None
        try:
            assert victim.stdout.readline() == b"holding\n"
            stats = client.stats()
            assert (stats["leases"], stats["staged"]) == (1, 1)
            assert stats["tiers"]["host"]["bytes"] == before, "a save holds no shared memory"
            mine = engine.plan(prompt(2, 40))
        finally:
            victim.kill()
            victim.stdout.close()
        # not yet waited for: a zombie holds nothing either
        assert eventually(lambda: client.stats()["leases"] == 1, PATIENCE_S)
        assert eventually(lambda: client.stats()["staged"] == 0, PATIENCE_S)
        victim.wait()
        engine.load(mine)
        engine.finish(mine)
        stats = client.stats()
        assert stats["declined"]["lease_expired"] == 1
        assert stats["lookups"] == stats["hits_exact"] + stats["misses"]
        engine.save(prompt(9, 40))
        assert engine.serve(prompt(9, 40)).exact == 39


def test_an_idle_daemon_exits(daemon: Callable[..., Daemon]) -> None:
    running = daemon(idle_exit_s=1.0)
    assert running.process is not None
    assert running.process.wait(PATIENCE_S) == 0


def test_a_daemon_whose_home_is_gone_exits(daemon: Callable[..., Daemon], home: Path) -> None:
    running = daemon()
    socket_path(home).unlink()
    assert running.process is not None
    assert running.process.wait(PATIENCE_S) == 0
