"""`kvshare vllm serve`: the OpenAI server as a user starts it, asked over HTTP."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.demo.families import FAMILIES
from examples.demo.model import prepare_model
from kvshare_store.daemon.client import Client

pytestmark = [pytest.mark.engine, pytest.mark.slow]

START_S = 180
Ask = Callable[..., str]
Call = Callable[[str, dict[str, Any]], str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def call(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Post to a path of the running server; the answer as it came."""
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "server.log"
    settings = {
        "home": home, "semantic": "never", "host_bytes": "256MiB", "idle_exit_s": 5,
        "plan_deadline_ms": 10_000,
    }  # fmt: skip
    kvshare = [
        part for name, value in settings.items() for part in (f"--kvshare.{name}", str(value))
    ]
    command = [
        sys.executable, "-m", "kvshare_store.cli.main", "vllm", "serve", str(prepare_model()),
        *kvshare, "--kvshare.min_saving_ms=-1e9",
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
        "--block-size", "32", "--kv-cache-memory-bytes", str(512 << 20),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def post(path: str, body: dict[str, Any]) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/{path}",
            json.dumps({"model": "demo", "temperature": 0, "max_tokens": 8} | body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    try:
        wait_for(port, server, log)
        yield post
    finally:
        server.terminate()
        server.wait(timeout=60)


def chat(text: str, **body: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | body


@pytest.fixture(scope="module")
def ask(call: Call) -> Ask:
    """Ask in a chat; the keyword arguments go into the body of the request."""

    def asking(text: str, **body: Any) -> str:
        answer = json.loads(call("chat/completions", chat(text, **body)))
        return str(answer["choices"][0]["message"]["content"])

    return asking


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"no server after {START_S} s: {log.read_text()[-4000:]}")


def stored(home: Path, nodes: int) -> dict[str, Any]:
    """Stats once that many prompts are stored."""
    with Client(home) as client:
        deadline = time.monotonic() + 30
        while client.stats()["nodes"] < nodes and time.monotonic() < deadline:
            time.sleep(0.1)
        return client.stats()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_a_similar_prompt_is_served_from_an_earlier_ones_kv(ask: Ask, home: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "support_ticket")
    ask(family.donor)
    assert stored(home, 1)["nodes"] == 1
    edited = ask(family.followers[0], cache_salt=None)
    after = stored(home, 2)
    assert after["hits_edited"] == 1
    assert after["tokens_reused_edited"] > 300
    plain = ask(family.followers[0], kv_transfer_params={"kvshare.policy": "off"})
    assert stored(home, 2)["declined"]["policy_off"] == 1
    assert words(edited)[:2] == words(plain)[:2]  # what comes next may differ: the rows do


def test_a_salt_is_a_wall(ask: Ask, home: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "support_ticket")
    before = stored(home, 2)
    ask(family.donor, cache_salt="another tenant")
    after = stored(home, before["nodes"] + 1)
    assert after["misses"] == before["misses"] + 1
    assert after["nodes"] == before["nodes"] + 1


def test_answers_say_what_was_reused(call: Call, home: Path) -> None:
    """Completions and chats; what is streamed has no place for it and comes all the same."""
    family = next(family for family in FAMILIES if family.name == "support_ticket")
    text = family.donor * 2
    before = stored(home, 2)["nodes"]
    first = json.loads(call("completions", {"prompt": text}))
    assert first["kv_transfer_params"]["kvshare.reused"] == 0
    stored(home, before + 1)
    again = json.loads(call("completions", {"prompt": text, "cache_salt": None}))
    said, usage = again["kv_transfer_params"], again["usage"]
    assert said["kvshare.policy"] == "balanced"
    parts = ("exact", "edited", "prefix_cached", "recomputed")
    assert sum(said[f"kvshare.{part}"] for part in parts) == usage["prompt_tokens"]
    wild = {"kvshare.policy": "wild"}
    answer = json.loads(call("chat/completions", chat(text, kv_transfer_params=wild)))
    said = answer["kv_transfer_params"]
    assert (said["kvshare.reason"], said["kvshare.asked"]) == ("unknown_policy", "wild")
    streamed = call("chat/completions", chat(text, stream=True))
    assert streamed.rstrip().endswith("data: [DONE]")
