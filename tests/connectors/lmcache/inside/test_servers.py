"""LMCache's own storage manager and its real server process, on top of the adapter."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig
from lmcache.v1.distributed.storage_manager import StorageManager

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from tests.connectors.lmcache.inside.lmcache_engine import LENGTH
from tests.connectors.lmcache.inside.lmcache_support import adapter, key, looked_up, spec, until

CHUNK = 128
"""Tokens of LMCache's chunks."""
CHUNKS = LENGTH // CHUNK
"""Of the engine's prompt, that are whole."""
LAYOUT = MemoryLayoutDesc([torch.Size([2, 3, 64, 8])], [torch.bfloat16])


@contextmanager
def manager(home: Path, capacity_bytes: int = 0) -> Iterator[StorageManager]:
    """LMCache's server storage: L1 in memory, the adapter below it. With a capacity LMCache evicts
    from the adapter what was used longest ago."""
    below = PluginL2AdapterConfig.from_dict(spec(home, capacity_bytes=capacity_bytes))
    if capacity_bytes:
        below.eviction_config = EvictionConfig(eviction_policy="LRU")
    memory = L1MemoryManagerConfig(
        size_in_bytes=1 << 24, use_lazy=False, shm_name=f"kvshare-test-{uuid.uuid4().hex[:8]}"
    )
    opened = StorageManager(
        StorageManagerConfig(
            l1_manager_config=L1ManagerConfig(memory_config=memory),
            eviction_config=EvictionConfig(eviction_policy="LRU"),
            l2_adapter_config=L2AdaptersConfig([below]),
        )
    )
    try:
        yield opened
    finally:
        opened.close()


def written(opened: StorageManager, home: Path, numbers: range) -> dict[int, torch.Tensor]:
    """Write objects to L1 and wait until the adapter has them."""
    keys = [key(number) for number in numbers]
    reserved = opened.reserve_write(keys, LAYOUT)
    rows = {}
    for number, one in zip(numbers, keys, strict=True):
        rows[number] = torch.randn(LAYOUT.shapes[0]).to(torch.bfloat16)
        reserved[one].tensor.copy_(rows[number])
    opened.finish_write(keys)
    one = adapter(home)
    until(lambda: all(looked_up(one, keys)))
    one.close()
    return rows


def read_locked(opened: StorageManager) -> int:
    """Objects in L1 that LMCache is reading, for example to store them."""
    return sum(l1["read_locked_count"] for l1 in opened.report_status()["l1_managers"].values())


def check_read(opened: StorageManager, rows: dict[int, torch.Tensor], missing: int) -> None:
    """The adapter has a prefix of `rows`; nobody has the object behind it."""
    keys = [key(number) for number in (*rows, missing)]
    spec_ = PrefetchTaskSpec([GroupedObjectKeys(keys, 0, LAYOUT)])
    handle = opened.submit_prefetch_task(spec_)
    result = until(lambda: opened.query_prefetch_status(handle))
    assert result.l2_hit_count == len(rows)
    assert [result.hit_cells[0].test(at) for at in range(len(keys))] == [True] * len(rows) + [False]
    with opened.read_prefetched_results(keys[:-1]) as objects:
        assert objects is not None
        for one, expected in zip(objects, rows.values(), strict=True):
            assert torch.equal(one.tensor, expected)
    opened.finish_read_prefetched(keys[:-1])


def stop_daemon(home: Path) -> None:
    with Client(home) as client:
        client.stop()


def test_managers_share_a_home_and_one_that_comes_later_reads_it(tmp_path: Path) -> None:
    with manager(tmp_path) as first, manager(tmp_path) as second:
        rows = written(first, tmp_path, range(1, 6))
        check_read(second, rows, missing=99)
        # a store that ends later would unlock its keys, also when they were read back since
        until(lambda: not read_locked(first))
        first.clear(force=True)
        check_read(first, rows, missing=99)
    stop_daemon(tmp_path)
    with manager(tmp_path) as later:
        check_read(later, rows, missing=99)
    stop_daemon(tmp_path)


def test_lmcache_evicts_over_its_capacity_what_was_used_longest_ago(tmp_path: Path) -> None:
    nbytes = LAYOUT.shapes[0].numel() * 2
    with manager(tmp_path, capacity_bytes=10 * nbytes) as opened:
        written(opened, tmp_path, range(1, 8))
        written(opened, tmp_path, range(8, 10))  # from 80 % on a fifth goes
        with Client(tmp_path) as client:
            until(lambda: client.call(protocol.Stats())["nodes"] < 9)
        one = adapter(tmp_path)
        found = looked_up(one, [key(number) for number in range(1, 10)])
        one.close()
        assert not all(found)
        assert found[-2:] == [True, True], "those that came last"
    stop_daemon(tmp_path)


def test_a_damaged_block_is_a_miss_and_the_prefix_before_it_is_found(tmp_path: Path) -> None:
    with manager(tmp_path) as first:
        rows = written(first, tmp_path, range(1, 4))
    stop_daemon(tmp_path)
    damaged = holding(tmp_path, rows.pop(3))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with manager(tmp_path) as later:
        check_read(later, rows, missing=3)
    stop_daemon(tmp_path)


def holding(home: Path, rows: torch.Tensor) -> Path:
    """The file of the block that these rows lie in."""
    data = rows.view(torch.uint8).numpy().tobytes()
    files = [path for path in (home / "blocks").rglob("*") if path.is_file()]
    (found,) = [path for path in files if data in path.read_bytes()]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(home: Path, log: Path) -> Iterator[tuple[int, str]]:
    """`lmcache server` with the adapter; yields its port and the address of its HTTP API."""
    port, http = free_port(), free_port()
    command = [str(Path(sys.executable).parent / "lmcache"), "server", "--port", str(port)]
    command += ["--http-port", str(http), "--l1-size-gb", "0.1", "--eviction-policy", "LRU"]
    command += ["--chunk-size", str(CHUNK), "--supported-transfer-mode", "auto"]
    command += ["--shm-name", f"kvshare-test-{uuid.uuid4().hex[:8]}", "--disable-observability"]
    command += ["--l2-adapter", json.dumps(spec(home))]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        until(lambda: process.poll() is not None or answers(http))
        assert process.poll() is None, log.read_text()[-4000:]
        yield port, f"http://127.0.0.1:{http}"
    finally:
        process.terminate()
        process.wait(60)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def asked(url: str, **request: Any) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, **request), timeout=60) as answer:
        return json.load(answer)


def has(url: str, count: int) -> list[Any] | None:
    """The keys of the objects below the server, once there are so many."""
    listed = asked(f"{url}/cache/objects?tier=l2")["entries"]
    return [one.get("key", one) for one in listed] if len(listed) == count else None


def check_healthy(url: str) -> None:
    (status,) = asked(f"{url}/status")["storage_manager"]["l2_adapters"]
    assert status["type"] == "KVShareL2Adapter"
    assert status["is_healthy"], status


def check_delete(url: str, keys: list[Any]) -> None:
    body = json.dumps({"tier": "l2", "keys": keys[:1]}).encode()
    headers = {"Content-Type": "application/json"}
    asked(f"{url}/cache/objects", data=body, headers=headers, method="DELETE")
    assert has(url, len(keys) - 1)


def generated(port: int, salts: Sequence[str]) -> list[dict[str, Any]]:
    """What a new engine with LMCache's connector says of one prompt, sent under each salt."""
    module = "tests.connectors.lmcache.inside.lmcache_engine"
    command = [sys.executable, "-W", "ignore", "-m", module, str(port), *salts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"salt"')]


def test_an_engine_finds_its_chunks_after_engine_and_server_were_started_again(
    tmp_path: Path,
) -> None:
    log = tmp_path.parent / "server.log"
    with server(tmp_path, log) as (port, url):
        (first,) = generated(port, ["acme"])
        assert first["cached"] == 0
        until(lambda: has(url, CHUNKS))
        check_healthy(url)
    with server(tmp_path, log) as (port, url):
        again, other = generated(port, ["acme", "other"])
        assert again == first | {"cached": CHUNKS * CHUNK}
        assert other == first | {"salt": "other"}
        check_delete(url, until(lambda: has(url, 2 * CHUNKS)))
    stop_daemon(tmp_path)
