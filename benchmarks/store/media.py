"""The speed of media without the store: memory, files, and remotes through their own clients."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.data.kv_blocks import Named
from benchmarks.harness.concurrency import spent
from benchmarks.harness.page_cache import forget
from kvshare_store.blocks.remotes import open_remote
from kvshare_store.tensors.frame import Block

TIMEOUT_S = 30.0
Round = Callable[[], tuple[float, float]]
"""One round: seconds of putting all blocks and of getting them."""


def memcpy(named: Named) -> Round:
    """One thread copies the same bytes from one place in memory to another, both ways."""
    source = [np.frombuffer(block.data, np.uint8) for _, block in named]
    target = [np.zeros(len(block.data), np.uint8) for _, block in named]

    def run() -> tuple[float, float]:
        times = []
        for _ in range(2):
            start = perf_counter()
            for ours, theirs in zip(target, source, strict=True):
                np.copyto(ours, theirs)
            times.append(perf_counter() - start)
        return times[0], times[1]

    return run


def fio(folder: Path, named: Named) -> Round:
    """`fio`: eight jobs, files of a block's size, fsync after each; then they are read, cold."""
    size = len(named[0][1].data) // 4096 * 4096

    def job(kind: str, *more: str) -> float:
        line = ["fio", "--name=kvshare", f"--directory={folder}", f"--rw={kind}", f"--bs={size}",
                f"--filesize={size}", f"--nrfiles={len(named) // 8}", "--numjobs=8",
                "--openfiles=1", "--file_service_type=sequential", "--ioengine=psync",
                "--group_reporting", "--output-format=json", *more]  # fmt: skip
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][kind]
        return float(found["io_bytes"]) / float(found["bw_bytes"])

    def run() -> tuple[float, float]:
        written = job("write", "--create_on_open=1", "--end_fsync=1", "--overwrite=0")
        forget(folder)
        read = job("read", "--invalidate=1")
        for path in folder.iterdir():
            path.unlink()
        return written, read

    return run


def redis_benchmark(port: int, named: Named) -> Round:
    """`redis-benchmark` with values of a block's size and 16 connections."""

    def one(kind: str) -> float:
        line = ["redis-benchmark", "-p", str(port), "-d", str(len(named[0][1].data)), "-c", "16",
                "-n", str(len(named)), "-t", kind, "--csv"]  # fmt: skip
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        rate = float(done.stdout.splitlines()[-1].split(",")[1].strip('"'))
        return len(named) / rate

    return lambda: (one("set"), one("get"))


def raw_objects(url: str, named: Named) -> Round:
    """The client library alone: the same values, no frame, no verification."""

    async def conduct() -> tuple[float, float]:
        remote = open_remote(url, TIMEOUT_S)
        at_once = remote.properties.max_concurrency
        keys = {f"raw/{name}": block for name, block in named}
        puts = [partial(remote.put, key, (block.data,)) for key, block in keys.items()]
        put = await spent(puts, at_once)
        got = await spent([partial(remote.get, key) for key in keys], at_once)
        await remote.delete_prefix("raw/")
        await remote.close()
        return put.wall, got.wall

    return lambda: asyncio.run(conduct())


def raw_files(folder: Path, named: Named) -> Round:
    """The same files by plain calls in eight threads: no frame, no verification."""

    def write(one: tuple[str, Block]) -> None:
        descriptor = os.open(folder / one[0], os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(descriptor, one[1].data)
        os.fsync(descriptor)
        os.close(descriptor)

    def run() -> tuple[float, float]:
        times = []
        with ThreadPoolExecutor(8) as threads:
            for work in (write, lambda one: (folder / one[0]).read_bytes()):
                start = perf_counter()
                list(threads.map(work, named))
                times.append(perf_counter() - start)
                forget(folder)
        for path in folder.iterdir():
            path.unlink()
        return times[0], times[1]

    return run
