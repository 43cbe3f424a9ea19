"""Commands that ask the daemon of another machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.server import Server
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.layout import KVLayout
from tests.support.certificates import Keys, Pair
from tests.support.commands import Result, one_line, run
from tests.support.daemons import START_S, ClientDriver, Daemon, serving
from tests.support.oracle import prompt

pytestmark = pytest.mark.usefixtures("plain_environment")


def test_commands_over_the_network(config: Callable[..., StoreConfig], tmp_path: Path) -> None:
    """With a file of settings for each role; the last one stops the daemon."""
    keys = Keys(tmp_path)
    settings = config(**keys.listening(listen=f"tcp://127.0.0.1:{keys.port}"))

    def asked(role: str, *command: str) -> Result:
        return run(*command, "--config", settings_file(tmp_path, keys, role))

    with Daemon(settings) as daemon:
        with Client(settings.home_path, timeout=START_S) as client:
            ClientDriver(client, Namespace("model", KVLayout(2, 1, 4, "float32"))).save(
                prompt(1, 40)
            )
        assert json.loads(asked("reader", "stats", "--json")[1])["nodes"] == 1
        address = f"tcp://127.0.0.1:{keys.port}"
        assert f"it listens on {address}, with keys" in daemon.log()
        assert asked("reader", "stats")[1].startswith(f"{address}: 1 node, ")
        shown = asked("reader", "config")[1]
        assert shown.startswith(f"{address}: as its daemon runs")
        rows = json.loads(asked("reader", "config", "--json")[1])["settings"]
        assert {row["name"]: row["value"] for row in rows}["home"] == settings.home
        assert "here: what this command's own settings say" in shown
        assert "needs the role admin" in one_line(asked("reader", "clear", "--yes"), 10)
        archive = tmp_path / "a.kv"
        said = asked("admin", "export", str(archive))[1]
        assert f"blocks are in {archive} on the machine of {address} (" in said
        assert asked("admin", "clear", "--yes")[0] == 0
        assert asked("reader", "ls")[1] == f"No nodes in {address} yet.\n"
        assert "has stopped" in asked("admin", "stop")[1]
        assert daemon.process is not None
        assert daemon.process.wait(START_S) == 0
        assert "no daemon answers" in asked("reader", "config")[1]


# --- doctor ---------------------------------------------------------------------------------------


@pytest.fixture
def server(config: Callable[..., StoreConfig], keys: Keys) -> Iterator[Server]:
    with serving(config(**keys.listening(), disk=False)) as running:
        yield running


def diagnosed(given: StoreConfig) -> tuple[int, dict[str, dict[str, str]]]:
    names = ("connect", "tls_cert", "tls_key", "tls_server")
    settings = [f"--set={name}={getattr(given, name)}" for name in names]
    code, out, err = run("doctor", "--json", *settings)
    assert err == ""
    return code, {finding["what"]: finding for finding in json.loads(out)["findings"]}


@pytest.mark.parametrize("role", ["reader", "engine", "admin"])
def test_the_way_to_a_far_daemon(
    server: Server, keys: Keys, role: str, plain_environment: None
) -> None:
    code, found = diagnosed(keys.client(keys.clients.issue("ours", role), server.port))
    assert code == 0
    assert {"address", "our certificate", "its certificate", "role", "daemon"} <= set(found)
    assert not {"home", "disk", "memory", "permissions"} & set(found)
    assert found["role"]["found"].startswith(f"{role}: may ")
    assert f"OU={role}" in found["our certificate"]["found"]
    assert found["its certificate"]["state"] == "warning", "it ends in less than 30 days"
    with Client(server.config.home_path) as client:
        assert client.stats()["daemon"]["cut_off"] == 0, "no alarm"


def test_what_is_wrong_on_the_way(server: Server, keys: Keys) -> None:
    pair = keys.clients.issue("ours", "engine")

    def wrong(pair: Pair = pair, port: int = server.port, **changes: str) -> dict[str, str]:
        code, found = diagnosed(keys.client(pair, port, **changes))
        assert code == 1
        return {what: one["found"] for what, one in found.items() if one["state"] == "wrong"}

    assert "Connection refused" in wrong(port=keys.port)["address"]
    nowhere = "tcp://nowhere.invalid:7411"
    assert "host nowhere.invalid is not known" in wrong(connect=nowhere)["address"]
    assert "tls_key" in wrong(Pair(pair.cert, "/nonexistent"))["keys"]
    local = f"tcp://localhost:{server.port}"
    assert "Hostname mismatch" in wrong(connect=local)["its certificate"]
    assert "issuer" in wrong(tls_server=keys.strangers.cert)["its certificate"]


def test_who_is_not_let_in(server: Server, keys: Keys) -> None:
    expired = keys.clients.issue("ours", "engine", expired=True)
    code, found = diagnosed(keys.client(expired, server.port))
    assert (code, found["our certificate"]["state"], found["daemon"]["state"]) == (
        1, "wrong", "wrong",
    )  # fmt: skip
    code, found = diagnosed(keys.client(keys.clients.issue("ours", "boss"), server.port))
    assert "which is no role" in found["daemon"]["found"]


def settings_file(folder: Path, keys: Keys, role: str) -> Path:
    pair: Pair = keys.clients.issue(f"our {role}", role)
    shown = keys.client(pair, keys.port)
    names = ("connect", "tls_cert", "tls_key", "tls_server")
    file = folder / f"{role}.yaml"
    file.write_text("".join(f"{name}: {getattr(shown, name)}\n" for name in names))
    return file
