"""What LMCache's L2 adapter interface promises its controllers, one test per promise.

LMCache's own check (`test_own_check.py`) looks up, stores and loads. These follow the documentation
of its interface and its own tests of its mock adapter.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kvshare_connectors.lmcache import interface
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig

from kvshare_store.daemon.client import Client
from tests.connectors.lmcache.inside.lmcache_support import (
    adapter,
    key,
    loaded,
    looked_up,
    memory,
    signalled,
    stored,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("contract")
    yield folder
    with Client(folder) as client:
        client.stop()


@pytest.fixture
def one(home: Any) -> Iterator[Any]:
    opened = adapter(home)
    yield opened
    opened.close()


def test_the_tested_lmcache_is_the_one_that_is_installed() -> None:
    assert interface.metadata.version("lmcache") == interface.TESTED


def test_the_flags_of_the_page_are_understood() -> None:
    page = (Path(__file__).parents[4] / "docs" / "lmcache.md").read_text()
    (written,) = re.findall(r"--l2-adapter '(\{.*?\})'", page, re.DOTALL)
    plugin = PluginL2AdapterConfig.from_dict(json.loads(written))
    module = importlib.import_module(plugin.module_path)
    assert issubclass(getattr(module, plugin.class_name), interface.lmcache_interface().adapter)
    config = getattr(module, f"{plugin.class_name}Config").from_dict(plugin.adapter_params)
    assert config.store.home == "/var/lib/kvshare"
    assert config.store.disk_bytes == 500 << 30


def test_three_descriptors_that_differ(one: Any) -> None:
    fds = one.get_store_event_fd(), one.get_lookup_and_lock_event_fd(), one.get_load_event_fd()
    assert len(set(fds)) == 3


def test_a_batch_is_stored_looked_up_and_loaded(one: Any) -> None:
    keys = [key(number) for number in range(1, 6)]
    result = stored(one, keys[:4], [memory(float(n)) for n in range(4)])
    assert result.is_successful()
    assert result.bytes_transferred() == 4 * 4000
    again = stored(one, keys[:4], [memory(9.0) for _ in range(4)])
    assert again.is_successful()
    assert again.bytes_transferred() == 0, "an object is never overwritten"
    assert looked_up(one, keys) == [True] * 4 + [False]
    targets = [memory(-1.0) for _ in keys]
    assert loaded(one, keys, targets) == [True] * 4 + [False]
    assert [target.tensor.unique().tolist() for target in targets] == [[0], [1], [2], [3], [-1]]
    one.submit_unlock(keys)


def test_a_load_of_another_size_is_a_miss(one: Any) -> None:
    assert stored(one, [key(10)], [memory(1.0, 1000)]).is_successful()
    target = memory(-1.0, 1001)
    assert loaded(one, [key(10)], [target]) == [False]
    assert target.tensor.unique().tolist() == [-1]


def test_another_server_finds_objects_whether_it_knows_their_size_or_not(
    one: Any, home: Any
) -> None:
    other = adapter(home)  # it starts before there is such an object
    try:
        assert stored(one, [key(20, model="late")], [memory(2.0, 600)]).is_successful()
        layout = MemoryLayoutDesc([torch.Size([2, 300])], [torch.float32])
        assert looked_up(other, [key(20, model="late")], {0: layout}) == [True]
        assert looked_up(other, [key(20, model="late")]) == [True]
        assert loaded(other, [key(20, model="late")], [target := memory(0.0, 600)]) == [True]
        assert target.tensor.unique().tolist() == [2]
    finally:
        other.close()


def test_salts_groups_and_models_are_walls(one: Any) -> None:
    assert stored(one, [key(30, "ann")], [memory(1.0)]).is_successful()
    others = [key(30), key(30, "bob"), key(30, "ann", "other"), key(30, "ann", group=1)]
    assert looked_up(one, [key(30, "ann"), *others]) == [True] + [False] * 4
    assert one.get_usage().bytes_by_cache_salt["ann"] >= 4000


def test_unknown_tasks_and_keys_are_no_error(one: Any) -> None:
    assert one.query_lookup_and_lock_result(10**9) is None
    assert one.query_load_result(10**9) is None
    assert one.pop_completed_store_tasks() == {}
    one.submit_unlock([key(999)])
    one.delete([key(999)])


def test_what_is_locked_is_not_deleted(one: Any) -> None:
    assert stored(one, [key(40), key(41)], [memory(0.0), memory(1.0)]).is_successful()
    assert looked_up(one, [key(40)]) == [True]
    one.delete([key(40), key(41)])
    assert looked_up(one, [key(40), key(41)]) == [True, False]
    one.submit_unlock([key(40)])
    one.delete([key(40)])
    assert looked_up(one, [key(40)]) == [True], "two lookups have locked it"
    one.submit_unlock([key(40), key(40)])
    one.delete([key(40)])
    assert looked_up(one, [key(40)]) == [False]


def test_listeners_hear_of_what_happens_once(one: Any) -> None:
    heard: list[tuple[str, list[Any]]] = []

    class Listener(L2AdapterListener):
        def on_l2_keys_stored(self, keys: Any, sizes: Any) -> None:
            heard.append(("stored", list(zip(keys, sizes, strict=True))))

        def on_l2_keys_accessed(self, keys: Any) -> None:
            heard.append(("accessed", list(keys)))

        def on_l2_keys_deleted(self, keys: Any) -> None:
            heard.append(("deleted", list(keys)))

    one.register_listener(Listener())
    stored(one, [key(50)], [memory(1.0)])
    stored(one, [key(50)], [memory(1.0)])
    loaded(one, [key(50), key(51)], [memory(0.0), memory(0.0)])
    one.delete([key(50), key(51)])
    expected = [("stored", [(key(50), 4000)]), ("accessed", [key(50)]), ("deleted", [key(50)])]
    assert heard == expected


def test_all_keys_are_listed_page_by_page(one: Any) -> None:
    wanted = {key(number, salt, "listed") for number in range(60, 65) for salt in ("", "ann")}
    assert stored(one, list(wanted), [memory(1.0, 50) for _ in wanted]).is_successful()
    found, cursor = [], None
    while True:
        page = one.list_l2_keys(model_name="listed", page_size=3, cursor=cursor)
        found += [entry.key.to_object_key() for entry in page.entries]
        assert all(entry.size_bytes == 200 for entry in page.entries)
        if (cursor := page.next_page_token) is None:
            break
    assert len(found) == 10
    assert set(found) == wanted
    for bad in ({"page_size": 0}, {"cursor": "nonsense"}):
        with pytest.raises(ValueError, match=r"page|cursor"):
            one.list_l2_keys(**bad)


def test_a_dead_daemon_costs_misses_and_comes_back(one: Any, home: Any) -> None:
    assert stored(one, [key(70)], [memory(7.0)]).is_successful()
    with Client(home) as client:
        client.stop()
    assert looked_up(one, [key(70)]) == [True]
    assert loaded(one, [key(70)], [target := memory(0.0)]) == [True]
    assert target.tensor.unique().tolist() == [7]
    assert one.report_status()["is_healthy"]


def test_a_failure_is_a_miss_that_is_counted(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("forced")

    monkeypatch.setattr("kvshare_connectors.lmcache.shelf.Shelf.has", fails)
    assert not stored(one, [key(80)], [memory(1.0)]).is_successful()
    assert looked_up(one, [key(80)]) == [False]
    assert one.report_status()["failures"] == {"internal": 2}
    assert not one.report_status()["is_healthy"]
    monkeypatch.undo()
    assert stored(one, [key(80)], [memory(1.0)]).is_successful()
    assert one.report_status()["is_healthy"]


def test_wrong_parameters_are_refused_at_the_start(home: Any) -> None:
    with pytest.raises(ValueError, match="did you mean disk_bytes"):
        adapter(home, disk_byte=1)
    with pytest.raises(ValueError, match="not a size"):
        adapter(home, capacity_bytes="much")


def test_capacity_is_what_lmcache_evicts_by(home: Any) -> None:
    limited = adapter(home, capacity_bytes="1MiB")
    try:
        assert limited.supports_global_eviction
        assert limited.get_usage().total_capacity_bytes == 1 << 20
    finally:
        limited.close()


def test_closing_answers_no_more_and_keeps_what_was_stored(home: Any) -> None:
    one = adapter(home)
    one.submit_store_task([key(90)], [memory(9.0)])
    assert signalled(one.get_store_event_fd())
    one.close()
    other = adapter(home)
    try:
        assert looked_up(other, [key(90)]) == [True]
    finally:
        other.close()
