"""`kvshare vllm serve`: the OpenAI server as a user starts it, over HTTP."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from examples.chat.run import written
from examples.engines.server import Client as ChatClient
from examples.engines.server import free_port
from examples.engines.small_model import prepare_model
from examples.prompts.families import FAMILIES
from examples.prompts.histories import REWRITES, requests
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import ListNodes
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver
from tests.support.documents import DOCS, commands_of
from tests.support.exposition import Exposed
from tests.support.needs import need
from tests.support.oracle import prompt
from tests.support.waiting import eventually, until

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

START_S = 600
STOP_S = 60
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, nothing is made there
ANOTHER = Namespace("another model", KVLayout(2, 1, 4, "float32"))
Ask = Callable[..., str]
Call = Callable[[str, dict[str, Any]], str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


class Server(NamedTuple):
    """The running server, and what was in shared memory before it started."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    in_shared_memory: set[str]


def command(home: Path, port: int) -> list[str]:
    settings = {
        "home": home, "semantic": "never", "host_bytes": "256MiB", "idle_exit_s": 5,
        "plan_deadline_ms": 10_000, "log_requests": "true",
    }  # fmt: skip
    kvshare = [
        part for name, value in settings.items() for part in (f"--kvshare.{name}", str(value))
    ]
    return [
        sys.executable, "-m", "kvshare_store.cli.main", "vllm", "serve", str(prepare_model()),
        *kvshare, "--kvshare.min_saving_ms=-1e9",
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
        "--block-size", "32", "--kv-cache-memory-bytes", str(512 << 20),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """The environment of a server as users start it, with its engine in a process of its own. Other
    tests have set vLLM's variables for engines in this process."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return ours | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


@pytest.fixture(scope="module")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests; the last test stops it."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    port, before = free_port(), set(os.listdir(SHARED_MEMORY))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(home, port), stdout=output, stderr=output, env=environment()
        )
    try:
        wait_for(port, process, log)
        yield Server(process, port, log, before)
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.fixture(scope="module")
def call(server: Server) -> Call:
    """Post to a path of the running server; returns the answer as it came."""

    def post(path: str, body: dict[str, Any]) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/v1/{path}",
            json.dumps({"model": "demo", "temperature": 0, "max_tokens": 8} | body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    return post


def shown(server: Server, page: str, text: str) -> dict[str, Any]:
    """The answer to the `curl` of a page, about this text."""
    (command,) = (it for it in commands_of(DOCS / page) if ":8000/v1/completions" in it)
    words = shlex.split(command.replace(":8000", f":{server.port}"))
    need(shutil.which(words[0]) is not None, words[0])
    words[-1] = json.dumps(json.loads(words[-1]) | {"model": "demo", "prompt": text})
    answer = subprocess.run(words, check=True, capture_output=True, timeout=60)
    return dict(json.loads(answer.stdout))


def chat(text: str, **body: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | body


@pytest.fixture(scope="module")
def ask(call: Call) -> Ask:
    """Send a chat; keyword arguments go into the body of the request."""

    def asking(text: str, **body: Any) -> str:
        answer = json.loads(call("chat/completions", chat(text, **body)))
        return str(answer["choices"][0]["message"]["content"])

    return asking


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"no server after {START_S} s: {log.read_text()[-4000:]}")


def stored(home: Path, nodes: int, *, exactly: bool = False) -> dict[str, Any]:
    """Stats once that many prompts are stored; `exactly`: no more and no fewer. A prompt with its
    answer replaces the prompt, and for a moment both are stored."""
    with Client(home) as client:

        def there() -> bool:
            found = int(client.stats()["nodes"])
            return found == nodes or (found > nodes and not exactly)

        eventually(there, STOP_S)
        return client.stats()


def wait_until_kept(home: Path, tokens: int, tenant: str) -> None:
    """Wait until a prompt of so many tokens is stored, with or without its answer. The number of
    prompts does not tell: an answer of the request before may come in between."""

    def kept() -> bool:
        nodes = client.call(ListNodes(1000))
        return any(
            tokens <= node["tokens"] <= tokens + 8 and node["tenant"] == tenant for node in nodes
        )

    with Client(home) as client:
        until(kept, STOP_S)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_a_similar_prompt_is_served_from_an_earlier_ones_kv(ask: Ask, home: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "support_ticket")
    ask(family.donor)
    assert stored(home, 1, exactly=True)["nodes"] == 1
    edited = ask(family.followers[0], cache_salt=None)
    after = stored(home, 2)
    assert after["hits_edited"] == 1
    assert after["tokens_reused_edited"] > 300
    plain = ask(family.followers[0], kv_transfer_params={"kvshare.policy": "off"})
    assert stored(home, 2)["declined"]["policy_off"] == 1
    assert words(edited)[:2] == words(plain)[:2]  # what comes next may differ, but the rows do not


def test_a_salt_is_a_wall(ask: Ask, home: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "support_ticket")
    before = stored(home, 2, exactly=True)
    ask(family.donor, cache_salt="another tenant")
    after = stored(home, before["nodes"] + 1, exactly=True)
    assert after["misses"] == before["misses"] + 1
    assert after["nodes"] == before["nodes"] + 1


def test_answers_say_what_was_reused(server: Server, call: Call, home: Path) -> None:
    """Completions, as the documents ask for them, and chats. Streamed answers have no field for it,
    and work all the same."""
    family = next(family for family in FAMILIES if family.name == "medical_report")
    text = family.donor  # nothing of it is stored
    before = stored(home, 2)["nodes"]
    first = shown(server, "start.md", text)
    assert first["kv_transfer_params"]["kvshare.reused"] == 0
    stored(home, before + 1)
    again = shown(server, "start.md", text)
    assert again["usage"]["completion_tokens"] <= 16
    said, usage = again["kv_transfer_params"], again["usage"]
    assert said["kvshare.policy"] == "balanced"
    parts = ("exact", "edited", "prefix_cached", "recomputed")
    assert sum(said[f"kvshare.{part}"] for part in parts) == usage["prompt_tokens"]
    wild = {"kvshare.policy": "wild"}
    answer = json.loads(
        call("chat/completions", chat(text, kv_transfer_params=wild, cache_salt=None))
    )
    said = answer["kv_transfer_params"]
    assert (said["kvshare.reason"], said["kvshare.asked"]) == ("unknown_policy", "wild")
    streamed = call("chat/completions", chat(text, stream=True))
    assert streamed.rstrip().endswith("data: [DONE]")


def scrape(server: Server) -> Exposed:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        return Exposed(answer.read().decode())


def test_its_metrics_are_what_its_answers_say(server: Server, call: Call, home: Path) -> None:
    """They travel from the engine's process to the one that answers over HTTP."""
    family = next(family for family in FAMILIES if family.name == "contract")
    before, said = scrape(server), []
    for text in (family.donor, family.followers[0]):
        answer = json.loads(call("completions", {"prompt": text, "cache_salt": "counted"}))
        said.append(answer["kv_transfer_params"])
        wait_until_kept(home, answer["usage"]["prompt_tokens"], "counted")
    assert said[1]["kvshare.edited"] > 0

    def gained(name: str, **labels: str) -> float:
        return scrape(server).total(name, **labels) - before.total(name, **labels)

    def both_are_counted() -> bool:
        return gained("vllm:kvshare_requests_total") == 2

    until(both_are_counted, STOP_S)
    for kind in ("exact", "continued", "edited", "recomputed"):
        tokens = sum(one[f"kvshare.{kind}"] for one in said)
        assert gained("vllm:kvshare_tokens_total", kind=kind, model_name="demo") == tokens
    assert gained("vllm:kvshare_requests_total", outcome="edited", engine="0") == 1
    assert gained("vllm:kvshare_requests_total", outcome="miss") == 1
    assert gained("vllm:kvshare_lookup_seconds_count") == 2
    assert gained("vllm:kvshare_load_seconds_count") == 1


def test_rewritten_histories_stream_and_say_in_the_log_what_was_reused(
    server: Server, home: Path
) -> None:
    """Like the chat example, with one conversation whose system prompt has the time in it."""
    client = ChatClient("demo", server.port, "demo", server.log)
    dated = next(rewrite for rewrite in REWRITES if "date" in rewrite.name)
    for one in requests(written()[2:3], dated, 3):
        answer = client.ask(one.messages, "a conversation", 4)
        wait_until_kept(home, answer.tokens, "a conversation")
        parts = ("reused", "prefix_cached", "recomputed")
        assert sum(int(answer.report[f"kvshare.{part}"]) for part in parts) == answer.tokens
        assert answer.text
        assert answer.ttft_s > 0
        if one.turn > 1:
            assert int(answer.report["kvshare.edited"]) > 300
            assert answer.computed < answer.tokens - 300


def test_a_stopped_server_leaves_the_daemon_to_others(server: Server, ask: Ask, home: Path) -> None:
    """vLLM kills all its descendants, by force if needed; the daemon must not be one of them."""
    ask("What outlives a server?")
    with Client(home) as older:
        older.flush()
        daemon, nodes = older.greet().pid, stored(home, 1)["nodes"]
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert any("EngineCore" in " ".join(process.cmdline()) for process in family)
        assert daemon not in [process.pid for process in family]
        server.process.send_signal(signal.SIGINT)  # as Ctrl-C does
        server.process.wait(timeout=STOP_S)
        assert not psutil.wait_procs(family, timeout=STOP_S)[1]
        assert older.stats()["nodes"] == nodes
        with Client(home) as newer:
            assert newer.greet().pid == daemon
            engine = ClientDriver(newer, ANOTHER)
            engine.save(prompt(1, 300))
            assert engine.serve(prompt(1, 300)).exact == 299

        def nothing_is_left() -> bool:
            return set(os.listdir(SHARED_MEMORY)) <= server.in_shared_memory

        until(nothing_is_left, STOP_S)
