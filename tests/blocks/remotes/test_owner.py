"""Ownership of a remote's prefix: the store refuses another store's prefix and never removes
foreign objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.remotes.owner import MARK
from kvshare_store.config import StoreConfig
from kvshare_store.errors import ForeignError, StorageError
from kvshare_store.store import Store
from tests.support.needs import need
from tests.support.neighbours import NAMESPACE, Machine, collect_all, config_of, remote_blocks, save
from tests.support.oracle import Driver, prompt
from tests.support.servers import RedisServer, S3Server


def alone(folder: Path, name: str, **settings: Any) -> StoreConfig:
    """A home with a catalogue of its own."""
    own = {"catalog": "", "remote_write": "through", "disk": False, "gc_seconds": 0.0}
    return config_of(folder, name, **{**own, **settings})


@pytest.fixture(params=["file", "redis", "s3"])
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of a prefix that nobody has used."""
    with ExitStack() as stack:
        if request.param == "file":
            yield f"file://{tmp_path / 'remote'}"
        elif request.param == "redis":
            need(RedisServer.installed(), "redis-server")
            yield stack.enter_context(RedisServer(tmp_path / "server")).url("owner")
        else:
            need(S3Server.installed(), "rclone")
            server = stack.enter_context(S3Server(tmp_path / "server"))
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            yield server.url("owner")


def test_another_stores_prefix_is_refused(remote: str, tmp_path: Path) -> None:
    settings = {"remote": remote, "remote_bytes": 1 << 30, "remote_timeout_ms": 5_000.0}
    with Store(alone(tmp_path, "a", **settings)) as store:
        engine = Driver(store, NAMESPACE)
        save(engine, prompt(1, 40))
        with pytest.raises(ForeignError, match="choose another prefix"):
            Store(alone(tmp_path, "b", **settings))
    with Store(alone(tmp_path, "a", **settings)) as store:
        assert Driver(store, NAMESPACE, engine.book).serve(prompt(1, 40)).exact == 39


def unmark(folder: Path) -> None:
    """Write the owner object as the release before this one did."""
    (folder / "remote" / MARK).unlink()


def test_a_prefix_of_the_release_before_is_marked_by_the_store_that_wrote_it(
    tmp_path: Path,
) -> None:
    with Store(alone(tmp_path, "a")) as store:
        engine = Driver(store, NAMESPACE)
        save(engine, prompt(1, 40))
    unmark(tmp_path)
    with pytest.raises(ForeignError, match="not written"):
        Store(alone(tmp_path, "b"))
    with Store(alone(tmp_path, "a")) as store:
        assert Driver(store, NAMESPACE, engine.book).serve(prompt(1, 40)).exact == 39
    assert (tmp_path / "remote" / MARK).exists()


def test_two_catalogues_on_one_prefix(machine: Machine, tmp_path: Path) -> None:
    save(machine("production"), prompt(1, 40))
    with pytest.raises(ForeignError):
        machine("staging", catalog=str(tmp_path / "other"))


def test_files_that_no_store_writes_stay(machine: Machine, tmp_path: Path) -> None:
    engine = machine("a", gc_seconds=0.0)
    save(engine, prompt(1, 40))
    blocks = tmp_path / "remote" / "blocks"
    foreign = [
        blocks / "mine" / "thesis.docx",
        blocks / NAMESPACE.digest / "notes.txt",
        blocks / NAMESPACE.digest / ("ab" * 31),
        tmp_path / "remote" / "photo.jpg",
    ]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_text("not yours")
    engine.store.clear()
    collect_all(engine)
    assert remote_blocks(tmp_path) == 3
    assert all(file.exists() for file in foreign)


def test_a_prefix_that_changed_hands_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    engine = machine("a", gc_seconds=0.0)
    save(engine, prompt(1, 40))
    engine.store.clear()
    (tmp_path / "remote" / MARK).write_text('{"store": "somebody else"}')
    with pytest.raises(ForeignError):
        collect_all(engine)
    assert remote_blocks(tmp_path) == 5


def test_a_remote_that_is_away_at_the_start_is_asked_before_the_first_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(S3Server.installed(), "rclone")
    with S3Server(tmp_path / "server") as server, ExitStack() as stack:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        remote = {"remote": server.url("owner")}
        with Store(alone(tmp_path, "a", **remote)) as store:
            save(Driver(store, NAMESPACE), prompt(1, 40))
        server.pause()
        late = stack.enter_context(Store(alone(tmp_path, "b", **remote)))
        server.resume()
        with pytest.raises(StorageError, match="belongs to store"):
            save(Driver(late, NAMESPACE), prompt(2, 40))
        assert late.stats()["errors"].get(str(ForeignError.kind))
        assert len(late.tree) == 0
