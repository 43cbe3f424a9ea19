"""A daemon that reads its settings again: what changes, what cannot, and what is wrong."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from kvshare_store.cli.common import configured
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol, reloading
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.reloading import LIVE, changed, nothing_named, wait_until_written
from kvshare_store.daemon.server import Server
from kvshare_store.errors import ConfigError, LimitError
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, DaemonProgram
from tests.support.oracle import Driver, prompt

Config = Callable[..., StoreConfig]
NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
PATIENCE_S = 60.0


class Reloaded(DaemonProgram):
    """A daemon with a settings file."""

    def __init__(self, config: StoreConfig, file: Path) -> None:
        super().__init__(config)
        self.file = file

    def reload(self, text: str) -> str:
        """Write the file, send SIGHUP; returns the line that the daemon says about it."""
        before = len(self.log())
        self.file.write_text(text)
        self.send(signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE_S
        while "settings" not in self.log()[before:]:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return self.log()[before:]


@pytest.fixture
def daemon(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reloaded]:
    file = tmp_path / "settings.yaml"
    file.write_text("plans_per_second: 0\n")
    settings = {"home": str(config().home_path), "block_tokens": 8, "host_bytes": 1 << 20}
    for name, value in (settings | {"config": file}).items():
        monkeypatch.setenv(f"KVSHARE_{name.upper()}", str(value))
    monkeypatch.setenv("KVSHARE_MIN_PROMPT_TOKENS", "8")
    monkeypatch.setenv("KVSHARE_SEMANTIC", "never")
    monkeypatch.setattr("tests.support.daemons.daemon_environment", lambda _: None)
    with Reloaded(configured(None, None), file) as started:
        yield started


def test_what_a_hang_up_changes(daemon: Reloaded) -> None:
    said = daemon.reload("saves_per_second: 0.001\ndisk_bytes: 1GiB\n")
    assert "saves_per_second is 0.001 now, was 0.0" in said
    assert "a restart is needed for disk_bytes" in said
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as client:
        settings = client.call(protocol.Settings())
        assert settings["saves_per_second"] == 0.001
        assert settings["disk_bytes"] == StoreConfig().disk_bytes
        engine = ClientDriver(client, NAMESPACE)
        engine.save(prompt(1, 40))
        with pytest.raises(LimitError):
            engine.save(prompt(2, 40))
        for broken in ("saves_per_second: many\n", "saves_per_secund: 1\n", "[", "max_nodes: 0\n"):
            assert "the settings stay as they are: " in daemon.reload(broken)
        assert client.call(protocol.Settings()) == settings
        assert client.stats()["errors"]["config"] == 4
        assert "log_format is json now" in daemon.reload("log_format: json\n")
        line = daemon.reload("log_format: json\nmax_nodes: 7\n").strip()
        assert "max_nodes is 7 now" in json.loads(line)["message"]
        assert "log_format is text now" in daemon.reload("")
        assert engine.save(prompt(2, 40))


def test_one_reload_waits_whatever_is_asked(daemon: Reloaded) -> None:
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as client:
        for _ in range(20):
            daemon.send(signal.SIGHUP)
            assert client.stats()["daemon"]["waiting"]["reload"] <= 1
    assert "plans_per_second is 7.0 now" in daemon.reload("plans_per_second: 7\n")


def test_a_file_that_is_being_written_is_read_when_it_is_complete(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is sound: it would take every limit away."""
    file, texts = tmp_path / "settings.yaml", ["plans_per_second: 5\n", "", "#"]
    file.write_text(texts[0])

    def read() -> StoreConfig:
        return configured(str(config().home_path), file, ["semantic=never", "host_bytes=1MiB"])

    def write(_: float) -> None:
        if texts:
            file.write_text(texts.pop())

    server = Server(read(), reread=read, file=str(file))
    try:
        monkeypatch.setattr(reloading, "time", SimpleNamespace(sleep=write))
        file.write_text("")
        server.reload_now()
        assert server.config.plans_per_second == 5
    finally:
        server.close()


def test_a_file_that_changes_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    numbers = itertools.count()
    monkeypatch.setattr(
        reloading, "time", SimpleNamespace(sleep=lambda _: file.write_text("#" * next(numbers)))
    )
    with pytest.raises(ConfigError, match=r"settings\.yaml changes all the time"):
        wait_until_written([str(file)])


def test_a_daemon_that_an_engine_started_has_no_file(config: Config, tmp_path: Path) -> None:
    """Its settings are in its environment, which nobody can change."""
    with Reloaded(config(), tmp_path / "settings.yaml") as daemon:
        said = daemon.reload("saves_per_second: 0.001\n")
        assert "no settings file was named at start: nothing to read again" in said
        assert "were read again" not in said


def test_without_a_file_keys_are_read_again_all_the_same() -> None:
    read = "only keys, roles and limits of tenants were read again"
    assert nothing_named(more=True).endswith(read)


def test_settings_that_count_at_once(driver: Callable[..., Driver], config: Config) -> None:
    engine = driver()
    for seed in range(4):
        engine.save(prompt(seed, 40))
    store: Store = engine.store
    store.reload(config(namespace_nodes=2, plans_per_second=0.001, max_nodes=3))
    engine.save(prompt(4, 40))
    assert len(store.tree) == 2, "a quota where there was none"
    assert engine.serve(prompt(4, 40)).exact == 39
    assert engine.plan(prompt(4, 40)).declined == "too_many_plans"
    store.reload(config(min_saving_ms=1e9))
    assert engine.plan(prompt(4, 40)).declined == "no_saving"


def test_a_change_takes_what_is_live_and_names_the_rest(config: Config) -> None:
    now = config()
    asked = msgspec.structs.replace(
        now, encryption_key="env:SECRET", lease_seconds=7.0, policy="exact"
    )
    change = changed(now, asked)
    assert change.config == msgspec.structs.replace(now, lease_seconds=7.0)
    assert "lease_seconds is 7.0 now" in change.told
    assert "policy" in change.told
    assert "SECRET" not in change.told
    assert changed(now, now).told.endswith("no setting has changed")
    limited = msgspec.structs.replace(now, tenant_limits="/limits.yaml")
    assert changed(limited, limited).told.endswith("; the file of tenant_limits was read too")


def test_what_is_live_is_a_setting() -> None:
    assert set(LIVE) <= set(StoreConfig.__struct_fields__)


def test_a_mistake_is_told_as_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max_nodes: none\n")
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        configured(None, file)
