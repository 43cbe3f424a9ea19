"""If LMCache is missing, or is another version than the tested one, the error says so."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib import metadata

import pytest
from kvshare_connectors.lmcache import interface

from kvshare_store.errors import UnsupportedError

ADAPTERS = "lmcache.v1.distributed.l2_adapters"


class Base:
    """LMCache's interface with one more abstract method."""

    def submit_store_task(self, keys, objects): ...  # type: ignore[no-untyped-def]


def test_nothing_but_the_adapter_needs_lmcache() -> None:
    script = (
        "import sys; sys.modules['lmcache'] = None\n"
        "import kvshare_connectors.lmcache, kvshare_connectors.lmcache.shelf\n"
        "import kvshare_connectors.lmcache.listing, kvshare_connectors.lmcache.lane\n"
        "try: import kvshare_connectors.lmcache.adapter\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("UnsupportedError")
    assert "lmcache==0.5.6" in done.stdout


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """Modules of a made-up LMCache 9.9, by name."""
    names = {
        f"{ADAPTERS}.base": {"L2AdapterInterface": Base},
        f"{ADAPTERS}.config": {"L2AdapterConfigBase": object},
        "lmcache.v1.distributed.api": {"ObjectKey": object},
        "lmcache.native_storage_ops": {"Bitmap": object},
    }
    modules = {}
    for name, content in names.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(content)
        for end in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:end])
            if parent not in names:
                package = types.ModuleType(parent)
                package.__path__ = []
                monkeypatch.setitem(sys.modules, parent, package)
        monkeypatch.setitem(sys.modules, name, modules[name])
    monkeypatch.setattr(metadata, "version", lambda _: "9.9")
    return modules


def test_names_that_moved_are_found(fake: dict[str, types.ModuleType]) -> None:
    found = interface.lmcache_interface()
    assert found.bitmap is object
    assert found.store_result(True, 7) is True, "an older LMCache takes a bool"
    assert found.usage is None
    assert found.key_page is None


def test_a_name_that_is_gone(fake: dict[str, types.ModuleType]) -> None:
    del fake["lmcache.v1.distributed.api"].ObjectKey
    with pytest.raises(UnsupportedError, match=r"LMCache 9\.9 .* ObjectKey .* lmcache==0\.5\.6"):
        interface.lmcache_interface()


def test_a_method_that_is_new_or_called_in_another_way(
    fake: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = interface.lmcache_interface()

    class Adapter:
        __abstractmethods__ = frozenset({"submit_probe_task"})

    with pytest.raises(UnsupportedError, match="asks L2 adapters for submit_probe_task"):
        interface.check_complete(Adapter, found)
    interface.check_complete(Base, found)
    monkeypatch.setattr(Base, "submit_store_task", lambda self, batch: None)
    with pytest.raises(UnsupportedError, match=r"calls submit_store_task\(batch\)"):
        interface.check_complete(Base, found)


def test_only_arguments_that_a_function_takes_are_passed() -> None:
    assert interface.accepted(lambda keys: None, sizes=[1]) == {}
    assert interface.accepted(lambda keys, sizes: None, sizes=[1]) == {"sizes": [1]}
