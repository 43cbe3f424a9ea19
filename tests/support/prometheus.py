"""A real Prometheus server, which reads metrics by the rules of `deploy/prometheus`."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.documents import ROOT
from tests.support.servers import free_port

_START_S = 60.0


def missing() -> str:
    """What this machine lacks, or nothing."""
    return "" if shutil.which("prometheus") else "prometheus (package prometheus)"


@contextmanager
def prometheus(folder: Path, targets: Sequence[str]) -> Iterator[str]:
    """Its address, once it answers. `targets`: host and port of each `/metrics`, which it reads
    every second."""
    deployed = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    rules = deployed["scrape_configs"][-1]["metric_relabel_configs"]
    job = {
        "job_name": "kvshare",
        "static_configs": [{"targets": list(targets)}],
        "metric_relabel_configs": rules,
    }
    config = folder / "prometheus.yml"
    config.write_text(
        yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]})
    )
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
    try:
        _await(f"http://{address}/-/ready", process, folder / "prometheus.log")
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(_START_S)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(url, timeout=_START_S).is_success:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.05)


def ask(server: str, query: str) -> list[dict[str, Any]]:
    """The series that a query finds now; a query that Prometheus refuses is an error."""
    answer = httpx.get(f"{server}/api/v1/query", params={"query": query}, timeout=30.0)
    said = answer.json()
    assert said["status"] == "success", (query, said)
    found: list[dict[str, Any]] = said["data"]["result"]
    return found
