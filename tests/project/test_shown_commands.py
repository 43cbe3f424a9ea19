"""Every command that the documents show in a block, in the table of commands or in that of everyday
work is run as it stands there, on a throwaway home. What is not run stands in `ELSEWHERE`, with the
reason."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from kvshare_connectors.vllm import launch

from benchmarks.peers.lmcache import lmcache_settings
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.address import answers
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from tests.support.commands import run
from tests.support.daemons import START_S, ClientDriver
from tests.support.documents import BEFORE, DOCS, PAGES, commands_of, quoted, tables_of
from tests.support.needs import need
from tests.support.oracle import prompt
from tests.support.page import CHILD, TENANT, World, world

pytestmark = pytest.mark.usefixtures("plain_environment")

ELSEWHERE = {
    r"kvshare vllm serve": "starts an engine: tests/engine/test_server.py",
    r"kvshare publish": "starts an engine: tests/engine/test_publish.py",
    r"curl .*localhost:8000": "asks an engine: tests/engine/test_server.py",
    r"vllm ": "starts an engine: compared below with what tests start",
    r"lmcache ": "starts a server: tests/connectors/lmcache/inside",
    r"make ": "makes an environment or measures for minutes",
    r"(python -m )?pip install": "asks an index; test_packaging.py installs without one",
    r"python3 -m venv": "writes to /opt; test_packaging.py makes one elsewhere",
    r"python -m benchmarks": "measures for minutes; tests/benchmarks/test_main.py parses it",
    r"python tests/gpu": "needs a GPU",
    r"(useradd|cp|systemctl) ": "changes the machine; test_deploy.py reads the unit",
    r"(docker|kubectl) ": "needs a registry or a cluster; test_deploy.py reads its files",
}
"""Commands that are not run here, by how they begin, and why."""


def begins(command: str, start: str) -> bool:
    """`start`: of the command behind its variables."""
    return re.match(rf"{BEFORE}({start})", f"{command} ") is not None


def elsewhere(command: str) -> bool:
    return any(begins(command, start) for start in ELSEWHERE)


HERE = [
    pytest.param(page, id=page.stem)
    for page in PAGES
    if not all(elsewhere(command) for command in commands_of(page))
]


def test_what_is_not_run_is_shown() -> None:
    shown = [command for page in PAGES for command in commands_of(page)]
    assert len(shown) > 50
    assert [start for start in ELSEWHERE if not any(begins(it, start) for it in shown)] == []
    assert {page.id for page in HERE} >= {"start", "http", "pools", "security", "operating"}


# --- engines: what is shown is what is started ---------------------------------------------------


def shown(page: str, program: str) -> list[str]:
    """The words of the one command of a page that begins like this."""
    (command,) = (it for it in commands_of(DOCS / page) if it.startswith(program))
    return shlex.split(command)


def transfer(words: list[str]) -> dict[str, Any]:
    """The last word: the connector and its settings."""
    return dict(json.loads(words[-1]))


def test_vllms_own_command_is_what_ours_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_cpu_build", lambda: True)
    given = [word for word in shown("vllm.md", "kvshare vllm serve MODEL") if word[0] not in "[a"]
    ours = launch.vllm_arguments(launch.split([*given[3:-1], "--kvshare.home", "DIR"]), environ={})
    theirs = shown("vllm.md", "vllm serve")[1:]
    assert theirs[:-1] == ours[:-1]
    settings = transfer(theirs)["kv_connector_extra_config"]
    assert settings.pop("kvshare.home") == "DIR"
    settings["kvshare.home"] = str(Path("DIR").absolute())
    assert {**transfer(theirs), "kv_connector_extra_config": settings} == transfer(ours)


def test_vllm_with_lmcache_is_what_the_tests_start() -> None:
    port = shown("lmcache.md", "lmcache server")[3]
    tested = lmcache_settings(int(port))["kv_transfer_config"]
    assert transfer(shown("lmcache.md", "vllm serve")) == tested


# --- a shell ------------------------------------------------------------------------------------


class Shell:
    """Runs commands in a folder: `kvshare` in this process, and its daemons and all else as
    processes."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self.world = world
        self.home = world.daemon.config.home_path
        self._ports: dict[str, str] = {}
        self._served: list[subprocess.Popen[bytes]] = []
        self._count = 0

    def run(self, command: str, **more: str) -> None:
        """Run one command; it must end well. A daemon is left running, on a home of its own."""
        words = shlex.split(command)
        given = dict(word.split("=", 1) for word in words[: _begin(words)])
        words = words[_begin(words) :]
        variables = {"KVSHARE_HOME": str(self.home), **given, **more}
        if words[:2] == ["kvshare", "serve"]:
            self._serve(words[1:], variables)
        elif words[0] == "kvshare":
            with mock.patch.dict(os.environ, variables), contextlib.chdir(self.folder):
                code, out, err = run(*words[1:], answer="y\n")
            allowed = {0, 1} if words[1] == "doctor" else {0}  # it may find fault with a test's
            assert code in allowed, f"{command}: {code}\n{out}{err}"
        else:
            need(shutil.which(words[0]) is not None, words[0])
            bash = ["bash", "-euo", "pipefail", "-c", command]
            done = subprocess.run(bash, cwd=self.folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def _serve(self, words: list[str], variables: Mapping[str, str]) -> None:
        self.end()  # the ports are those of the page
        self._count += 1
        home = self.folder / f"served-{self._count}"
        log = home.with_suffix(".log")
        program = [sys.executable, "-m", "kvshare_store.cli.main", *words]
        settings = {**variables, "KVSHARE_HOME": str(home), "KVSHARE_HOST_BYTES": "4MiB"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                program, cwd=self.folder, env={**os.environ, **settings}, stdout=out, stderr=out
            )
        self._served.append(process)
        deadline = time.monotonic() + START_S
        while not answers(home) or not all(map(_listens, self._ports.values())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def port(self, shown: str) -> str:
        """A free port, for one that a page shows."""
        if shown not in self._ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._ports[shown] = str(probe.getsockname()[1])
        return self._ports[shown]

    def end(self) -> None:
        """End the daemons that were started, and well."""
        for process in self._served:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(START_S) for process in self._served]
        self._served = []
        assert not any(codes), codes

    def close(self) -> None:
        """The page is done."""
        self.end()
        self._ports.clear()


def _begin(words: list[str]) -> int:
    """Where the command begins behind its variables."""
    return next(at for at, word in enumerate(words) if not re.match(r"KVSHARE_\w+=", word))


def _listens(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Beside a daemon with prompts of tenants and of a pool, and a log."""
    folder = tmp_path_factory.mktemp("shown")
    with world(folder) as made:
        with Client(made.daemon.config.home_path) as client:
            pool = ClientDriver(client, made.space.in_pool("house"))
            assert pool.save(made.tokens(CHILD))
            client.flush()
        opened = Shell(folder, made)
        try:
            yield opened
        finally:
            opened.close()


# --- the blocks of each page --------------------------------------------------------------------


@pytest.fixture
def filled(shell: Shell) -> Shell:
    """With the files that pages name."""
    (shell.folder / "FILE.jsonl").write_text(json.dumps({"prompt": CHILD}) + "\n")
    key_file(shell.folder / "new-key")
    return shell


def key_file(path: Path) -> str:
    """A new key; returns the setting for it."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(os.urandom(32).hex())
    return f"file:{path}"


def as_here(command: str, shell: Shell) -> str:
    """A command of a page with the names and addresses that are here."""
    for shown in re.findall(r":(8470|7411)\b", command):
        command = command.replace(f":{shown}", f":{shell.port(shown)}")
    names = {
        "tcp://store.example:": "tcp://127.0.0.1:",
        "http://HOST:": "http://127.0.0.1:",
        "--tokenizer DIR": f"--tokenizer {shell.world.space.tokenizer}",
        "--request ID": "--request chat-",
        "--node NODE": f"--node {shell.world.child}",
        "file:/etc/kvshare/new-key": f"file:{shell.folder / 'new-key'}",
    }
    for shown, here in names.items():
        command = command.replace(shown, here)
    return command


@pytest.mark.parametrize("page", HERE)
def test_the_blocks_of_a_page_are_run(page: Path, filled: Shell) -> None:
    before: list[str] = []
    try:
        for command in commands_of(page):
            if not elsewhere(command):
                filled.run(as_here(command, filled), **prepared(command, before, filled))
                before.append(command)
    finally:
        filled.close()
    assert before


def prepared(command: str, before: list[str], shell: Shell) -> dict[str, str]:
    """Do what a page asks for in words before this command; returns variables for it."""
    if "admin.pem" in command:  # "made as the engine's", with `/OU=admin`
        made = next(it for it in before if "engine.pem" in it)
        shell.run(made.replace("node-1/OU=engine", "ops/OU=admin").replace("engine.", "admin."))
    if "rekey" in command:
        home, key = str(shell.folder / "sealed"), key_file(shell.folder / "key")
        layout = shell.world.space.layout
        settings = StoreConfig(home=home, encryption_key=key, host_bytes=1 << 22, semantic="never")
        with Store(settings) as store:
            rows = np.ones(layout.shape(600), np.uint32)
            store.save(prompt(1, 600), Namespace("m", layout), rows)
        return {"KVSHARE_HOME": home, "KVSHARE_ENCRYPTION_KEY": key}
    return {}


# --- tables of commands ----------------------------------------------------------------------

LAST = "kvshare stop"
BLOCKS = ("kvshare serve", "kvshare rekey")
"""Rows that blocks of pages run."""


def commands_in(page: str, head: tuple[str, str], column: str) -> list[str]:
    """Those that a column of a table shows, without those that blocks of pages run."""
    (table,) = tables_of(DOCS / page, *head)
    found = [it for row in table[1:] for it in quoted(row[head.index(column)])]
    return [it for it in found if it.startswith("kvshare ") and not it.startswith(BLOCKS)]


def test_everyday_work_is_run(filled: Shell) -> None:
    """Nothing is removed and nothing stopped: the table of commands does that."""
    commands = commands_in("operating.md", ("you want to", "do"), "do")
    here = {
        "kvshare purge --tenant SALT": f"kvshare purge --tenant {shlex.quote(TENANT)} --dry-run",
        "kvshare pin NODE": f"kvshare pin {filled.world.parent}",
    }
    assert {LAST, *here} <= set(commands)
    for command in commands:
        if command != LAST and not elsewhere(command):
            filled.run(as_here(here.get(command, command), filled))


def test_the_table_of_commands_is_run(filled: Shell) -> None:
    commands = commands_in("commands.md", ("command", "what it does"), "command")
    assert len(commands) > 25
    world, folder = filled.world, filled.folder
    (folder / "TRACE").write_text(json.dumps({"tokens": prompt(1, 1000)}) + "\n")
    (folder / "PROMPT_FILE").write_text(CHILD)
    of_text = f"--namespace {world.space.digest}"
    here = {
        "kvshare top": "kvshare top --count 1 --interval 0.1",
        "kvshare evict": "kvshare evict --older-than 7d",
        "kvshare purge": f"kvshare purge --tenant {shlex.quote(TENANT)}",
        "kvshare purge NODE --lineage": f"kvshare purge {world.child} --lineage",
        "kvshare explain PROMPT_FILE": f"kvshare explain PROMPT_FILE {of_text}",
        "kvshare diff A B": f"kvshare diff {world.parent} {world.parent}",
        "kvshare completion SHELL": "kvshare completion bash",
        "kvshare simulate --prompts FILE":
            f"kvshare simulate --prompts FILE.jsonl --tokenizer {world.space.tokenizer}",
    }  # fmt: skip
    assert here.keys() <= set(commands)
    key = {"KVSHARE_TENANT_KEY": f"file:{folder / 'new-key'}"}
    for command in sorted(commands, key=LAST.__eq__):
        if not elsewhere(command):
            line = here.get(command, command).replace("NODE", world.parent)
            filled.run(line, **(key if command == "kvshare salt NAME" else {}))
    assert world.daemon.process is not None
    assert world.daemon.process.wait(START_S) == 0
