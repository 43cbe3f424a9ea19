"""The connector as vLLM makes it: where its settings come from, and what it logs at the start."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing vLLM warns, and here warnings are errors
    pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")

import vllm.model_executor.models.registry as registry
from kvshare_connectors.vllm.connector import KVShareConnector
from kvshare_connectors.vllm.identity import namespace_of
from kvshare_connectors.vllm.settings import settings_of
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.server import Server
from kvshare_store.errors import ConfigError
from kvshare_store.namespace import Namespace
from kvshare_store.observability.version import version
from tests.support.daemons import ClientDriver, serving
from tests.support.servers import free_port

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore:::(vllm|torch|transformers)")]

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("KVSHARE_")]:
        monkeypatch.delenv(name)


# --- settings -------------------------------------------------------------------------------------


def settings(**extra: Any) -> StoreConfig:
    """What vLLM passes as `kv_connector_extra_config`; `a__b` stands for `a.b`."""
    given = {name.replace("__", "."): value for name, value in extra.items()}
    transfer = SimpleNamespace(kv_connector_extra_config=given)
    return settings_of(SimpleNamespace(kv_transfer_config=transfer))  # type: ignore[arg-type]


def test_settings_come_from_the_connectors_configuration() -> None:
    config = settings(kvshare__policy="exact", kvshare__host_bytes="1GiB")
    assert (config.policy, config.host_bytes) == ("exact", 2**30)


@pytest.mark.parametrize("name", ["policy", "kvshare_policy", "KVSHARE__policy", "lmcache__policy"])
def test_settings_of_others_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name.replace('__', '.')}' does not start with kvsh"):
        settings(kvshare__policy="exact", **{name: "exact"})


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'polcy'"):
        settings(kvshare__polcy="exact")


def test_a_daemon_that_an_engine_starts_leaves_when_nobody_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is ten minutes. A file overrides it, the environment overrides the file, and the
    connector's own configuration overrides both."""
    assert settings().idle_exit_s == 600
    file = tmp_path / "kvshare.yaml"
    file.write_text("idle_exit_s: 0\n")
    assert settings(kvshare__config=str(file)).idle_exit_s == 0
    monkeypatch.setenv("KVSHARE_CONFIG", str(file))
    assert settings().idle_exit_s == 0
    monkeypatch.setenv("KVSHARE_IDLE_EXIT_S", "30")
    assert settings().idle_exit_s == 30
    assert settings(kvshare__idle_exit_s=7).idle_exit_s == 7


# --- the connector --------------------------------------------------------------------------------

Connect = Callable[..., KVShareConnector]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VllmConfig]:
    """vLLM's configuration of a tiny model with KVShare."""
    # vLLM looks at a model's class in a new process, which takes ten seconds a class.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))

    def make(home: Path, failure_policy: str = "recompute", **settings: Any) -> VllmConfig:
        extra = {"home": str(home), "semantic": "never"} | settings
        transfer = KVTransferConfig(
            kv_connector="KVShareConnector",
            kv_connector_module_path="kvshare_connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy=failure_policy,
            kv_connector_extra_config={f"kvshare.{name}": extra[name] for name in extra},
        )
        model = ModelConfig(
            model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32"
        )
        return VllmConfig(
            model_config=model,
            cache_config=CacheConfig(block_size=32),
            kv_transfer_config=transfer,
        )

    return make


def caches() -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=16, dtype=torch.float32)
    return KVCacheConfig(16, [], [KVCacheGroupSpec(["0", "1"], spec)])


@pytest.fixture
def connect(configure: Callable[..., VllmConfig]) -> Iterator[Connect]:
    """The scheduler's side of the connector; closed at the end."""
    made: list[KVShareConnector] = []

    def make(*arguments: Any, **settings: Any) -> KVShareConnector:
        config = configure(*arguments, **settings)
        made.append(KVShareConnector(config, KVConnectorRole.SCHEDULER, caches()))
        return made[-1]

    yield make
    for connector in made:
        connector.shutdown()


def test_a_failed_load_must_not_fail_its_request(connect: Connect, home: Path) -> None:
    """vLLM's own default would; one log line says what to write instead."""
    with pytest.raises(ConfigError, match='"kv_load_failure_policy": "recompute"') as refusal:
        connect(home, "fail")
    assert "\n" not in str(refusal.value)
    assert not home.exists()


@pytest.fixture
def daemon(home: Path) -> Iterator[Server]:
    config = StoreConfig(home=str(home), host_bytes=2**22, disk=False, semantic="never")
    with serving(config) as running:
        yield running


def store(home: Path, namespace: Namespace) -> None:
    with Client(home) as client:
        ClientDriver(client, namespace).save(range(100))


@pytest.mark.parametrize("stored", [(), ("tiny",), ("org/other", "tiny"), ("org/other", "x")])
def test_a_home_with_other_models_only_is_remarked(
    connect: Connect,
    configure: Callable[..., VllmConfig],
    daemon: Server,
    home: Path,
    caplog: pytest.LogCaptureFixture,
    stored: tuple[str, ...],
) -> None:
    layout = namespace_of(configure(home), caches()).layout
    for model in stored:
        store(home, Namespace(model, layout))
    with caplog.at_level(logging.INFO, "kvshare"):
        assert connect(home).planning is not None
    said = [record.getMessage() for record in caplog.records if record.name == "kvshare"]
    if stored != ("org/other", "x"):
        assert said == []
        return
    (line,) = said
    assert "\n" not in line
    assert f"in {home} are of org/other, x, none is of tiny: nothing is reused until" in line
    assert "serve it under the same name, else choose another home with kvshare.home" in line


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`said(logger)`: what was logged. vLLM's loggers do not propagate."""
    lines: dict[str, list[str]] = {}

    def keep(record: logging.LogRecord) -> bool:
        lines.setdefault(record.name, []).append(record.getMessage())
        return True

    for name in ("kvshare", "vllm.kvshare"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "filters", [keep])
        monkeypatch.setattr(logger, "level", logging.INFO)
        monkeypatch.setattr(logger, "_cache", {})
    return lambda logger: lines.get(logger, [])


def test_an_engine_says_what_serves_it(
    connect: Connect, daemon: Server, home: Path, said: Callable[..., list[str]]
) -> None:
    connect(home, policy="exact")
    assert said("vllm.kvshare") == [
        f"KVShare active: policy exact, home {home}, daemon pid {os.getpid()}, version {version()}"
    ]
    assert said("kvshare") == []  # a stricter policy is the one that holds


def test_an_engine_says_that_it_makes_second_looks(
    connect: Connect, daemon: Server, home: Path, said: Callable[..., list[str]]
) -> None:
    """The daemon, and `kvshare config`, do not know: it is the engine's own setting."""
    connect(home, second_look="idle")
    (line,) = said("vllm.kvshare")
    assert line.endswith(f", version {version()}, second_look idle")
    assert said("kvshare") == []


def test_what_is_set_in_vain_is_said(
    connect: Connect,
    daemon: Server,
    home: Path,
    said: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The daemon has 4 MiB of memory and the policy `balanced`."""
    monkeypatch.setenv("KVSHARE_SERVICE_PORT", "80")
    connect(home, policy="aggressive", host_bytes="1GiB", device_bytes="64MiB", min_run=3)
    assert [line.partition(";")[0] for line in said("kvshare")] == [
        "kvshare: KVSHARE_SERVICE_PORT in the environment is no setting and is ignored",
        f"kvshare: policy=aggressive does not count here: the daemon of {home} runs with balanced",
        f"kvshare: min_run=3 does not count here: the daemon of {home} runs with None",
        f"kvshare: host_bytes=1073741824 does not count here: the daemon of {home} runs with "
        "4194304",
    ]


@pytest.mark.parametrize(("second_look", "warns"), [("off", True), ("idle", False)])
def test_the_page_and_a_bound_that_this_engine_does_nothing_for_are_said(
    connect: Connect, home: Path, said: Callable[..., list[str]], second_look: str, warns: bool
) -> None:
    address = f"127.0.0.1:{free_port()}"
    own: dict[str, Any] = {"host_bytes": 2**22, "disk": False, "semantic": "never"}
    config = StoreConfig(home=str(home), quality_bound=0.02, http=address, **own)
    with serving(config):
        connect(home, second_look=second_look)
    (line,) = said("vllm.kvshare")
    assert line.endswith(f", page http://{address}/")
    found = [line for line in said("kvshare") if "quality_bound=0.02" in line]
    assert bool(found) == warns


def test_an_engine_starts_without_a_key_of_tenants_only_if_none_is_named(
    connect: Connect, daemon: Server, home: Path
) -> None:
    with pytest.raises(ConfigError, match="tenant_key: environment variable NO_SUCH is not set"):
        connect(home, tenant_key="env:NO_SUCH")
