"""Engines on other machines: nobody without keys, no more than the role, and the same rows."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol, wire
from kvshare_store.daemon.client import Client, plan_request
from kvshare_store.daemon.connection import Limits
from kvshare_store.daemon.engine_messages import PIECE_BYTES
from kvshare_store.daemon.link import Link, open_link
from kvshare_store.daemon.network import NetworkListener, place_of
from kvshare_store.daemon.roles import NEEDED, ROLES
from kvshare_store.daemon.server import Server
from kvshare_store.errors import (
    ConfigError,
    DeniedError,
    KVShareError,
    LeaseError,
    OverloadError,
    PlanError,
    ProtocolError,
    UnavailableError,
)
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.save.staging import Reuse
from kvshare_store.tensors.layout import KVLayout
from tests.support.certificates import Keys, Pair
from tests.support.daemons import ClientDriver, serving
from tests.support.fuzz import some_message
from tests.support.oracle import prompt
from tests.support.renewing import renewing
from tests.support.waiting import eventually

Config = Callable[..., StoreConfig]
NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
WIDE = Namespace("wide", KVLayout(8, 8, 64, "float32"))
"""Rows of 32 KiB: a block of 32 rows is two pieces."""
PATIENCE_S = 60.0


@pytest.fixture
def server(config: Config, keys: Keys) -> Iterator[Server]:
    with serving(config(**keys.listening(), host_bytes=64 << 20, disk=False)) as running:
        yield running


@pytest.fixture
def connect(server: Server, keys: Keys) -> Iterator[Callable[..., Client]]:
    """`connect(role)`: a client whose certificate has that role."""
    opened: list[Client] = []

    def open_(unit: str = "engine", pair: Pair | None = None, **changes: Any) -> Client:
        pair = pair or keys.clients.issue(f"our {unit}", unit)
        place = place_of(keys.client(pair, server.port, **changes))
        opened.append(Client(place, timeout=PATIENCE_S))
        return opened[-1]

    yield open_
    for client in opened:
        client.close()


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", [NAMESPACE, WIDE], ids=["narrow", "wide"])
def test_rows_come_out_bit_for_bit(
    connect: Callable[..., Client], server: Server, namespace: Namespace
) -> None:
    """Saved over the network and read on this machine, and the other way round; also edited."""
    far = ClientDriver(connect(), namespace)
    with Client(server.config.home_path, timeout=PATIENCE_S) as client:
        near = ClientDriver(client, namespace, far.book)
        assert far.save(prompt(1, 100))
        assert near.serve(prompt(1, 100)).exact == 99
        assert near.save(prompt(2, 100))
        assert far.serve(prompt(2, 100)).exact == 99
        edited = prompt(2, 100)[:40] + prompt(3, 4) + prompt(2, 100)[44:]
        plan = far.serve(edited)
        assert plan.reused > plan.exact > 0, "rows that were reused behind a change"
        assert far.save(edited, plan)
        assert near.serve(edited).exact > plan.exact
    assert far.client.greet().role == "engine"
    assert far.client.arena < 0, "no descriptor travels"
    assert server.store.stats()["leases"] == 0


def test_an_engine_of_another_machine_has_a_link(
    connect: Callable[..., Client], server: Server, keys: Keys
) -> None:
    ClientDriver(connect(), NAMESPACE).save(prompt(1, 40))
    config = keys.client(keys.clients.issue("engine 7", "engine"), server.port)
    link = open_link(msgspec.structs.replace(config, plan_deadline_ms=20_000.0))
    try:
        request = link.ask(
            plan_request(np.asarray(prompt(1, 40), np.int32), NAMESPACE, None, "request")
        )
        assert request is not None
        plan = link.answer(request, PATIENCE_S)
        assert plan is not None
        assert plan.exact == 39
    finally:
        link.close()


def test_a_daemon_that_came_back_is_greeted_anew(config: Config, keys: Keys) -> None:
    port = keys.port
    settings = config(**keys.listening(listen=f"tcp://127.0.0.1:{port}"))
    place = place_of(keys.client(keys.clients.issue("e", "engine"), port))
    with Client(place, timeout=PATIENCE_S) as client:
        engine = ClientDriver(client, NAMESPACE)
        with pytest.raises(UnavailableError):
            client.stats()
        with serving(settings):
            engine.save(prompt(1, 40))
            client.flush()
        with pytest.raises(UnavailableError):
            client.stats()
        with serving(settings):
            assert engine.serve(prompt(1, 40)).exact == 39


def test_whose_machine_died_loses_its_leases(
    connect: Callable[..., Client], server: Server, keys: Keys
) -> None:
    """Killed in the middle of a load, and of a save."""
    ClientDriver(connect(), NAMESPACE).save(prompt(1, 40))
    config = keys.client(keys.clients.issue("e", "engine"), server.port)
    settings = {name: getattr(config, name) for name in ("connect", "tls_cert", "tls_key",
                                                         "tls_server")}  # fmt: skip
    code = (
        "import sys, time, numpy as np\n"
        "from tests.daemon import test_network as t\n"
        "from tests.support.oracle import prompt\n"
        f"client = t.Client(t.place_of(t.StoreConfig(**{settings!r})), timeout=20)\n"
        "assert client.plan(prompt(1, 40), t.NAMESPACE).lease\n"
        "staged = client.stage(np.asarray(prompt(2, 40), np.int32), t.NAMESPACE, t.Reuse())\n"
        "client.call(t.protocol.WriteRows(staged.id, 0, bytes(64)))\n"
        "print('holds', flush=True)\n"
        "time.sleep(600)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"holds\n"
        assert (server.store.stats()["leases"], server.store.stats()["staged"]) == (1, 1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(PATIENCE_S)
        child.stdout.close()
    assert eventually(lambda: server.store.held == 0, PATIENCE_S)
    assert eventually(lambda: server.handling.inboxes.nbytes == 0, PATIENCE_S)


def test_far_loads_are_weighed_by_themselves(
    connect: Callable[..., Client], server: Server
) -> None:
    """A slow network makes plans dear for those behind it, and for nobody else."""
    far = ClientDriver(connect(), WIDE)
    with Client(server.config.home_path, timeout=PATIENCE_S) as client:
        near = ClientDriver(client, WIDE, far.book)
        assert far.save(prompt(1, 200))
        plan = far.plan(prompt(1, 200))
        server.store.far_costs.load["host"].observe(1 << 22, 1e4)
        far.finish(plan)
        assert far.plan(prompt(1, 200)).declined == "no_saving"
        assert near.serve(prompt(1, 200)).exact == 199
        client.call(protocol.Observe(1000, 1.0, WIDE.model_digest))
        far.client.call(protocol.Observe(1000, 50.0, WIDE.model_digest))
    rates = [costs.of(WIDE.model_digest).prefill.value
             for costs in (server.store.costs, server.store.far_costs)]  # fmt: skip
    assert rates == [1000.0, 20.0]


def test_a_forked_child_leaves_the_connection_to_its_parent(connect: Callable[..., Client]) -> None:
    client = connect()
    client.greet()
    child = os.fork()
    if not child:
        os._exit(0)  # by now it has closed its copy
    assert os.waitpid(child, 0)[1] == 0
    stream = client.connected
    assert client.stats()["daemon"]["connections"] == 1
    assert stream


def test_nobody_waits_for_a_resolver(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup is a miss until another thread has found the host."""
    config = keys.client(keys.clients.issue("e", "engine"), 1)
    link = Link(msgspec.structs.replace(config, connect="tcp://store.invalid:1"))
    asked: list[str] = []

    def resolver(host: str, *_: Any, **__: Any) -> Any:
        asked.append(threading.current_thread().name)
        raise socket.gaierror(socket.EAI_NONAME, "nobody knows it")

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    assert link.ask(plan_request(np.asarray(prompt(1, 40), np.int32), NAMESPACE, None)) is None
    link.close()
    assert asked == ["kvshare-resolve"]
    with (
        Client(place_of(link.config), timeout=1.0) as client,
        pytest.raises(UnavailableError, match=r"host store\.invalid is not known"),
    ):
        client.stats()


def test_secrets_of_the_daemon_stay_there(
    config: Config, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "ab" * 32)
    with serving(config(**keys.listening(), encryption_key="env:SECRET")) as server:
        for role, told in (("reader", ""), ("engine", ""), ("admin", "env:SECRET")):
            place = place_of(keys.client(keys.clients.issue("c", role), server.port))
            with Client(place, timeout=PATIENCE_S) as client:
                settings = client.call(protocol.Settings())
                assert settings["encryption_key"] == told
                assert settings["block_tokens"] == 8


# --- who is let in --------------------------------------------------------------------------------


def refused(client: Client) -> str:
    """What a client is told that is not let in."""
    with pytest.raises((DeniedError, UnavailableError)) as caught:
        client.stats()
    return str(caught.value)


def test_strangers_are_not_let_in(
    connect: Callable[..., Client],
    server: Server,
    keys: Keys,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stranger = keys.strangers.issue("our engine", "engine")
    expired = keys.clients.issue("our engine", "engine", expired=True)
    for pair in (stranger, expired):
        assert "certificate" in refused(connect(pair=pair))
    assert re.search(r"TLS with 127\.0\.0\.1:\d+ failed", caplog.text), "an operator looks for it"
    no_role = keys.clients.issue("our engine", "boss")
    with pytest.raises(DeniedError, match="reader, engine and admin are roles"):
        connect(pair=no_role).stats()
    with pytest.raises(DeniedError, match="tls_server must vouch"):
        connect(tls_server=keys.strangers.cert).stats()
    assert eventually(lambda: not server.switchboard.connections, PATIENCE_S)
    assert connect().stats()["daemon"]["cut_off"] >= 3


def test_no_session_is_resumed(server: Server, keys: Keys) -> None:
    """Else a certificate would count after it has expired."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(keys.servers.cert)
    context.load_cert_chain(*keys.clients.issue("node-1", "engine"))
    plain = socket.create_connection(("127.0.0.1", server.port))
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as stream:
        hello = protocol.encode(protocol.Hello())
        stream.sendall(wire.HEADER.pack(len(hello), bytes(8)) + hello)
        assert stream.recv(1)  # tickets would have come before
        assert stream.session is None or not stream.session.has_ticket


def test_a_daemon_of_another_host_is_not_believed(config: Config, keys: Keys) -> None:
    elsewhere = keys.servers.issue("daemon", host="192.0.2.1")
    settings = keys.listening(tls_cert=elsewhere.cert, tls_key=elsewhere.key)
    with serving(config(**settings)) as server:
        place = place_of(keys.client(keys.clients.issue("e", "engine"), server.port))
        with Client(place, timeout=PATIENCE_S) as client:
            said = refused(client)
            assert "IP address mismatch" in said, "the cause, not what followed from it"
            assert "must be in the subjectAltName" in said


@pytest.mark.parametrize("how", ["plain", "no certificate", "old TLS", "silent"])
def test_whoever_shows_no_key(config: Config, keys: Keys, how: str) -> None:
    with (
        serving(config(**keys.listening()), Limits(hello_s=0.5)) as server,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as stream,
    ):
        context = ssl.create_default_context(cafile=keys.servers.cert)
        if how == "plain":
            body = protocol.encode(protocol.Hello())
            stream.sendall(wire.HEADER.pack(len(body), b"request1") + body)
            said = received(stream)
        elif how == "silent":
            assert eventually(lambda: len(server.switchboard.connections) == 1, PATIENCE_S)
            said = received(stream)  # until the time to say hello is over
        else:
            if how == "old TLS":
                context.maximum_version = ssl.TLSVersion.TLSv1_2
                pair = keys.clients.issue("e", "engine")
                context.load_cert_chain(pair.cert, pair.key)
            said = b""
            try:
                with context.wrap_socket(stream, server_hostname="127.0.0.1") as tls:
                    said = received(tls)
            except OSError:
                pass
        assert b"version" not in said, "nobody was welcomed"
        assert eventually(lambda: not server.switchboard.connections, PATIENCE_S)


def test_whoever_hangs_up_at_once_closes_the_door_to_nobody(config: Config, keys: Keys) -> None:
    """One that has sent something and gone before it was accepted is no reason to accept nobody:
    without a key it could keep everybody out, engines of this machine too."""
    listener = NetworkListener(config(**keys.listening()))
    try:
        for sent in (b"", b"some bytes"):
            stream = socket.create_connection(("127.0.0.1", listener.port), PATIENCE_S)
            stream.sendall(sent)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.close()  # which resets the connection
            accepted = listener.accept()  # an error here would count as the system's
            if accepted is not None:
                accepted.close()
    finally:
        listener.close()


def received(stream: socket.socket) -> bytes:
    said = b""
    try:
        while data := stream.recv(1 << 16):
            said += data
    except OSError:
        pass
    return said


def test_keys_are_needed_at_the_start(config: Config, keys: Keys) -> None:
    for missing in ("tls_cert", "tls_key", "tls_clients"):
        with pytest.raises(ConfigError, match=f"needs {missing}: without keys"):
            Server(config(**keys.listening(**{missing: ""})))
    with pytest.raises(ConfigError, match="tls_cert, tls_key, tls_clients"):
        Server(config(listen="tcp://0.0.0.0:0"))
    with pytest.raises(ConfigError, match="needs tls_cert, tls_key, tls_server"):
        place_of(config(connect="tcp://127.0.0.1:1"))


def test_the_keys_that_the_page_makes(
    config: Config, tmp_path: Path, require: Callable[[bool, str], None]
) -> None:
    require(shutil.which("openssl") is not None, "openssl")
    page = (Path(__file__).parents[2] / "docs" / "design" / "security.md").read_text()
    (commands,) = (block for block in page.split("```") if block.startswith("\nopenssl"))
    made = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True)
    if "unrecognized option" in made.stderr.lower():
        require(False, "OpenSSL 3")
    assert made.returncode == 0, made.stderr
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "daemon.pem", "daemon.key"))
    listening = {"listen": "tcp://127.0.0.1:0", "tls_cert": cert, "tls_key": key}
    with serving(config(**listening, tls_clients=ca)) as server:
        settings = StoreConfig(
            connect=f"tcp://127.0.0.1:{server.port}", tls_server=ca,
            tls_cert=str(tmp_path / "engine.pem"), tls_key=str(tmp_path / "engine.key"),
        )  # fmt: skip
        with Client(place_of(settings), timeout=PATIENCE_S) as client:
            assert client.greet().role == "engine"


@pytest.mark.parametrize("address", ["127.0.0.1:80", "tcp://:1", "tcp://a", "tcp://a:99999", "x"])
def test_addresses_that_are_none(config: Config, keys: Keys, address: str) -> None:
    with pytest.raises(ConfigError, match="listen must be tcp://HOST:PORT"):
        Server(config(**keys.listening(listen=address)))


def test_keys_that_cannot_be_used(config: Config, keys: Keys, tmp_path: Path) -> None:
    other = keys.clients.issue("other")
    (tmp_path / "open.key").write_bytes(Path(other.key).read_bytes())
    (tmp_path / "open.key").chmod(0o644)
    (tmp_path / "rubbish").write_text("rubbish")
    rubbish, date = str(tmp_path / "rubbish"), tmp_path / "date"
    date.write_text("ann: 2026-13-45\n")
    os.chmod(rubbish, 0o600)
    for changes, message in (
        ({"tls_key": other.key}, "tls_cert and tls_key cannot be used"),
        ({"tls_cert": rubbish}, "tls_cert and tls_key cannot be used"),
        ({"tls_cert": "/nowhere"}, "tls_cert /nowhere cannot be used: No such file"),
        ({"tls_key": "/nowhere"}, "tls_key /nowhere cannot be read"),
        ({"tls_key": str(tmp_path / "open.key")}, "chmod 600"),
        ({"tls_clients": rubbish}, "tls_clients .* cannot be used"),
        ({"tls_roles": rubbish}, "must hold 'common name: role' lines"),
        ({"tls_roles": str(date)}, "must hold 'common name: role' lines"),
        ({"tls_roles": "/nowhere"}, "tls_roles /nowhere cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            Server(config(**keys.listening(**changes)))


# --- roles ----------------------------------------------------------------------------------------


def test_a_reader_reads_and_stores_nothing(connect: Callable[..., Client], server: Server) -> None:
    engine, reader = (ClientDriver(connect(unit), NAMESPACE) for unit in ("engine", "reader"))
    reader.book = engine.book
    node = engine.save(prompt(1, 40))
    assert reader.client.greet().role == "reader"
    assert reader.serve(prompt(1, 40)).exact == 39
    with pytest.raises(DeniedError, match="'stage' needs the role engine"):
        reader.save(prompt(2, 40))
    for one in (reader, engine):
        with pytest.raises(DeniedError, match="needs the role admin, this connection has"):
            one.client.call(protocol.Purge(tenant=""))
    assert server.store.stats()["errors"] == {"denied": 3}
    admin = connect("admin")
    assert admin.call(protocol.Evict((node or "",)))["nodes"] == [node]
    assert engine.client.stats()["nodes"] == 0


def test_a_reader_reports_nothing(connect: Callable[..., Client], server: Server) -> None:
    reader = connect("reader")
    assert refusal(reader, protocol.Observe(10**6, 1e-3, NAMESPACE.model_digest)) is DeniedError
    reader.tell(protocol.Working(True))  # the client knows its role and sends nothing
    assert reader.stats()["errors"] == {"denied": 1}


def test_names_longer_than_any_are_refused(connect: Callable[..., Client]) -> None:
    client = connect("reader")
    with pytest.raises(ProtocolError, match="the tenant of the namespace is too long"):
        client.plan(prompt(1, 40), NAMESPACE.for_tenant("t" * 2000), timeout=PATIENCE_S)
    nameless = protocol.Decline("policy_off", 40, "r", NAMESPACE.for_tenant("t" * 2000))
    with pytest.raises(ProtocolError, match="the tenant of the namespace is too long"):
        connect("engine").call(nameless)
    assert client.plan(prompt(1, 40), NAMESPACE.for_tenant("t" * 1000)).declined == "empty_store"


def test_every_message_has_a_role() -> None:
    """Written out, so that a new message is thought about."""
    admin = {kind.__name__ for kind, role in NEEDED.items() if role == "admin"}
    engine = {kind.__name__ for kind, role in NEEDED.items() if role == "engine"}
    assert admin >= {"Clear", "Pin", "Evict", "Export", "Import", "Purge", "Stop", "Collect"}
    assert engine == {
        "Stage", "WriteRows", "Commit", "Abandon", "Forget", "Flush", "NextLook", "Looked",
        "Observe", "Decline", "EngineCached", "Prefilled", "Working", "Failed",
    }  # fmt: skip
    reads = {kind.__name__ for kind, role in NEEDED.items() if role == "reader"}
    assert {"Plan", "PlanNode", "ReadRows", "Finish", "Stats", "ShowNode"} <= reads
    assert ROLES == ("reader", "engine", "admin")


def test_a_client_may_ask_for_less(server: Server, home: Path) -> None:
    with Client(home, timeout=PATIENCE_S, role="reader") as client:
        assert client.greet().role == "reader"
        with pytest.raises(DeniedError):
            client.call(protocol.Clear())
    with Client(home, timeout=PATIENCE_S) as owner:
        assert owner.greet().role == "admin"
        assert owner.call(protocol.Clear()) == 0


def test_what_a_reader_says_of_sources_is_not_remembered(server: Server, home: Path) -> None:
    with Client(home, timeout=PATIENCE_S) as owner:
        tokens = prompt(5, 40)
        node = ClientDriver(owner, NAMESPACE).save(tokens)
        for role, sources in (("reader", 0), ("engine", 1)):
            with Client(home, timeout=PATIENCE_S, role=role) as client:
                asked = plan_request(np.asarray(tokens, np.int32), NAMESPACE, None, source=b"a")
                client.receive(client.send(asked), PATIENCE_S)
            owner.flush()
            assert owner.call(protocol.ShowNode(node or ""))["sources"] == sources


def test_nobody_gets_more_than_the_certificate_says(connect: Callable[..., Client]) -> None:
    client = connect("reader")
    client.role = "admin"
    assert client.greet().role == "reader"


def test_a_file_gives_roles_and_is_read_again(config: Config, keys: Keys, tmp_path: Path) -> None:
    roles = tmp_path / "roles.yaml"
    roles.write_text("node-1: engine\n")
    pair, other = keys.clients.issue("node-1"), keys.clients.issue("node-2", "admin")
    with serving(config(**keys.listening(tls_roles=str(roles)))) as server:

        def role(pair: Pair) -> str:
            with Client(place_of(keys.client(pair, server.port)), timeout=PATIENCE_S) as client:
                return client.greet().role

        assert role(pair) == "engine"
        with pytest.raises(DeniedError, match="gives the common name 'node-2' no role"):
            role(other)
        roles.write_text("node-1: bossy\n")
        server.reload_now()
        assert role(pair) == "engine", "a mistake changes nothing"
        roles.write_text("node-1: reader\nnode-2: admin\n")
        server.reload_now()
        assert (role(pair), role(other)) == ("reader", "admin")


# --- what a client may send -----------------------------------------------------------------------


def staged(client: Client, seed: int) -> str:
    return client.stage(np.asarray(prompt(seed, 40), np.int32), NAMESPACE, Reuse()).id


def refusal(client: Client, message: protocol.Request) -> type[KVShareError]:
    with pytest.raises(KVShareError) as caught:
        client.call(message)
    return type(caught.value)


def test_rows_that_were_not_asked_for(
    connect: Callable[..., Client], server: Server, home: Path
) -> None:
    client, other = connect(), connect()
    save, size = staged(client, 1), 40 * 64
    for message, error in (
        (protocol.WriteRows(save, size - 3, b"four"), ProtocolError),
        (protocol.WriteRows(save, 2**48, b""), ProtocolError),
        (protocol.WriteRows("another", 0, b"four"), LeaseError),
        (protocol.Commit(save), PlanError),
    ):
        assert refusal(client, message) is error
    assert refusal(other, protocol.WriteRows(staged(client, 1), 0, b"")) is LeaseError, (
        "not its own"
    )
    too_long = {"type": "write_rows", "staged": "s", "start": 0,
                "rows": bytes(PIECE_BYTES + 1)}  # fmt: skip
    with pytest.raises(ProtocolError):
        protocol.decode_request(msgspec.msgpack.encode(too_long))
    with Client(home, timeout=PATIENCE_S) as near:
        assert refusal(near, protocol.WriteRows(staged(near, 3), 0, b"")) is ProtocolError
    assert server.store.stats()["nodes"] == 0


def test_rows_that_wait_take_bounded_memory(connect: Callable[..., Client], server: Server) -> None:
    first, second = connect(), connect()
    page = os.sysconf("SC_PAGESIZE")
    server.handling.inboxes.most = 2 * page
    save = staged(first, 1)
    first.call(protocol.WriteRows(save, 0, bytes(2560)))
    other = second.stage(np.arange(1000, dtype=np.int32), NAMESPACE, Reuse()).id
    assert refusal(second, protocol.WriteRows(other, 0, bytes(page + 1))) is OverloadError
    first.abandon(save)
    second.call(protocol.WriteRows(other, 0, bytes(2 * page)))
    assert refusal(second, protocol.WriteRows(other, 2 * page, b"x")) is OverloadError
    second.abandon(other)
    assert server.handling.inboxes.nbytes == 0


def test_nobody_keeps_others_from_sending_rows(
    connect: Callable[..., Client], server: Server
) -> None:
    inboxes, (first, second) = server.handling.inboxes, (connect(), connect())
    inboxes.most = 2 * os.sysconf("SC_PAGESIZE")
    tokens = np.arange(4096, dtype=np.int32)
    big = first.stage(tokens, NAMESPACE, Reuse()).id
    first.call(protocol.WriteRows(big, 100_000, b"x"))  # the place of rows takes no room
    first.call(protocol.WriteRows(big, 0, b"x"))
    other = staged(second, 2)
    second.call(protocol.WriteRows(other, 0, bytes(2560)))  # the save of more than half ends
    assert refusal(first, protocol.WriteRows(big, 0, b"x")) is LeaseError
    assert second.call(protocol.Commit(other))
    idle = first.stage(tokens, NAMESPACE, Reuse()).id
    first.call(protocol.WriteRows(idle, 0, b"x"))
    inboxes.reap(server.store, -1.0)  # nothing more has come
    assert inboxes.nbytes == 0
    assert refusal(first, protocol.Commit(idle)) is LeaseError


def test_rows_without_a_lease(connect: Callable[..., Client]) -> None:
    client = connect()
    engine = ClientDriver(client, NAMESPACE)
    engine.save(prompt(1, 40))
    plan: ReusePlan = client.plan(prompt(1, 40), NAMESPACE)
    name = plan.blocks[0].name
    assert refusal(client, protocol.ReadRows(plan.lease, "ab" * 32)) is LeaseError
    assert client.call(protocol.ReadRows(plan.lease, name, plan.blocks[0].nbytes + 5)) == b""
    engine.finish(plan)
    assert refusal(client, protocol.ReadRows(plan.lease, name)) is LeaseError


def test_nobody_keeps_the_thread_with_talk_of_tls_alone(
    connect: Callable[..., Client], server: Server, keys: Keys
) -> None:
    """Left to itself, OpenSSL takes in new keys as long as more of them come, and returns to nobody
    meanwhile."""
    with renewing(server.port, keys.clients.issue("node-1", "reader")) as flooding:
        hello = protocol.encode(protocol.Hello())
        assert flooding.write(wire.HEADER.pack(len(hello), bytes(8)) + hello)
        assert not all(flooding.renew() for _ in range(50_000)), "it is cut off before long"
        assert connect().stats()["daemon"]["cut_off"] == 1


def test_messages_that_no_client_would_send(
    connect: Callable[..., Client], server: Server, keys: Keys
) -> None:
    """From engines with keys, which come and go in the middle of them."""
    chance, pair = random.Random(1), keys.clients.issue("hostile", "engine")
    context = ssl.create_default_context(cafile=keys.servers.cert)
    context.load_cert_chain(pair.cert, pair.key)
    for _ in range(12):
        bodies = [protocol.encode(protocol.Hello()), *(some_message(chance) for _ in range(150))]
        frames = b"".join(wire.HEADER.pack(len(body), b"request1") + body for body in bodies)
        with (
            socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as stream,
            context.wrap_socket(stream, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(frames[: chance.randrange(len(frames))])
            tls.recv(chance.randrange(1, 1 << 16))
    engine = ClientDriver(connect(), NAMESPACE)
    assert engine.save(prompt(1, 40))
    assert engine.serve(prompt(1, 40)).exact == 39
    assert eventually(lambda: server.store.held == 0, PATIENCE_S)
    assert server.handling.inboxes.nbytes == 0
    assert "internal" not in server.store.metrics.errors
