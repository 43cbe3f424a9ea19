"""Commands that ask the daemon of another machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.layout import KVLayout
from tests.support.certificates import Keys, Pair
from tests.support.commands import Result, one_line, run
from tests.support.daemons import START_S, ClientDriver, Daemon
from tests.support.oracle import prompt


def test_commands_over_the_network(
    config: Callable[..., StoreConfig], tmp_path: Path, plain_environment: None
) -> None:
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
        assert "needs the role admin" in one_line(asked("reader", "clear", "--yes"), 10)
        assert asked("admin", "clear", "--yes")[0] == 0
        assert "has stopped" in asked("admin", "stop")[1]
        assert daemon.process is not None
        assert daemon.process.wait(START_S) == 0


def settings_file(folder: Path, keys: Keys, role: str) -> Path:
    pair: Pair = keys.clients.issue(f"our {role}", role)
    shown = keys.client(pair, keys.port)
    names = ("connect", "tls_cert", "tls_key", "tls_server")
    file = folder / f"{role}.yaml"
    file.write_text("".join(f"{name}: {getattr(shown, name)}\n" for name in names))
    return file
