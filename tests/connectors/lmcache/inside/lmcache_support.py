"""LMCache's own objects, and its plugin loader, for tests."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

PATIENCE_S = 60.0


def spec(home: object, **params: Any) -> dict[str, Any]:
    """The value of `--l2-adapter`, as in docs/lmcache.md."""
    small = {"host_bytes": 1 << 22, "disk_bytes": 1 << 26, "semantic": "never"}
    unhurried = {"plan_deadline_ms": 20_000.0}
    return {
        "type": "plugin",
        "module_path": "kvshare_connectors.lmcache.adapter",
        "class_name": "KVShareL2Adapter",
        "adapter_params": {"home": str(home)} | small | unhurried | params,
    }


def adapter(home: object, **params: Any) -> Any:
    """An adapter made by LMCache's own loader, from JSON."""
    config = PluginL2AdapterConfig.from_dict(json.loads(json.dumps(spec(home, **params))))
    return create_l2_adapter_from_registry(config)


def key(number: int, salt: str = "", model: str = "org/model", group: int = 0) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"), model, 0x01000100, group, salt)


def memory(fill: float, size: int = 1000) -> TensorMemoryObj:
    data = torch.full((size,), fill, dtype=torch.float32)
    about = MemoryObjMetadata(
        shape=data.shape,
        dtype=data.dtype,
        address=0,
        phy_size=data.nbytes,
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
    )
    return TensorMemoryObj(data, about, parent_allocator=None)


def until(happens: Callable[[], Any], fd: int = -1) -> Any:
    """Ask until the answer is neither None nor False. With `fd`, ask whenever it is signalled."""
    deadline = time.monotonic() + PATIENCE_S
    while (not (answer := happens()) and answer is None) or answer is False or answer == {}:
        assert time.monotonic() < deadline, "nothing happened"
        if fd >= 0:
            assert signalled(fd)
        else:
            time.sleep(0.02)
    return answer


def signalled(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(PATIENCE_S * 1e3):
        return False
    os.eventfd_read(fd)
    return True


def stored(one: Any, keys: Sequence[ObjectKey], objects: Sequence[Any]) -> Any:
    task = one.submit_store_task(list(keys), list(objects))
    assert signalled(one.get_store_event_fd())
    done = one.pop_completed_store_tasks()
    assert list(done) == [task]
    return done[task]


def looked_up(one: Any, keys: Sequence[ObjectKey], layouts: Any = None) -> list[bool]:
    task = one.submit_lookup_and_lock_task(list(keys), layouts or {})
    assert signalled(one.get_lookup_and_lock_event_fd())
    found = one.query_lookup_and_lock_result(task)
    assert one.query_lookup_and_lock_result(task) is None, "it answers once"
    return [found.test(at) for at in range(len(keys))]


def loaded(one: Any, keys: Sequence[ObjectKey], objects: Sequence[Any]) -> list[bool]:
    task = one.submit_load_task(list(keys), list(objects))
    assert signalled(one.get_load_event_fd())
    found = one.query_load_result(task)
    assert one.query_load_result(task) is None, "it answers once"
    return [found.test(at) for at in range(len(keys))]
