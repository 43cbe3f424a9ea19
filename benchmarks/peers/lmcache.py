"""LMCache beside KVShare: misses, the same prompt again, and similar prompts.

LMCache 0.5.6 runs in server mode, the one that works on a CPU, with its own connector.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.harness.result import Options, Result
from benchmarks.peers.compare import Peer, compare, draw, table
from benchmarks.peers.environment import python_with
from examples.engines.process import EngineError
from examples.engines.server import free_port

__all__ = ["draw", "measure"]

VERSION = "0.5.6"
_CHUNK = 128
_START_S = 300.0


def measure(options: Options) -> Result:
    """Serve every prompt once, again, and changed."""
    python = python_with("lmcache")
    with (
        tempfile.NamedTemporaryFile("w", suffix=".log") as log,
        server(python, log.file) as port,
    ):
        samples = compare(Peer("lmcache", lmcache_settings(port), python), options)
    notes = [
        f"LMCache {VERSION}, server mode, CPU; installed without dependencies; vLLM's kernel "
        "dispatcher was guarded against an object of LMCache's whose __dict__ is no dict",
        "LMCache's server looks for prefixes, as it does by default",
        f"vLLM's block size is {_CHUNK} with LMCache, which asks for it, and 32 elsewhere",
    ]
    return table("lmcache", "LMCache and KVShare on the same prompts", notes, samples, options)


@contextmanager
def server(python: str, log: IO[str]) -> Iterator[int]:
    """LMCache's server; yields its port."""
    port, http = free_port(), free_port()
    command = [str(Path(python).parent / "lmcache"), "server", "--port", str(port)]
    command += ["--http-port", str(http), "--l1-size-gb", "2", "--eviction-policy", "LRU"]
    command += ["--chunk-size", str(_CHUNK), "--supported-transfer-mode", "auto"]
    command += ["--shm-name", f"lmcache-{uuid.uuid4().hex[:8]}", "--disable-observability"]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(process, port, Path(log.name))
        yield port
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    words = "\n".join(log.read_text().splitlines()[-15:])
    raise EngineError(f"LMCache's server has not started in {_START_S:.0f} s\n{words}")


def lmcache_settings(port: int) -> dict[str, Any]:
    """What turns LMCache's server mode on in a vLLM engine."""
    extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    return {"kv_transfer_config": transfer, "block_size": _CHUNK}
