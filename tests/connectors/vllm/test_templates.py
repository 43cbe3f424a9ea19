"""`kvshare publish` without an engine: what it refuses before it starts one, and how one is asked
to fill a pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kvshare_connectors.vllm import launch, settings
from kvshare_connectors.vllm.requests import Wish, wish_of
from kvshare_connectors.vllm.templates import Filling

from kvshare_store.config import StoreConfig, load_config
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import ConfigError, StorageError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import as_tokens
from tests.support.commands import one_line, run
from tests.support.daemons import ClientDriver, serving
from tests.support.oracle import prompt

pytestmark = pytest.mark.usefixtures("plain_environment")


def engine_config(**extra: Any) -> Any:
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    return SimpleNamespace(kv_transfer_config=transfer)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "no template"),
        ('{"tokens": []}\n', "line 1"),
        ('{"tokens": [1]}\n{"other": 1}\n', "line 2"),
        ('{"tokens": ["a"]}\n', "line 1"),
        ("no json\n", "line 1"),
    ],
)
def test_files_that_hold_no_templates(tmp_path: Path, lines: str, told: str) -> None:
    file = tmp_path / "templates.jsonl"
    file.write_text(lines)
    assert told in one_line(run("publish", file, "--pool", "p", "--model", "m"), 2)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    found = run("publish", tmp_path / "none", "--pool", "p", "--model", "m")
    assert "cannot be read" in one_line(found, 2)


@pytest.mark.parametrize("name", ["", " ", "a,b", "x" * 65])
def test_names_that_no_engine_could_read(tmp_path: Path, name: str) -> None:
    assert "pool" in one_line(run("publish", tmp_path, "--pool", name, "--model", "m"), 2)


def test_what_somebody_has_removed_meanwhile_is_told(
    config: Callable[..., StoreConfig], namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a purge of the pool does, or another `publish --replace`."""
    planning = SimpleNamespace(config=config(), namespace=namespace)
    monkeypatch.setattr("kvshare_connectors.vllm.templates._sides", lambda _: (planning, None))
    with serving(config()), Client(config().home_path) as client:
        pool = ClientDriver(client, namespace.in_pool("house"))
        stored = [str(pool.save(prompt(seed, 40))) for seed in (1, 2)]
        templates = [as_tokens(prompt(seed, 40)) for seed in (1, 2)]
        with Filling(None, "house") as filling:
            assert filling.named(templates) == stored
            client.call(protocol.Forget((stored[1],)))
            with pytest.raises(StorageError, match=r"1 of 2 templates .* purged the pool"):
                filling.named(templates)


def test_only_the_command_asks_for_an_engine_that_fills_a_pool() -> None:
    request = launch.Request({"home": "/h"}, ["--model", "m"], pool="house")
    arguments = launch.vllm_arguments(request, environ={})
    transfer = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["kvshare.publish"] == "house"
    with pytest.raises(ConfigError, match="publish"):
        launch.split(["m", "--kvshare.publish", "house"])
    with pytest.raises(ConfigError, match="publish"):
        load_config({"publish": "house"})


def test_such_an_engine_stores_nothing_that_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says."""
    monkeypatch.setenv("KVSHARE_POOLS", "house")
    monkeypatch.setenv("KVSHARE_POLICY", "aggressive")
    monkeypatch.setenv("KVSHARE_SECOND_LOOK", "idle")
    extra = {"kvshare.publish": "house", "kvshare.tenant_key": "env:NONE"}
    found = settings.settings_of(engine_config(**extra))
    assert (found.policy, found.second_look, found.store_answers) == ("exact", "off", False)
    assert (found.pool_names, found.tenant_key) == ((), "")
    assert settings.settings_of(engine_config()).pool_names == ("house",)
    daemon = settings.sourced_settings(engine_config(**extra)).config
    assert (daemon.policy, daemon.second_look) == ("aggressive", "idle"), "as if it served"
    assert (daemon.idle_exit_s, found.store_answers) == (10.0, False), "and it soon makes room"
    assert settings.pool_of(engine_config()) == ""


@pytest.mark.parametrize(
    ("params", "wish"),
    [
        (None, Wish()),
        ({"kvshare.pools": True}, Wish()),
        ({"kvshare.pools": False}, Wish(pools=False)),
        ({"kvshare.pools": "house"}, Wish(unknown=("kvshare.pools",), pools=False)),
        ({"kvshare.pool": "house"}, Wish(unknown=("kvshare.pool",))),
        ({"kvshare.publish": "house"}, Wish(unknown=("kvshare.publish",))),
    ],
)
def test_what_a_request_may_say_of_pools(params: dict[str, Any] | None, wish: Wish) -> None:
    assert wish_of(SimpleNamespace(kv_transfer_params=params)) == wish  # type: ignore[arg-type]


def test_names_of_pools_in_the_settings() -> None:
    assert StoreConfig().pool_names == ()
    assert StoreConfig(pools=" b, a,,b ").pool_names == ("b", "a")
    for wrong in ("x" * 65, ",".join(map(str, range(17)))):
        with pytest.raises(ConfigError, match="pools"):
            StoreConfig(pools=wrong)
