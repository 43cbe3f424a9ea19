"""The command line without a daemon: options, bad input, readable output."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvshare_store import readable
from kvshare_store.cli import common, config, gc, log, ls, main, serve, show, stats, top
from kvshare_store.config import FIELDS, StoreConfig
from kvshare_store.namespace import Tenants
from kvshare_store.observability.version import version
from tests.support.commands import one_line, run

pytestmark = pytest.mark.usefixtures("plain_environment")


def rendered(*parts: Any, width: int = 120) -> str:
    """What a terminal without colours shows."""
    console = Console(
        file=io.StringIO(), width=width, highlight=False, markup=False, color_system=None
    )
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- start-up -------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from kvshare_store.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "heavy = {'torch', 'lancedb', 'vllm', 'pyarrow', 'numpy', 'zmq', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    for command in ("serve", "stats", "ls", "show", "clear", "stop", "vllm"):
        assert f" {command} " in out


def test_serve_help_names_every_field() -> None:
    _, out, _ = run("serve", "--help")
    assert all(field in out for field in FIELDS)


# --- settings -------------------------------------------------------------------------------------


def test_set_wins_over_environment_over_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kvshare.yaml"
    file.write_text("policy: exact\ntail: 1\nmin_run: 2\nhome: /from/file\n")
    monkeypatch.setenv("KVSHARE_POLICY", "faithful")
    monkeypatch.setenv("KVSHARE_TAIL", "3")
    found = common.configured(None, file, ["policy=aggressive"])
    assert (found.policy, found.tail, found.min_run) == ("aggressive", 3, 2)
    assert found.home == "/from/file"
    assert common.configured("/here", file, ["home=/there"]).home == "/here"


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_can_be_passed_as_text(field: str) -> None:
    given_ = StoreConfig(
        home="/a b=c",
        disk=False,
        delimiters=False,
        policy="faithful",
        edit_window=0,
        min_saving_ms=0.5,
        disk_codec="zstd",
    )
    value = getattr(given_, field)
    if value is not None:
        assert getattr(common.configured(None, None, [f"{field}={value}"]), field) == value


def test_the_last_setting_of_a_field_wins() -> None:
    assert common.parse_settings(["tail=1", "tail=2", "home=a=b"]) == {"tail": "2", "home": "a=b"}


def test_the_start_line_says_where_and_how_much() -> None:
    chosen = StoreConfig(home="/h", host_bytes=64 * 2**20, disk=False, policy="exact")
    line = serve.start_line(chosen, "/h/kvshare.sock")
    assert line == "serving /h on /h/kvshare.sock, host 64.0 MiB, disk off, policy exact"


# --- bad input: one clear line, the right exit code -----------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--set", "polcy=exact"], "unknown setting 'polcy'; did you mean policy?"),
        (["serve", "--set", "policy=lax"], "policy"),
        (["serve", "--set", "block_tokens=many"], "block_tokens"),
        (["serve", "--set", "disk=perhaps"], "disk"),
        (["serve", "--set", "host_bytes=0"], "host_bytes must be greater than zero"),
        (["serve", "--set", "disk_bytes=0"], "disk_bytes must be greater than zero"),
        (["serve", "--set", "host_bytes=lots"], "host_bytes: 'lots' is not a size"),
        (["serve", "--set", "host_bytes=1"], "host_bytes: '1' has no room for one block"),
        (["serve", "--set", "tail=-1"], "tail must not be negative"),
        (["serve", "--set", "policy"], "write --set field=value"),
        (["serve", "--set", "=exact"], "write --set field=value"),
        (["serve", "--home", ""], "home is empty"),
        (["serve", "--config", "/no/such.yaml"], "/no/such.yaml cannot be read"),
        (["stats", "--config", "/no/such.yaml"], "/no/such.yaml cannot be read"),
        (["stats", "--bogus"], "--bogus (see kvshare stats --help)"),
        (["ls", "--limit", "0"], "--limit"),
        (["ls", "--limit", "few"], "--limit"),
        (["show"], "NODE"),
        (["frobnicate"], "frobnicate"),
        (["vllm"], "kvshare --help"),
    ],
)
def test_bad_settings(arguments: list[str], words: str) -> None:
    assert words in one_line(run(*arguments), 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("polcy: exact\n", "unknown setting 'polcy'"),
        ("tail: many\n", "tail"),
        ("policy: [exact\n", "is not YAML"),
        ("- policy\n", "must hold 'field: value' lines"),
        ("home: ''\n", "home is empty"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "stats"])
def test_bad_file(command: str, text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "kvshare.yaml"
    file.write_text(text)
    assert words in one_line(run(command, "--config", file), 2)


def test_bad_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSHARE_HOST_BYTES", "lots")
    assert "KVSHARE_HOST_BYTES: 'lots'" in one_line(run("stats"), 2)


@pytest.mark.parametrize("below", [".", "below"])
def test_unusable_home(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    line = one_line(run("serve", "--home", file / below), 3)
    assert str(file) in line
    assert "choose another with --home" in line


def test_home_of_another_format(home: Path) -> None:
    home.mkdir()
    (home / "format").write_text("999")
    assert "format '999'" in one_line(run("serve", "--home", home, "--set", "host_bytes=1MiB"), 3)


def test_more_memory_than_there_is(home: Path) -> None:
    line = one_line(run("serve", "--home", home, "--set", "host_bytes=100000TiB"), 3)
    assert "lower host_bytes" in line


def test_socket_in_use(home: Path) -> None:
    home.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(home / "kvshare.sock"))
        other.listen()
        line = one_line(run("serve", "--home", home, "--set", "host_bytes=1MiB"), 4)
    assert "kvshare.sock is in use" in line


@pytest.mark.parametrize(
    "command",
    [["stats"], ["ls"], ["show", "ab"], ["clear"], ["stop"], ["gc"], ["check"], ["pin", "ab"],
     ["unpin", "ab"], ["purge", "--tenant", "t"], ["rekey", "--new-key", "env:NO_KEY"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_home_without_a_store_is_probably_mistyped(
    command: list[str], home: Path, tmp_path: Path
) -> None:
    """Every command gives the same message; none creates a store there or starts a daemon."""
    line = one_line(run(*command, "--home", home), 3)
    assert line.startswith(f"kvshare: home {home} has no store; name another with --home")
    assert not home.exists()
    (tmp_path / "file").touch()
    line = one_line(run(*command, "--home", tmp_path / "file"), 3)
    assert "is a file, no folder" in line


def test_a_socket_that_a_dead_daemon_left(home: Path) -> None:
    home.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(home / "kvshare.sock"))
    assert "has no store" in one_line(run("stats", "--home", home), 3)


def test_errors_reach_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvshare_store.cli.main", "stats", "--home", tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "has no store" in one_line((found.returncode, found.stdout, found.stderr), 3)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"]])
def test_an_answer_that_cannot_be_written(arguments: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "kvshare_store.cli.main", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        found = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    line = one_line((found.returncode, "", found.stderr), 1)
    assert line == "kvshare: cannot write the answer: No space left on device\n"


def test_an_answer_that_cannot_be_written_in_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command has left in the buffer."""
    monkeypatch.setattr(main, "app", lambda *_, **__: print("answer"))
    with (
        contextlib.suppress(OSError),  # closing the file here, if nothing did before
        Path("/dev/full").open("w") as full,
        contextlib.redirect_stdout(full),
        pytest.raises(SystemExit) as end,
    ):
        main.main([])
    assert end.value.code == 1
    assert capsys.readouterr().err == "kvshare: cannot write the answer: No space left on device\n"


def test_whoever_reads_no_further_is_no_error() -> None:
    command = [sys.executable, "-m", "kvshare_store.cli.main", "completion", "bash"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        found = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (found.returncode, found.stderr) == (1, b"")


def test_ctrl_c_ends_a_command(tmp_path: Path) -> None:
    """While it reads what somebody still writes."""
    os.mkfifo(trace := tmp_path / "trace")
    command = [sys.executable, "-m", "kvshare_store.cli.main", "simulate", trace]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes) as process, trace.open("w"):  # from here on it reads
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"")


LOADING = """
import builtins, os, sys
from kvshare_store.cli import __main__

load = builtins.__import__

def load_and_interrupt(name, *args):
    if name == "kvshare_store.cli.main":
        os.kill(os.getpid(), int(sys.argv.pop()))
    return load(name, *args)

builtins.__import__ = load_and_interrupt
__main__.main()
"""


@pytest.mark.parametrize(
    ("number", "command", "code"),
    [
        (signal.SIGINT, "ls", 130),
        (signal.SIGINT, "serve", 130),
        (signal.SIGHUP, "serve", 0),
        (signal.SIGHUP, "ls", -signal.SIGHUP),
    ],
)
def test_a_signal_while_the_commands_are_loaded(
    number: signal.Signals, command: str, code: int
) -> None:
    """A daemon must not end because its settings are to be read again."""
    words = [sys.executable, "-c", LOADING, command, "--help", str(int(number))]
    ended = subprocess.run(words, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, b"")


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(main, "app", broken)
    with pytest.raises(OSError, match="Input/output error"):
        main.main(["ls"])


def test_version() -> None:
    assert run("--version") == (0, f"kvshare {version()}\n", "")


# --- config and salt ------------------------------------------------------------------------------


def test_config_reads_the_file_of_limits_that_a_daemon_would_read(home: Path) -> None:
    wrong = run("config", "--home", home, "--set", "tenant_limits=/nowhere.yaml")
    assert "tenant_limits" in one_line(wrong, 2)


def test_config_says_where_each_value_came_from(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kvshare.yaml"
    file.write_text("tail: 1\nremote: redis://user:hunter2@127.0.0.1:1/0\n")
    monkeypatch.setenv("KVSHARE_POLICY", "faithful")
    monkeypatch.setenv("KVSHARE_SERVICE_PORT", "80")
    arguments = ("config", "--home", home, "--config", file, "--set", "host_bytes=1GiB")
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    rows = {row["name"]: (row["value"], row["source"]) for row in found["settings"]}
    assert list(rows) == list(FIELDS)
    assert rows["policy"] == ("faithful", "environment")
    assert rows["tail"] == (1, f"config file {file}")
    assert rows["host_bytes"] == (2**30, "given")
    assert rows["block_tokens"] == (64, "default")
    assert rows["remote"][0] == "redis://user:***@127.0.0.1:1/0"
    assert (found["served"], found["ignored"]) == (False, ["KVSHARE_SERVICE_PORT"])
    out = run(*arguments)[1]
    assert "no daemon runs" in out
    assert "hunter2" not in out
    assert re.search(r"^host_bytes +1\.0 GiB +given *$", out, re.MULTILINE)
    for told in (r"disk +on", r"log_prompts +off", r"remote_timeout_ms +200", r"min_saving_ms +2"):
        assert re.search(rf"^{told} +default", out, re.MULTILINE), told
    assert "KVSHARE_SERVICE_PORT in the environment is no setting" in out
    assert not home.exists()


def test_an_address_is_not_broken_in_a_narrow_terminal(home: Path) -> None:
    address = "tcp://0.0.0.0:7411"
    rows = [{"name": "home", "value": str(home), "source": "environment"},
            {"name": "listen", "value": address, "source": "daemon", "here": ""},
            {"name": "pools", "value": "house", "source": "default"}]  # fmt: skip
    out = rendered(config.settings_table(rows, 80), width=80)
    assert address in out
    assert re.search(r"default; +\n +per engine", out), "broken at blanks only"
    assert max(map(len, out.splitlines())) <= 80
    assert "here" not in rendered(config.settings_table(rows[:1], 80), width=80)
    rows[2]["source"] = f"config file /{'a' * 100}"
    assert re.search(r"^pools +house", rendered(config.settings_table(rows, 80), width=80), re.M)


def test_salt(tmp_path: Path) -> None:
    key = tmp_path / "tenants.key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    setting = f"tenant_key=file:{key}"
    code, out, err = run("salt", "alice", "--set", setting)
    assert (code, err) == (0, "")
    assert Tenants(StoreConfig(tenant_key=f"file:{key}")).of(out.rstrip("\n")) == "alice"
    assert "tenant_key is not set" in one_line(run("salt", "alice"), 2)


# --- what people read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**51, "2,048.0 TiB"),
    ],
)
def test_sizes(nbytes: int, shown: str) -> None:
    assert readable.size(nbytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-5, "0 s"), (0.2, "0 s"), (59, "59 s"), (60, "1 min"), (7300, "2 h"), (200_000, "2 d")],
)
def test_ages(seconds: float, shown: str) -> None:
    assert readable.age(1000.0, 1000.0 + seconds) == shown


@pytest.mark.parametrize(
    ("part", "whole", "filled", "percent"),
    [
        (0, 0, 0, "-"),
        (0, 9, 0, "0.0 %"),
        (1, 10_000, 0, "< 0.1 %"),
        (1, 2, 10, "50.0 %"),
        (3, 2, 20, "150.0 %"),
    ],
)
def test_bars(part: int, whole: int, filled: int, percent: str) -> None:
    shown = "█" * filled or ("▏" if part else "")
    assert readable.bar(part, whole) == shown + "░" * (20 - len(shown))
    assert readable.share(part, whole) == percent


def test_prompts_cannot_steer_the_terminal() -> None:
    assert readable.printable("a\x1b[31m\x00\x9b\u202eb\n\tc") == "a␛[31m␀��b\n\tc"
    assert readable.one_line("a\n\n b\tc ") == "a b c"


def test_long_text_is_shortened() -> None:
    text = "x" * 50 + "y" * 50
    assert readable.shortened(text, 100) == text
    assert readable.shortened(text, 8) == "xxxx … yyyy"
    assert readable.shortened(text, 8, head=False) == " … yyyyyyyy"
    assert readable.shortened(text, 8, tail=False) == "xxxxxxxx … "


STATS: dict[str, Any] = {
    "lookups": 8, "hits_exact": 2, "hits_edited": 4, "misses": 2,
    "tokens_requested": 10_000, "tokens_reused_exact": 1_000, "tokens_reused_edited": 6_000,
    "tokens_recomputed": 2_500, "tokens_engine_cached": 500,
    "bytes_loaded": 3 * 2**20, "bytes_stored": 5 * 2**30,
    "answers_stored": 3, "tokens_answers_stored": 1_200,
    "declined": {"too_short": 1, "no_donor": 12}, "errors": {"corrupt": 3},
    "health": {
        "state": "degraded", "failures": {"kvshare-sync": 2, "kvshare-commit": 1},
        "reasons": {"kvshare-sync": "OSError: the bucket is \x1b[31mgone"},
    },
    "nodes": 1234, "blocks": 99, "leases": 1,
    "tiers": {"host": {"bytes": 2**29, "budget": 2**30, "blocks": 7}},
    "seconds": {"lookup": {"p50": 0.0012, "p99": 0.02}},
}  # fmt: skip


def test_stats_are_readable() -> None:
    out = rendered(stats.headline("/h", STATS), *stats.tables(STATS))
    for words in (
        "/h: 1,234 nodes, 99 blocks, 1 lease; 3.0 MiB loaded, 5.0 GiB stored, "
        "3 answers of 1,200 tokens",
        "lookups: 8",
        "tokens requested: 10,000",
    ):
        assert words in out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    for row in (
        "edited 4 50.0 % ██████████░░░░░░░░░░",
        "reused, edited 6,000 60.0 % ████████████░░░░░░░░",
        "host 7 512.0 MiB 1.0 GiB 50.0 % ██████████░░░░░░░░░░",
        "lookup 1.20 ms 20.00 ms",
        "corrupt 3",
        "health: degraded failures error now",
        "kvshare-commit 1",
        "kvshare-sync 2 OSError: the bucket is ␛[31mgone",
    ):
        assert row in rows
    assert rows.index("no_donor 12") < rows.index("too_short 1")


def test_stats_of_an_idle_daemon_leave_out_what_is_empty() -> None:
    out = rendered(*stats.tables({**STATS, "declined": {}, "errors": {}, "lookups": 0}))
    assert "errors" not in out
    assert "without reuse" not in out


NODE: dict[str, Any] = {
    "id": "b" * 32, "namespace": "n" * 12, "model": "org/model", "tenant": "",
    "tokens": 1500, "exact_rows": 600, "policy": "balanced",
    "generation": 2, "parent": "a" * 32, "created": 0.0, "preview": "Dear [bold]all[/bold],\nhello",
    "text": "t" * 1000,
    "edits": [
        {"kind": "keep", "start": 0, "stop": 9, "removed": "k" * 500 + " end", "added": ""},
        {"kind": "replace", "start": 9, "stop": 10, "removed": "old", "added": "new\n"},
        {"kind": "keep", "start": 10, "stop": 12, "removed": " middle ", "added": ""},
        {"kind": "insert", "start": 12, "stop": 12, "removed": "", "added": "[red]\x1b[31m"},
        {"kind": "delete", "start": 12, "stop": 13, "removed": "gone", "added": ""},
    ],
    "path": ["a" * 32, "b" * 32], "children": ["c" * 32], "pinned": True, "merged": False,
    "lineage": {
        "a" * 32: {"tokens": 2048, "added": 0, "removed": 0, "own_rows": 2048, "own_blocks": 32,
                   "pinned": False, "merged": False},
        "b" * 32: {"tokens": 2050, "added": 7, "removed": 5, "own_rows": 40, "own_blocks": 1,
                   "pinned": True, "merged": False},
    },
    "blocks": [
        {"name": "1" * 64, "tier": "host", "rows": 64, "users": 3},
        {"name": "2" * 64, "tier": "disk", "rows": 6, "users": 1},
    ],
}  # fmt: skip


def test_nodes_are_listed_one_a_line() -> None:
    nodes = [NODE, {**NODE, "generation": 0, "parent": None}]
    out = rendered(ls.nodes_table(nodes, 100), width=100)
    _, _, first, second = out.splitlines()
    assert " ".join(first.split()).startswith("bbbbbbbbbbbb ⚑ 1,500 600 edited (2) aaaaaaaaaaaa")
    assert "Dear [bold]all" in first
    assert " exact       -  " in second


def test_a_narrow_list_of_nodes_keeps_the_tenant() -> None:
    node = {**NODE, "tenant": "tenant-of-sales"}
    out = rendered(ls.nodes_table([node], 80), width=80)
    assert "tenant-of-sales  Dear" in out
    assert "b" * 12 in out
    assert "a" * 12 in out
    out = rendered(ls.nodes_table([{**node, "parent_stored": False}], 80), width=80)
    assert f"{'a' * 12} gone  tenant-of-s" in out


def test_a_list_says_that_a_parent_is_gone() -> None:
    out = rendered(ls.nodes_table([{**NODE, "parent_stored": False}], 100), width=100)
    assert f"{'a' * 12} gone" in out
    assert "gone" not in rendered(ls.nodes_table([NODE], 100), width=100)


REQUEST: dict[str, Any] = {
    "number": 1, "request": "chatcmpl-" + "a" * 41, "at": 0.0, "outcome": "edited", "reason": "",
    "tenant": "tenant-of-sales", "tokens": 12_345, "exact": 1_000, "continued": 200,
    "edited": 10_000, "recomputed": 1_145, "cached": 0, "lookup": 0.0123, "load": 0.1234,
}  # fmt: skip
SECOND_REQUEST: dict[str, Any] = {
    **REQUEST, "number": 2, "request": "chatcmpl-a" + "b" * 40, "outcome": "miss",
    "reason": "unknown_parameter",
}  # fmt: skip


@pytest.mark.parametrize("width", [70, 80, 100, 120, 160])
def test_requests_fit_the_terminal(width: int) -> None:
    """Who, how and why stay; ids can be told apart however little room there is."""
    both = [REQUEST, SECOND_REQUEST]
    out = rendered(log.requests_table(both, width), width=width)
    for words in (
        "chatcmpl-aaa",
        "chatcmpl-abb",
        "edited",
        "miss",
        "unknown_parameter",
        "tenant-of-sales",
    ):
        assert words in out
    table, missing, _ = out.partition("no room for: ")
    assert max(map(len, table.splitlines())) <= width
    assert bool(missing) == ("continued" not in table)


def test_an_only_id_shows_more_than_its_kind() -> None:
    """The log has others, which `kvshare explain --request` must tell from it."""
    request = {**REQUEST, "request": f"cmpl-{'96c8d7' * 6}"}
    out = rendered(log.requests_table([request], 60), width=60)
    assert "cmpl-96c8…" in out
    assert "no room for: " in out


def test_into_a_pipe_nothing_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    home = tmp_path / ("long" * 60)
    code = "import sys\nfrom kvshare_store.cli.main import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", code, "config", "--home", str(home)]
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^home +{home}  ", piped, re.MULTILINE)
    monkeypatch.setenv("COLUMNS", "80")
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {len(line) for line in piped.splitlines()[3:5]} <= set(range(81))


def test_a_look_at_a_store_leaves_room_for_its_requests() -> None:
    rates: dict[str, float] = defaultdict(float)
    shown = rendered(top.view("/home", STATS, rates, [REQUEST], 80), width=80).splitlines()
    assert shown[0].rstrip() == "/home: 1,234 nodes, 99 blocks, 1 lease"
    assert "chatcmpl-" in shown[-2]


def test_help_is_broken_where_the_terminal_ends() -> None:
    """Not where the source is."""
    shown = [line.strip() for line in run("purge", "--help", columns="80")[1].splitlines()]
    assert "prompts that go on from it, and those with rows that were computed behind its" in shown


def test_ids_are_whole_where_there_is_room() -> None:
    out = rendered(log.requests_table([REQUEST, SECOND_REQUEST], 200), width=200)
    assert str(REQUEST["request"]) in out
    assert "123.40 ms" in out
    assert "no room" not in out


def test_a_node_shows_what_was_edited() -> None:
    out = rendered(*show.parts(NODE, marked=True))
    assert "edited, generation 2" in out
    assert " end[-old-]{+new↵" in out
    assert "+} middle {+[red]␛[31m+}[-gone-]" in out
    assert "k" * 200 not in out
    assert "└── bbbbbbbbbbbb (this node)" in out
    assert "cccccccccccc" in out
    assert "2 blocks: " in out
    assert "1 shared with other nodes (--blocks lists them)" in out
    assert "\x1b" not in out
    out = rendered(*show.parts(NODE, marked=True, blocks=True))
    assert "2 others" in out
    assert "no other" in out
    assert "--blocks" not in out


def test_a_node_says_from_where_on_its_rows_are_approximate() -> None:
    context = {"start": 23, "stop": 1774}
    shown = rendered(show.summary_table(NODE | {"policy": "balanced", "contexts": [context]}))
    assert "served under  balanced, or stricter" in shown
    words = "from token 23 on: computed behind rows that were edited, up to token 1,774"
    assert f"approximate   {words}" in shown


def test_the_path_says_what_each_edit_cost_and_each_node_stores() -> None:
    shown = rendered(show.path_tree(NODE))
    assert "aaaaaaaaaaaa  2,048 tokens, stores 2,048 rows in 32 blocks" in shown
    here = "bbbbbbbbbbbb (this node)  +7 -5 tokens, stores 40 rows in 1 block, pinned"
    assert here in shown
    assert "cccccccccccc" in shown
    assert "ago, pinned" in rendered(show.summary_table(NODE))


def test_what_was_collected_is_one_sentence() -> None:
    found = {"blocks": 3, "bytes": 2048, "nodes": 1, "versions": 9, "merged": 2}
    said = gc.sentence(found, dry_run=True)
    assert said.startswith("Would collect 3 blocks (2.0 KiB), 1 node, 9 old versions")
    assert "merged 2 nodes" in gc.sentence(found, dry_run=False)


def test_edits_have_colours() -> None:
    text = show.edits_text(NODE["edits"])
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["old"] == styles["gone"] == "red strike"
    assert styles["new↵\n"] == "green"
    assert styles[" middle "] == "dim"


def test_a_root_shows_its_text() -> None:
    root = {**NODE, "parent": None, "edits": [], "generation": 0, "path": ["b" * 32]}
    out = rendered(*show.parts(root))
    assert "edits against" not in out
    assert "ttt" in out
    assert len(out) < 2000


def test_a_parent_that_was_evicted_is_named_as_gone() -> None:
    child = {**NODE, "edits": [], "path": ["b" * 32]}
    assert f"{'a' * 32} (no longer stored)" in rendered(*show.parts(child))
