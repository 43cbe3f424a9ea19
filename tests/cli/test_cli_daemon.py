"""The commands against a real daemon that holds two prompts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest

from kvshare_store.cli.common import parse_settings
from kvshare_store.config import PER_ENGINE, StoreConfig, load_config
from kvshare_store.config.reading import load_settings
from kvshare_store.daemon.address import answers
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import Decline, EngineCached, ShowNode
from kvshare_store.daemon.server import Server
from kvshare_store.daemon.spawn import Spawned, spawn_daemon
from kvshare_store.namespace import Namespace
from kvshare_store.observability.version import version
from kvshare_store.plan import Outcome
from kvshare_store.plan.spans import Span
from kvshare_store.save.staging import Reuse
from kvshare_store.tensors.layout import KVLayout
from tests.support import daemons
from tests.support.commands import run

NAMESPACE = Namespace("org/model", KVLayout(2, 2, 8, "float32"))
PARENT = list(range(100, 240))
CHILD = [*PARENT[:64], 7, 8, 9, *PARENT[70:]]
"""The parent with six tokens after the first block replaced by three."""
START_S = 60.0
SETTINGS = ("semantic=never", "host_bytes=64MiB", "disk_bytes=128MiB", "policy=faithful")


@contextlib.contextmanager
def serving(home: Path) -> Iterator[subprocess.Popen[str]]:
    """`kvshare serve`, until the end of the block."""
    command = [sys.executable, "-m", "kvshare_store.cli.main", "serve", "--home", str(home)]
    for setting in SETTINGS:
        command += ["--set", setting]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVSHARE_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    with process, ended(process):
        wait_for_socket(home, lambda: process.poll() is not None)
        yield process


def at_hand(home: Path) -> contextlib.AbstractContextManager[Server]:
    """The same daemon in this process, which starts sooner."""
    return daemons.serving(
        load_settings({"home": str(home), **parse_settings(SETTINGS)}, environ={}).config
    )


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """No process outlives its test."""
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def spawned(config: StoreConfig) -> Iterator[Spawned]:
    """A daemon that is nobody's child process, until the end of the block."""
    process = spawn_daemon(config)
    try:
        yield process
    finally:
        process.send(signal.SIGTERM)
        assert process.wait(START_S)
        process.close()


def wait_for_socket(home: Path, over: Callable[[], bool]) -> None:
    """Return once the daemon listens."""
    deadline = time.monotonic() + START_S
    while not answers(home):
        assert not over()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def save(client: Client, tokens: Sequence[int], reuse: Reuse | None = None) -> str:
    """Store a prompt with made-up rows."""
    staged = client.stage(np.asarray(tokens, np.int32), NAMESPACE, reuse or Reuse())
    random = np.random.default_rng(len(tokens))
    row_bytes = NAMESPACE.layout.row_bytes
    node = client.commit(staged, (random.bytes(rows * row_bytes) for rows in staged.sizes))
    assert node is not None
    return node


def fill(home: Path) -> tuple[str, str]:
    """Ids of a parent, and of a child that shares the parent's first block and one edited row."""
    with Client(home) as client:
        parent = save(client, PARENT)
        blocks = client.call(ShowNode(parent))["blocks"]
        spans = (Span(0, 64, 0, 0, 0, True), Span(67, 1, 70, 1, 6))
        child = save(
            client, CHILD, Reuse(spans, (blocks[0]["name"], blocks[1]["name"]), (parent,), 1)
        )
        client.flush()
    return parent, child


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """Home of a daemon with two nodes, and their ids."""
    home = tmp_path_factory.mktemp("cli") / "home"
    with serving(home):
        yield home, *fill(home)


Stored = tuple[Path, str, str]


def test_collections_of_a_daemon_pass_over_what_it_started_with(tmp_path: Path) -> None:
    """Looking at the objects of all libraries would stop every lookup for a tenth of a second."""
    code = (
        "import gc\n"
        "from kvshare_store.cli.serve import run\n"
        "from kvshare_store.config import StoreConfig\n"
        "from kvshare_store.daemon.server import Server\n"
        "def serve(daemon):\n"
        "    print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)\n"
        "    daemon.close()\n"
        "Server.serve = serve\n"
        f"run(lambda: StoreConfig(home={str(tmp_path)!r}, host_bytes=1 << 26))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=True)
    kept, looked_at = map(int, done.stdout.split())
    assert kept > 10_000
    assert looked_at < kept / 10


def test_stats_as_json(store: Stored) -> None:
    """Run in a process of its own: standard output may hold nothing but the document."""
    home = store[0]
    command = [sys.executable, "-m", "kvshare_store.cli.main", "stats", "--json", "--home", home]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stderr == ""
    stats = json.loads(found.stdout)
    with Client(home) as client:
        theirs, ours = stats.pop("daemon"), client.stats()
        assert theirs["pid"] == ours.pop("daemon")["pid"]
        assert stats == ours
    assert (stats["nodes"], stats["leases"], stats["errors"]) == (2, 0, {})
    assert stats["tiers"]["host"]["budget"] == 64 * 2**20
    assert stats["tiers"]["disk"]["blocks"] == stats["blocks"]


def test_stats_for_people(store: Stored) -> None:
    code, out, err = run("stats", "--home", store[0])
    assert (code, err) == (0, "")
    assert "2 nodes" in out
    assert "64.0 MiB" in out
    assert "exact prefix" in out
    with Client(store[0]) as client:
        pid = client.greet().pid
    assert f"policy faithful, version {version()}, daemon pid {pid}; counted since" in out


def test_stats_add_up_and_say_what_waits(home: Path) -> None:
    with serving(home):
        fill(home)
        with Client(home) as client:
            plan = client.plan(PARENT, NAMESPACE)  # leased: the outcome is not known yet
            client.call(Decline("multimodal", 30))
            client.call(EngineCached(16))
            out = run("stats", "--home", home)[1]
            assert re.search(r"^engine's prefix cache +16 ", out, re.MULTILINE)
            assert re.search(r"^recomputed +14 ", out, re.MULTILINE)
            assert re.search(r"^not finished +140 ", out, re.MULTILINE)
            client.finish(plan.lease, Outcome(exact=100, recomputed=8, cached=32))
            out = run("stats", "--home", home)[1]
        assert "tokens requested: 170" in out
        assert re.search(r"^engine's prefix cache +48 +28.2 % ", out, re.MULTILINE)
        assert "not finished" not in out


LISTING = """
import sys
from kvshare_store.cli.main import main
try: main(["ls", "--json", "--home", sys.argv[1]])
except SystemExit as end: assert end.code == 0
assert not any(name.startswith("lance_namespace_urllib3_client.api.") for name in sys.modules)
print("lancedb" in sys.modules)
"""


def test_only_a_home_that_nobody_serves_takes_the_time_to_load_lancedb(home: Path) -> None:
    """Most of a command's start, and part of LanceDB is left out; nothing of that shows."""

    def listed() -> tuple[Any, bool]:
        command = [sys.executable, "-c", LISTING, home]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        nodes, _, loaded = out.rstrip().rpartition("\n")
        return json.loads(nodes), loaded == "True"

    with at_hand(home):
        fill(home)
        nodes, loaded = listed()
        assert (len(nodes), loaded) == (2, False)
    assert listed() == (nodes, True)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_no_bar_is_cut(store: Stored, columns: str) -> None:
    out = run("stats", "--home", store[0], columns=columns)[1]
    bars = re.findall("[█▏░]+", out)
    assert {len(bar) for bar in bars} == {20}
    assert max(map(len, out.splitlines()[3:])) <= int(columns)


def test_config_of_a_running_daemon(store: Stored) -> None:
    code, out, err = run("config", "--json", "--home", store[0], "--set", "min_run=3")
    assert (code, err) == (0, "")
    found = json.loads(out)
    rows = {row.pop("name"): row for row in found["settings"]}
    assert found["served"]
    assert rows["host_bytes"] == {"value": 64 * 2**20, "source": "daemon", "here": 4 * 2**30}
    assert rows["policy"] == {"value": "faithful", "source": "daemon", "here": "balanced"}
    assert rows["min_run"] == {"value": None, "source": "daemon", "here": 3}
    assert rows["block_tokens"] == {"value": 64, "source": "default"}
    shown = run("config", "--home", store[0])[1]
    assert "as its daemon runs" in shown
    assert shown.count("per engine") == len(PER_ENGINE)


def test_every_command_reads_a_home_that_nobody_serves(home: Path) -> None:
    with at_hand(home):
        parent, child = fill(home)
        served = {name: run(name, "--json", "--home", home)[1] for name in ("ls", "stats")}
    assert run("ls", "--json", "--home", home)[1] == served["ls"]
    assert json.loads(run("show", child, "--json", "--home", home)[1])["parent"] == parent
    code, out, err = run("stats", "--home", home)
    assert (code, err) == (0, "")
    assert "2 nodes" in out
    assert "no daemon runs: nothing is counted" in out
    assert "lookups" not in out
    now = json.loads(run("stats", "--json", "--home", home)[1])
    assert (now["pid"], now["since"]) == (None, None)
    budgets = {name: tier["budget"] for name, tier in now["tiers"].items()}
    assert budgets == {"host": 4 << 30, "disk": 32 << 30}, "as a daemon would have them"
    assert now["tiers"]["disk"]["blocks"] == json.loads(served["stats"])["tiers"]["disk"]["blocks"]
    assert (now["pid"], now["since"]) == (None, None), "nobody has counted"
    budgets = {name: use["budget"] for name, use in now["tiers"].items()}
    assert budgets == {"host": 4 * 2**30, "disk": 32 * 2**30}, "those of a daemon"
    assert run("clear", "--yes", "--home", home) == (0, "2 nodes removed.\n", "")
    assert run("ls", "--home", home)[1] == f"No nodes in {home} yet.\n"


def test_ls(store: Stored) -> None:
    home, parent, child = store
    code, out, err = run("ls", "--home", home)
    assert (code, err) == (0, "")
    newest, oldest = out.splitlines()[-2:]
    assert newest.startswith(child[:12])
    assert newest.split()[3:6] == ["edited", "(1)", parent[:12]]
    assert oldest.startswith(parent[:12])
    assert " ".join(map(str, PARENT[:5])) in oldest  # no tokenizer: the prompt is given as numbers
    assert [node["id"] for node in json.loads(run("ls", "--json", "--home", home)[1])] == [
        child,
        parent,
    ]


def test_ls_says_what_it_leaves_out(store: Stored) -> None:
    out = run("ls", "--limit", "1", "--home", store[0])[1]
    assert "1 of 2 nodes" in out
    assert store[1][:12] + "  " not in out.splitlines()[2][:14]


def test_show(store: Stored) -> None:
    home, parent, child = store
    code, out, err = run("show", child[:8], "--blocks", "--home", home)
    assert (code, err) == (0, "")
    assert "edited, generation 1" in out
    assert "137, of which 67 exact from the start" in out
    removed, added = " ".join(map(str, PARENT[64:70])), "7 8 9"
    assert f"[-{removed}-]{{+{added}+}}" in out
    assert f"{parent[:12]}  140 tokens, stores 140 rows in 3 blocks\n" in out
    assert f"└── {child[:12]} (this node)  +3 -6 tokens, stores 72 rows in 2 blocks\n" in out
    rows = [line.split() for line in out.splitlines()]
    assert [row[1:] for row in rows[-4:]] == [
        ["host", "64", "1", "other"],
        ["host", "1", "1", "other"],
        ["host", "64", "no", "other"],
        ["host", "8", "no", "other"],
    ]


def test_show_json_and_text(store: Stored) -> None:
    home, parent, child = store
    node: dict[str, Any] = json.loads(run("show", parent, "--json", "--home", home)[1])
    assert (node["id"], node["children"], node["edits"]) == (parent, [child], [])
    assert run("show", child, "--text", "--home", home)[1] == " ".join(map(str, CHILD)) + "\n"


def test_show_what_is_not_there(store: Stored) -> None:
    code, out, err = run("show", "zzzz", "--home", store[0])
    assert (code, out) == (1, "")
    assert err == "kvshare: 0 nodes begin with 'zzzz'; `kvshare ls` shows their ids\n"


def test_pin_gc_and_check_through_the_daemon(store: Stored) -> None:
    home, parent, _ = store
    assert run("pin", parent[:8], "--home", home) == (0, f"{parent[:12]} is pinned.\n", "")
    assert json.loads(run("show", parent, "--json", "--home", home)[1])["pinned"]
    assert run("unpin", parent[:8], "--home", home)[1] == f"{parent[:12]} is not pinned.\n"
    code, out, _ = run("gc", "--dry-run", "--home", home)
    assert code == 0
    assert out.startswith("Would collect 0 blocks (0 B), 0 nodes, ")
    assert json.loads(run("gc", "--json", "--home", home)[1])["blocks"] == 0
    code, out, _ = run("check", "--json", "--home", home)
    found = json.loads(out)
    assert code == 0
    assert (found["nodes"], found["problems"], found["garbage"]) == (2, [], 0)
    assert found["blocks"] == found["blocks_read"] > 2
    out = run("check", "--sample", "2", "--home", home)[1]
    assert "2 of them read" in out
    assert out.endswith("no problems\n")


def test_gc_and_check_open_a_home_that_nobody_serves(home: Path) -> None:
    assert run("check", "--home", home)[0] == 3, "there is no store"
    with at_hand(home):
        parent, child = fill(home)
    block = sorted((home / "blocks").glob("*/*"))[0]
    stray = block.with_name("ab" * 32 + ".kvb")
    stray = home / "blocks" / "ab" / stray.name
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(block.read_bytes())
    assert json.loads(run("gc", "-n", "--json", "--home", home)[1])["blocks"] == 1
    assert run("pin", child, "--home", home)[0] == 0
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(data)
    code, out, _ = run("check", "--home", home)
    assert code == 0, "its nodes were dropped with it"
    assert f"corrupt {block.stem[:12]}" in out
    assert "1 block of garbage: 1 problem\n" in out
    assert run("check", "--repair", "--home", home)[0] == 0
    assert not stray.exists()
    assert run("check", "--home", home)[1].endswith(" 0 blocks of garbage: no problems\n")
    assert parent


def test_a_second_daemon_is_refused(store: Stored) -> None:
    code, out, err = run("serve", "--home", store[0], "--set", "host_bytes=1MiB")
    assert (code, out) == (4, "")
    assert err.count("\n") == 1
    assert "belongs to a running store; stop it, or choose another home" in err


@pytest.mark.parametrize(
    ("command", "words"), [("export", "cannot be written"), ("import", "cannot be read")]
)
def test_a_name_that_no_file_can_have_is_refused(
    home: Path, tmp_path: Path, command: str, words: str
) -> None:
    long = tmp_path / ("a" * 256)
    with at_hand(home):
        _, _, said = run(command, long, "--home", home)
    assert said == f"kvshare: archive {long} {words}: File name too long\n"


COMMAND = (sys.executable, "-m", "kvshare_store.cli.main")


def test_ctrl_c_at_a_question_is_a_no(home: Path) -> None:
    with at_hand(home):
        fill(home)
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([*COMMAND, "clear", "--home", home], **pipes) as process:
            assert process.stderr is not None
            assert b"(2)?" in b"".join(iter(lambda: process.stderr.read(1), b"["))
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert said.endswith(b"kvshare: stopped, nothing was changed\n")
        assert "2 nodes" in run("stats", "--home", home)[1]


def test_ctrl_c_is_how_watching_ends(home: Path) -> None:
    with at_hand(home):
        top = [*COMMAND, "top", "--home", home, "--json", "--interval", "0.1"]
        with subprocess.Popen(top, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, b"")


def test_clear_and_stop(home: Path) -> None:
    with serving(home) as process:
        fill(home)
        assert run("clear", "--home", home, answer="n\n")[0] == 1
        code, _, err = run("clear", "--home", home)
        assert code == 1
        assert err.endswith("kvshare: stopped, nothing was changed\n")
        assert "2 nodes" in run("stats", "--home", home)[1]

        code, out, _ = run("clear", "--home", home, answer="y\n")
        assert (code, out.strip()) == (0, "2 nodes removed.")
        assert run("ls", "--home", home)[1] == f"No nodes in {home} yet.\n"
        assert run("clear", "--home", home) == (0, "0 nodes removed.\n", "")

        code, out, err = run("stop", "--home", home)
        assert (code, err) == (0, "")
        assert out == f"The daemon of {home} (process {process.pid}) has stopped.\n"
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        *_, level, said = process.stderr.read().split(" ", 3)
        assert level == "INFO"
        assert said == (
            f"kvshare: serving {home} on {home}/kvshare.sock, host 64.0 MiB, disk 128.0 MiB, "
            "policy faithful\n"
        )
    nothing = (0, f"No daemon runs for {home}: nothing to stop.\n", "")
    assert run("stop", "--home", home) == nothing


def test_clear_without_asking(home: Path) -> None:
    with at_hand(home):
        fill(home)
        assert run("clear", "--yes", "--home", home) == (0, "2 nodes removed.\n", "")
        fill(home)
        code, out, _ = run("clear", "--yes", "--json", "--home", home)
        assert (code, json.loads(out)) == (0, {"removed": 2})


def test_a_spawned_daemon_has_the_settings_of_its_client(home: Path) -> None:
    config = StoreConfig(
        home=str(home), host_bytes=2**20, disk=False, policy="aggressive", delimiters=False,
        min_saving_ms=0.5, semantic="never",
    )  # fmt: skip
    with spawned(config) as process:
        wait_for_socket(home, lambda: process.ended)
        with Client(home) as client:
            assert client.greet().policy == "aggressive"
            tiers = client.stats()["tiers"]
        assert list(tiers) == ["host"]
        assert tiers["host"]["budget"] == 2**20
        assert run("stop", "--home", home)[0] == 0
        assert process.wait(START_S)
    assert "disk off, policy aggressive" in (home / "daemon.log").read_text()


OTHERS_SETTINGS = {
    "block_tokens": "16", "disk": "true", "tail": "7", "delimiters": "true", "policy": "exact",
    "remote": "redis://127.0.0.1:1/0", "idle_exit_s": "1", "config": "/nowhere/settings.yaml",
}  # fmt: skip


def test_a_spawned_daemon_has_no_other_settings(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's own settings must not leak into the daemon that it starts."""
    for name, value in OTHERS_SETTINGS.items():
        monkeypatch.setenv(f"KVSHARE_{name.upper()}", value)
    config = StoreConfig(home=str(home), host_bytes=2**20, disk=False, delimiters=False)
    assert config.tail is None
    with spawned(config) as process:
        wait_for_socket(home, lambda: process.ended)
        environment = psutil.Process(process.pid).environ()
        with Client(home) as client:
            assert client.greet().policy == config.policy
            assert list(client.stats()["tiers"]) == ["host"]
    assert load_config(environ=environment) == config
    assert environment["PATH"] == os.environ["PATH"]


def test_a_spawned_daemon_shows_no_secret(home: Path) -> None:
    """Anyone who may list processes may read their command lines."""
    config = StoreConfig(
        home=str(home), host_bytes=2**20, semantic="never",
        remote="redis://user:hunter2@127.0.0.1:1/0", encryption_key="env:KVSHARE_TEST_KEY",
    )  # fmt: skip
    with mock.patch.dict(os.environ, KVSHARE_TEST_KEY="ab" * 32):
        process = spawn_daemon(config)
    try:
        command = psutil.Process(process.pid).cmdline()
        readable = Path(f"/proc/{process.pid}/environ").stat().st_mode & 0o077
    finally:
        process.send(signal.SIGKILL)
        process.close()
    assert command[-3:] == ["serve", "--home", str(home)]
    assert "hunter2" not in " ".join(command)
    assert "KVSHARE_TEST_KEY" not in " ".join(command)
    assert not readable
