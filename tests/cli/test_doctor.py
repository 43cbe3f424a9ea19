"""`doctor`, `top` and `completion`."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.tiers.host import arena
from kvshare_store.cli import checkup, top
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import Failed
from kvshare_store.observability.version import version
from tests.support.commands import one_line, run
from tests.support.daemons import ClientDriver, Daemon, serving
from tests.support.neighbours import NAMESPACE
from tests.support.stores import SMALL

pytestmark = pytest.mark.usefixtures("plain_environment")

LITTLE = ("--set", "host_bytes=1MiB", "--set", "disk_bytes=1MiB")


def diagnosed(home: Path, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Exit code, and the findings by what was checked."""
    code, out, err = run("doctor", "--json", "--home", home, *LITTLE, *arguments)
    assert err == ""
    found = json.loads(out)
    assert code == (not found["well"])
    by_what: dict[str, list[dict[str, Any]]] = {}
    for finding in found["findings"]:
        by_what.setdefault(finding["what"], []).append(finding)
        assert finding["advice"] or finding["state"] in ("ok", "note")
    return code, by_what


def states(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["state"] for finding in findings]


def test_a_home_that_is_not_there_yet(home: Path) -> None:
    code, found = diagnosed(home)
    assert code == 0
    assert states(found["home"]) == states(found["daemon"]) == ["note"]
    assert states(found["memory"] + found["shared memory"] + found["disk"]) == ["ok"] * 3
    assert not home.exists()


def test_where_engines_start_no_daemon_one_must_run(home: Path) -> None:
    code, found = diagnosed(home, "--set", "start_daemon=false")
    assert (code, states(found["daemon"])) == (1, ["wrong"])
    assert "kvshare serve" in found["daemon"][0]["advice"]


def test_a_running_daemon_is_well(home: Path) -> None:
    with Daemon(StoreConfig(home=str(home), **SMALL)):
        code, found = diagnosed(home)
        assert (code, states(found["permissions"])) == (0, ["ok", "ok"])
        assert f"version {version()}, ok, 0 nodes" in found["daemon"][0]["found"]
        assert "disk_bytes 16.0 MiB" in found["disk"][0]["found"], "as the daemon runs"
        out = run("doctor", "--home", home, columns="200")[1]
        assert "kvshare.sock is 0600" in out


def test_what_engines_could_not_load_is_no_damage(home: Path) -> None:
    with serving(StoreConfig(home=str(home), **SMALL)):
        with Client(home) as client:
            for kind in ("internal", "corrupt", "timeout"):
                client.call(Failed(kind))
        code, found = diagnosed(home)
    advice = {error["found"]: error["advice"] for error in found["errors"]}
    assert list(advice) == ["internal: 1", "corrupt: 1"]
    assert "the engine's log, or daemon.log" in advice["internal: 1"]
    assert "kvshare check" in advice["corrupt: 1"]
    assert "check" not in advice["internal: 1"]
    assert code == 0


def test_a_home_that_others_can_read(home: Path) -> None:
    with serving(StoreConfig(home=str(home), **SMALL)):
        home.chmod(0o755)
        (home / "kvshare.sock").chmod(0o666)
        code, found = diagnosed(home)
        assert (code, states(found["permissions"])) == (1, ["wrong", "wrong"])
        assert found["permissions"][0]["advice"] == f"chmod 0700 {home}"
        code, out, _ = run("doctor", "--home", home)
        assert code == 1
        assert "2 wrong" in out


def test_a_home_that_is_a_file(home: Path) -> None:
    home.touch()
    code, found = diagnosed(home)
    assert (code, states(found["home"])) == (1, ["wrong"])


def test_more_memory_and_disk_than_there_is(home: Path) -> None:
    much = ("--set", "host_bytes=100000TiB", "--set", "disk_bytes=100000TiB")
    code, found = diagnosed(home, *much)
    assert code == 1
    assert states(found["memory"]) == ["wrong"]
    assert states(found["disk"]) == ["warning"]


def test_limits_of_the_process(home: Path) -> None:
    """Run in a process of its own, since lowered limits cannot be raised again."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({2**22}, {2**22}))\n"
        "from kvshare_store.cli.main import main\n"
        "main(['doctor', '--json', '--set', 'host_bytes=8MiB', '--home', sys.argv[1]])\n"
    )
    command = [sys.executable, "-c", code, str(home)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {one["what"]: one for one in json.loads(ended.stdout)["findings"]}
    assert ended.returncode == 1
    assert found["open files"]["state"] == "warning"
    assert found["file size"]["state"] == "wrong"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 512


def test_no_memory_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(arena.os, "memfd_create", refuse)
    code, found = diagnosed(home)
    assert (code, states(found["shared memory"])) == (1, ["wrong"])


def test_extras_that_the_settings_need(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "find_spec", lambda _: None)
    settings = (
        "--set", "remote=s3://bucket/x", "--set", "encryption_key=env:KEY", "--set", "http=:8470",
    )  # fmt: skip
    code, found = diagnosed(home, *settings)
    assert code == 1
    advice = {one["advice"] for one in found["extras"]} - {""}
    assert advice == {
        f"pip install 'kvshare-store[{extra}]'" for extra in ("s3", "encryption", "http")
    }


def test_extras_that_are_here(home: Path) -> None:
    assert "http" in diagnosed(home)[1]["extras"][0]["found"].split(", ")


def test_variables_that_are_no_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSHARE_SERVICE_PORT", "80")
    assert states(diagnosed(home)[1]["environment"]) == ["warning"]


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("vllm serve m", "note"),
        ("vllm serve m --kv-transfer-config {KVShareConnector}", "warning"),
        ("vllm serve m --scheduler-cls x.KVShareScheduler --kv-transfer-config KVShareConnector",
         "ok"),
    ],
)  # fmt: skip
def test_flags_of_a_running_engine(line: str, state: str) -> None:
    assert checkup.flags_of(1, line).state == state


@pytest.mark.parametrize("words", [["--enforce-eager"], ["--port", "1", "-O0"]])
def test_an_engine_that_compiles_nothing(words: list[str]) -> None:
    assert not checkup.compiles(["vllm", "serve", "m", *words])
    assert checkup.compiles(["vllm", "serve", "m", "--port", "1"])


# --- top ------------------------------------------------------------------------------------------


def test_top_prints_a_line_each_time(home: Path) -> None:
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        ClientDriver(client, NAMESPACE).save(range(200))
        code, out, err = run("top", "--interval", "0.1", "--count", "2", "--home", home)
    assert (code, err) == (0, "")
    assert len(re.findall(r"^\d\d:\d\d:\d\d lookups 0\.0/s .* nodes 1 ", out, re.M)) == 2


def test_top_prints_an_object_a_line_for_programs(home: Path) -> None:
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        ClientDriver(client, NAMESPACE).save(range(200))
        code, out, err = run("top", "--json", "-i", "0.1", "-c", "2", "--home", home)
    assert (code, err) == (0, "")
    looks = [json.loads(line) for line in out.splitlines()]
    assert [look["stats"]["nodes"] for look in looks] == [1, 1]
    assert [look["per_second"]["lookups"] for look in looks] == [0.0, 0.0]
    assert looks[0]["time"] < looks[1]["time"]


def test_top_needs_a_daemon(home: Path) -> None:
    said = one_line(run("top", "--home", home), 7)
    assert f"no daemon serves {home}; start one: kvshare serve --home {home}" in said


def test_rates_begin_anew_with_a_daemon() -> None:
    before = dict.fromkeys(top._RATES, 100) | {"pid": 1, "since": 1.0}
    now = dict.fromkeys(top._RATES, 120) | {"pid": 1, "since": 1.0}
    assert set(top.per_second(before, now, 2.0).values()) == {10.0}
    assert set(top.per_second(before, now | {"pid": 2}, 2.0).values()) == {60.0}


# --- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str) -> None:
    code, out, err = run("completion", shell)
    assert (code, err) == (0, "")
    assert "_KVSHARE_COMPLETE" in out


def test_no_such_shell() -> None:
    assert "SHELL" in one_line(run("completion", "tcsh"), 2)


def test_bash_completes_commands() -> None:
    asked = {"_KVSHARE_COMPLETE": "complete_bash", "COMP_WORDS": "kvshare ex", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "kvshare_store.cli.main"]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **asked}
    )
    assert "explain" in found.stdout.split()
