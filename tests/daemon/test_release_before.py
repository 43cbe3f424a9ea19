"""Releases one version apart: clients and daemons of the release before, built from its tag, with
those of this one; and its messages, as it sent them (`tests/data/protocol_before.json`).

`make release` sets the tag and records the messages. While there is no tag, an older commit stands
for the release before. Where a clone has neither, the recorded messages are all there is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.address import answers
from kvshare_store.plan import ReusePlan
from kvshare_store.save.staging import Staged
from tests.daemon.test_protocol import MESSAGES
from tests.support import protocol_recording, releases, visitor
from tests.support.daemons import START_S, Daemon
from tests.support.environments import run
from tests.support.needs import need
from tests.support.peer import Peer
from tests.support.releases import Release

BEFORE = json.loads((Path(__file__).parents[1] / "data" / "protocol_before.json").read_text())
REQUESTS: dict[str, str] = BEFORE["requests"]
NOW = {type(message).__name__: message for message in MESSAGES}
REPLIES: dict[str, Any] = {
    "Welcome": protocol.Welcome, "ReusePlan": ReusePlan, "Staged": Staged
}  # fmt: skip


def fields(body: bytes) -> Any:
    return msgspec.msgpack.decode(body)


@pytest.mark.parametrize("name", REQUESTS)
def test_what_its_clients_send_is_understood(name: str) -> None:
    body = bytes.fromhex(REQUESTS[name])
    sent = fields(body)
    message = protocol.decode_request(body)
    assert type(message).__name__ == name
    now = fields(protocol.encode(message))
    assert {key: now[key] for key in sent} == sent, "nothing is lost or changed"
    fresh = type(message).__struct_defaults__
    new = set(now) - set(sent)
    defaults = dict(zip(reversed(message.__struct_fields__), reversed(fresh), strict=False))
    sent_now = {key: fields(protocol.encode(defaults[key])) for key in new}
    assert {key: now[key] for key in new} == sent_now, "old meaning"


@pytest.mark.parametrize("name", REQUESTS)
def test_what_its_daemons_know_is_still_sent(name: str) -> None:
    """An older daemon ignores new fields; it needs all the others, of the same types."""
    before, now = fields(bytes.fromhex(REQUESTS[name])), fields(protocol.encode(NOW[name]))
    assert set(before) <= set(now)
    assert {key: type(now[key]) for key in before} == {key: type(before[key]) for key in before}
    assert now["type"] == before["type"]


@pytest.mark.parametrize("name", REPLIES)
def test_what_its_daemons_answer_is_understood(name: str) -> None:
    reply = protocol.decode_reply(bytes.fromhex(BEFORE["replies"][name]))
    found = msgspec.convert(reply.result, REPLIES[name])
    now = msgspec.to_builtins(found)
    assert {key: now[key] for key in reply.result if not isinstance(now[key], tuple | list)} == {
        key: value for key, value in reply.result.items() if not isinstance(value, list)
    }


def test_no_message_was_taken_away() -> None:
    assert set(REQUESTS) <= {kind.__name__ for kind in typing.get_args(protocol.Request)}
    assert protocol.OLDEST <= 2, "the version that it speaks"


# --- its messages, to a daemon -------------------------------------------------------------------

FILES = {"Export", "Import"}
"""Messages whose recorded paths are nobody's to write to."""


def test_what_its_clients_send_is_served(tmp_path: Path) -> None:
    """What they name is not here, which is an answer of its own; none is a `protocol` error."""
    with Daemon(StoreConfig(home=str(tmp_path / "home"), host_bytes=1 << 20)) as daemon:
        for name in REQUESTS.keys() - FILES - {"Hello", "Stop"}:
            with Peer(daemon.config.home_path) as peer:
                assert answered(peer, "Hello") == ""
                assert answered(peer, name) not in {"protocol", "internal"}, name
        with Peer(daemon.config.home_path) as peer:
            assert (answered(peer, "Hello"), answered(peer, "Stop")) == ("", "")
        assert daemon.process is not None
        assert daemon.process.wait(START_S) == 0


def answered(peer: Peer, name: str) -> str:
    """The kind of error of the answer to a recorded message; empty if it is none."""
    peer.send(bytes.fromhex(REQUESTS[name]))
    reply = peer.receive()
    assert reply is not None, f"the daemon hung up on {name}"
    return reply.error


# --- which release it is --------------------------------------------------------------------------


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs git in a repository of its own, in which releases are looked for."""
    monkeypatch.setattr(releases, "ROOT", tmp_path)
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost")
    run(tmp_path, *git, "init", "-q")
    return lambda *arguments: run(tmp_path, *git, *arguments)


def test_the_release_before_is_the_last_that_this_commit_builds_on(
    history: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert releases.before() is None, "neither a tag nor the commit that stands for one"
    commit = ("commit", "-q", "--allow-empty", "-m")
    history(*commit, "one")
    monkeypatch.setattr(releases, "STAND_IN", history("rev-parse", "HEAD").strip())
    assert releases.before() == releases.STAND_IN
    for version in ("0.9.0", "0.10.0"):  # in this order, and not in that of the letters
        history(*commit, version)
        history("tag", "-a", f"v{version}", "-m", version)
    assert releases.before() == "v0.9.0", "a release is not its own"
    history("checkout", "-q", "-b", "other")
    history(*commit, "of a branch that this commit has not")
    history("tag", "v0.11.0")
    history("checkout", "-q", "-")
    history(*commit, "for the next one")
    assert releases.before() == "v0.10.0"


# --- its clients and its daemon ------------------------------------------------------------------


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Release:
    name = releases.before()
    need(name is not None, "the tag of a release, or the older commit that stands for it,")
    assert name is not None
    return releases.built(name, tmp_path_factory.mktemp("before"))


@contextmanager
def daemon(python: Path | str, home: Path, settings: Path) -> Iterator[None]:
    """`kvshare serve` of the release that this Python has."""
    command = [str(python), "-m", "kvshare_store.cli.main", "serve"]
    command += ["--home", str(home), "--config", str(settings)]
    log = home.with_suffix(".log")
    with log.open("a") as out:
        process = subprocess.Popen(command, cwd=home.parent, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_S
        while not answers(home):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def visit_before(before: Release, home: Path, own: int, found: range) -> None:
    """What `visitor.visit` does, by a client of the release before."""
    command = [str(before.python), visitor.__file__, str(home), str(own), *map(str, found)]
    environment = {**os.environ, "PYTHONPATH": str(before.files)}
    done = subprocess.run(
        command, cwd=before.files, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_clients_and_daemons_of_both_releases_serve_each_other(
    before: Release, tmp_path: Path
) -> None:
    """Each reads, row by row, the prompts, edits and answers that the other has stored; each daemon
    also from the disk, in the home that the other has left."""
    home, settings = tmp_path / "home", tmp_path / "settings.yaml"
    home.mkdir(mode=0o700)
    settings.write_text(
        "{host_bytes: 8MiB, disk_bytes: 64MiB, policy: aggressive, semantic: never}"
    )
    where = "import kvshare_store; print(kvshare_store.__file__)"
    assert run(before.files, before.python, "-c", where).startswith(str(before.python.parents[1]))
    with daemon(before.python, home, settings):
        visitor.visit(home, 1)
    with daemon(sys.executable, home, settings):
        visit_before(before, home, 2, range(1, 2))
        visitor.visit(home, 3, range(1, 3))
    with daemon(before.python, home, settings):
        visitor.visit(home, 4, range(1, 4))


# --- this release, for the next one --------------------------------------------------------------


def test_what_is_recorded_of_this_release_is_what_it_sends() -> None:
    found: Any = protocol_recording.recorded()
    assert found["requests"].keys() == {kind.__name__ for kind in typing.get_args(protocol.Request)}
    assert found["replies"].keys() == REPLIES.keys() == BEFORE["replies"].keys()
    for name, body in found["requests"].items():
        assert protocol.decode_request(bytes.fromhex(body)) == NOW[name]
