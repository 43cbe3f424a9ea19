"""How daemons start and stop: they are no child of a client, and they remove their own files
only."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.address import Listener, answers, connect, home_taken
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.spawn import ensure_daemon
from kvshare_store.errors import BusyError, DeadlineError, OverloadError, UnavailableError
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, Daemon, child_daemon
from tests.support.needs import need
from tests.support.oracle import prompt

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
Config = Callable[..., StoreConfig]
PATIENCE_S = 60.0
ENVIRONMENT = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
ENGINE = (
    "import sys, time\n"
    "from kvshare_store.config import StoreConfig\n"
    "from kvshare_store.daemon.spawn import ensure_daemon\n"
    "client = ensure_daemon(StoreConfig(home=sys.argv[1], host_bytes=1 << 20, semantic='never'))\n"
    "print(client.greet().pid, flush=True)\n"
    "time.sleep(600)\n"
)


def test_a_daemon_that_is_stopped_as_soon_as_it_answers_ends_well(config: Config) -> None:
    """Also if the signal meets a thread that a library has started. Not every try hits the moment
    between the first answer and the first handler."""
    for name in "abc":
        chosen = config(home=str(config().home_path.with_name(name)))
        process = child_daemon(chosen)
        while not answers(chosen.home_path):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


# --- beginning ----------------------------------------------------------------------------------


def test_the_end_of_an_engine_with_all_its_children_leaves_the_daemon(home: Path) -> None:
    """An engine's process tree is killed: every descendant, found through its parent, then the
    engine itself."""
    command = [sys.executable, "-c", ENGINE, str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        try:
            children = psutil.Process(engine.pid).children(recursive=True)
            assert pid not in {child.pid for child in children}
            assert os.getsid(pid) == os.getpgid(pid), "no signal to the engine's group reaches it"
            assert os.getpgid(pid) != os.getpgid(engine.pid)
            for process in (*children, psutil.Process(engine.pid)):
                process.kill()
            engine.wait(PATIENCE_S)
            with Client(home, timeout=PATIENCE_S) as client:
                assert client.stats()["daemon"]["pid"] == pid
        finally:
            engine.kill()
            psutil.Process(pid).kill()


def test_why_a_daemon_did_not_start_is_said(config: Config) -> None:
    with pytest.raises(UnavailableError, match=r"did not start: kvshare: .*host_bytes"):
        ensure_daemon(config(host_bytes=1 << 60), timeout=PATIENCE_S)


def test_none_is_started_where_one_could_only_fail(config: Config, home: Path) -> None:
    """Another process holds the home; its daemon starts, stops, or hangs."""
    with Store(config()):
        assert home_taken(home)
        with pytest.raises(DeadlineError):
            ensure_daemon(config(), timeout=0.5)
    assert not (home / "daemon.log").exists()
    assert not home_taken(home)


# --- the end of a home --------------------------------------------------------------------------


def test_a_daemon_whose_home_was_replaced_leaves_the_new_one_alone(
    config: Config, home: Path
) -> None:
    """`rm -rf` of the home and a new start, while the old daemon still has something to remove."""
    with Daemon(config()) as old, Client(home, timeout=PATIENCE_S) as client:
        ClientDriver(client, NAMESPACE).save(prompt(1, 40))
        client.flush()
        assert old.process is not None
        old.send(signal.SIGSTOP)
        client.send(protocol.Purge(NAMESPACE.digest))
        shutil.rmtree(home)
        with Daemon(config()) as new, Client(home, timeout=PATIENCE_S) as other:
            driver = ClientDriver(other, NAMESPACE)
            driver.save(prompt(2, 40))
            other.flush()
            before = listing(home)
            old.send(signal.SIGCONT)
            assert old.process.wait(PATIENCE_S) == 0
            assert listing(home) == before, "it wrote nothing and removed nothing"
            assert "replaced" not in new.log()
            assert answers(home)
            assert driver.serve(prompt(2, 40)).exact == 39
            assert new.end() == 0


def listing(home: Path) -> set[Path]:
    return {path for path in home.rglob("*") if path.name != "daemon.log"}


def test_a_listener_removes_its_own_socket_only(home: Path) -> None:
    home.mkdir()
    first = Listener(home)
    with pytest.raises(BusyError, match="in use"):
        Listener(home)
    assert first.in_place
    (home / "kvshare.sock").rename(home / "elsewhere")
    second = Listener(home)
    assert (first.in_place, second.in_place) == (False, True)
    first.close()
    assert second.in_place
    second.close()
    assert not (home / "kvshare.sock").exists()


def test_a_crowd_at_the_door_is_not_a_missing_daemon(home: Path) -> None:
    """The client retries until its deadline and starts no daemon."""
    home.mkdir()
    with socket.socket(socket.AF_UNIX) as hung, contextlib.ExitStack() as crowd:
        hung.bind(str(home / "kvshare.sock"))
        hung.listen(0)
        for _ in range(2):  # one that waits, and one more
            with contextlib.suppress(OverloadError):
                crowd.enter_context(connect(home))
        with pytest.raises(OverloadError, match="try again"):
            connect(home)
        with Client(home, timeout=0.1) as client, pytest.raises(OverloadError):
            client.stats()


# --- namespaces of processes --------------------------------------------------------------------

HOLDER = (
    "import os, sys, time\n"
    "from tests.support.daemons import Client, Namespace\n"
    "from kvshare_store.tensors.layout import KVLayout\n"
    "from tests.support.oracle import prompt\n"
    "client = Client(sys.argv[1], timeout=60)\n"
    "assert client.plan(prompt(1, 40), Namespace('model', KVLayout(2, 1, 4, 'float32'))).lease\n"
    "print(os.getpid(), flush=True)\n"
    "time.sleep(600)\n"
)


def unshare(*what: str) -> list[str]:
    """The command prefix that runs a program in namespaces of its own."""
    command = ["unshare", *what]
    possible = shutil.which("unshare") is not None
    possible = possible and not subprocess.run([*command, "true"], check=False).returncode
    need(possible, "unshare " + " ".join(what))
    return command


def test_a_client_in_another_pid_namespace_lives_and_dies(config: Config, home: Path) -> None:
    """In the daemon's namespace its process id means nothing, or belongs to another process."""
    alone = unshare("--pid", "--fork", "--kill-child")
    with Daemon(config(lease_seconds=600.0)), Client(home, timeout=PATIENCE_S) as client:
        ClientDriver(client, NAMESPACE).save(prompt(1, 40))
        command = [*alone, sys.executable, "-c", HOLDER, str(home)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as container:
            assert container.stdout is not None
            assert container.stdout.readline() == b"1\n", "to itself it is the first process"
            for _ in range(3):  # dead clients are looked for once a second
                time.sleep(1.0)
                assert client.stats()["leases"] == 1
            container.kill()
        deadline = time.monotonic() + PATIENCE_S
        while client.stats()["leases"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_daemon_in_another_pid_namespace_is_reached(config: Config, home: Path) -> None:
    alone = unshare("--pid", "--fork", "--kill-child")
    home.mkdir(mode=0o700)
    command = [*alone, sys.executable, "-m", "kvshare_store.cli.main", "serve"]
    command += ["--home", str(home), "--set", "host_bytes=1MiB", "--set", "semantic=never"]
    command += ["--set", "min_saving_ms=-1000000"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as container:
        try:
            while not answers(home):
                assert container.poll() is None
                time.sleep(0.05)
            with ensure_daemon(config(), timeout=PATIENCE_S) as client:
                assert client.greet().pid == 1
                driver = ClientDriver(client, NAMESPACE)
                driver.save(prompt(1, 40))
                assert driver.serve(prompt(1, 40)).exact == 39
                client.stop()
            container.wait(PATIENCE_S)
        finally:
            container.kill()
