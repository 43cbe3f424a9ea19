"""Commands on a home that nobody serves, with other settings than those that it is used with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.commands import as_json, ok, one_line, run
from tests.support.oracle import Driver
from tests.support.stores import SMALL

pytestmark = pytest.mark.usefixtures("plain_environment")

SPACE = Namespace("org/model", KVLayout(2, 1, 4, "float32"))
FIRST = list(range(1000, 1200))


def test_a_command_without_the_remote_forgets_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with_remote = SMALL | {"remote": f"file://{tmp_path / 'far'}", "remote_write": "through"}
    config = StoreConfig(home=str(home), **with_remote | {"disk_bytes": 1 << 20})
    count = 60
    with Store(config) as store:
        engine = Driver(store, SPACE)
        for at in range(count):
            engine.save([at * 300 + token for token in range(300)])
            store.flush()
        assert len(store.tree) == count
        assert store.stats()["tiers"]["disk"]["bytes"] < store.stats()["tiers"]["remote"]["bytes"]
    for command in (("ls",), ("stats",), ("purge", "--tenant", "", "--yes")):
        assert "KVSHARE_REMOTE" in one_line(run(*command, "--home", home), 2)
    with Store(StoreConfig(home=str(home), **SMALL)) as store:
        assert len(store.tree) < count, "what the remote alone has is not served"
    with Store(config) as store:
        assert len(store.tree) == count


def test_a_command_forgets_nothing_for_a_folder_of_blocks_that_is_not_mounted(
    home: Path, tmp_path: Path
) -> None:
    with Store(StoreConfig(home=str(home), **SMALL)) as store:
        name = Driver(store, SPACE).save(FIRST)
        store.flush()
    (home / "blocks").rename(tmp_path / "blocks")
    (home / "blocks").mkdir()
    assert as_json("ls", "--home", home) == []
    assert "a row of a node that is not here" in run("check", "--home", home)[1]
    (home / "blocks").rmdir()
    (tmp_path / "blocks").rename(home / "blocks")
    assert [node["id"] for node in as_json("ls", "--home", home)] == [name]


def test_a_command_with_smaller_budgets_evicts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, count = tmp_path / "home", 60
    with Store(StoreConfig(home=str(home), **SMALL)) as store:
        engine = Driver(store, SPACE)
        for at in range(count):
            name = engine.save([at * 300 + token for token in range(300)])
            store.flush()
    assert name is not None
    monkeypatch.setenv("KVSHARE_DISK_BYTES", "1MiB")
    monkeypatch.setenv("KVSHARE_MAX_NODES", "5")
    monkeypatch.setenv("KVSHARE_NAMESPACE_NODES", "5")
    ok("pin", name, "--home", home)
    ok("export", tmp_path / "one", name, "--home", home)
    ok("evict", name, "--yes", "--home", home)  # it is pinned
    ok("unpin", name, "--home", home)
    ok("evict", name, "--yes", "--home", home)
    ok("import", tmp_path / "one", "--home", home)
    ok("gc", "--home", home)
    assert len(as_json("ls", "--home", home, "--limit", "100")) == count
