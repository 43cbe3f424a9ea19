"""The worker of an engine whose daemon is on another machine: it loads the same rows as one beside
the daemon, and waits no longer than it says."""

from __future__ import annotations

import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing vLLM warns, and here warnings are errors
    pytest.importorskip("vllm.distributed")
    from kvshare_connectors.vllm.metadata import KVShareMetadata, LoadSpec
    from kvshare_connectors.vllm.paged_cache import PagedCache
    from kvshare_connectors.vllm.paged_formats import LogicalFormat
    from kvshare_connectors.vllm.worker import Worker

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.server import Server
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, ReusePlan
from kvshare_store.plan.spans import Span, clip_spans
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.tensors.rope import Rope
from tests.support.certificates import Keys
from tests.support.daemons import ClientDriver, serving
from tests.support.oracle import prompt
from tests.support.paged import rows_at, write_logical

pytestmark = [pytest.mark.filterwarnings("ignore:::(vllm|torch)")]

TOKENS, BLOCKS, LENGTH = 16, 8, 100
NAMESPACE = Namespace("model", KVLayout(2, 1, 8, "float32"))
ANGLES = torch.arange(2 * LENGTH)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])

Config = Callable[..., StoreConfig]


@pytest.fixture
def server(config: Config, keys: Keys) -> Iterator[Server]:
    with serving(config(**keys.listening(), host_bytes=64 << 20, disk=False)) as running:
        yield running


@pytest.fixture
def open_worker() -> Iterator[Callable[[StoreConfig], Worker]]:
    """`open_worker(config)`: with a paged cache of its own, which holds zeros."""
    opened: list[Worker] = []

    def open_(config: StoreConfig) -> Worker:
        layers = [
            SimpleNamespace(kv_cache=cache, impl=SimpleNamespace(do_kv_cache_update=write))
            for cache in torch.zeros(2, BLOCKS, 1, TOKENS, 16)
        ]
        rope = Rope(ANGLES.cos(), ANGLES.sin(), neox=True)
        opened.append(Worker(config, PagedCache(layers, LogicalFormat()), rope))
        return opened[-1]

    yield open_
    for worker in opened:
        worker.close()


def write(layer: Any, keys: Any, values: Any, cache: Any, slots: Any) -> None:
    write_logical(cache, keys, values, slots)


def far_from(server: Server, keys: Keys) -> StoreConfig:
    return keys.client(keys.clients.issue("engine", "engine"), server.port)


def left_of(plan: ReusePlan, covered: int) -> LoadSpec:
    """What is loaded where vLLM's own prefix cache covers so many tokens."""
    spans = tuple(clip_spans(plan.spans, covered, plan.tokens))
    left = msgspec.structs.replace(plan, spans=spans)
    return LoadSpec("request", left, list(range(BLOCKS)), covered)


def loaded(worker: Worker, spec: LoadSpec) -> torch.Tensor:
    """The paged cache as words after a load, zeros where nothing was written."""
    for layer in worker.cache.layers:
        layer.kv_cache.zero_()
    worker.load(KVShareMetadata(loads=[spec]))
    assert not worker.take_failed_blocks()
    return rows_at(worker.cache, torch.arange(BLOCKS * TOKENS)).view(torch.int32)


def prompts_of_every_kind(driver: ClientDriver) -> dict[str, Sequence[int]]:
    """Prompts whose plans have exact, edited and continued rows."""
    whole = prompt(1, LENGTH)
    edited = whole[:30] + prompt(2, 3) + whole[35:]
    driver.save(whole)
    driver.save(edited, driver.serve(edited))
    return {
        "exact": whole,
        "edited": whole[:50] + prompt(3, 5) + whole[52:],
        "first block": prompt(4, 12) + whole[10:],
        "continued": edited[:80] + prompt(5, 20),
    }


def test_rows_behind_what_the_engine_has_are_loaded_as_on_the_daemons_machine(
    server: Server, keys: Keys, open_worker: Callable[[StoreConfig], Worker]
) -> None:
    """Blocks that vLLM's own prefix cache covers are not fetched, and nobody asks for their rows:
    wherever it ends, and whatever the plan reuses."""
    near, far = open_worker(server.config), open_worker(far_from(server, keys))
    with Client(server.config.home_path) as client:
        driver = ClientDriver(client, NAMESPACE)
        kinds: set[str] = set()
        for name, tokens in prompts_of_every_kind(driver).items():
            stop = driver.serve(tokens).stop
            for covered in (*range(0, stop, 7), stop - 1):
                plans = [client.plan(tokens, NAMESPACE) for _ in range(2)]
                kinds |= {span.kind for span in plans[0].spans}
                rows = [
                    loaded(worker, left_of(plan, covered))
                    for worker, plan in zip((near, far), plans, strict=True)
                ]
                assert torch.equal(*rows), (name, covered)
    assert kinds == {"exact", "edited", "continued"}


def test_the_loader_of_a_daemon_that_was_restarted_connects_anew(
    config: Config, keys: Keys, open_worker: Callable[[StoreConfig], Worker]
) -> None:
    """As the scheduler side does: the first plan of the new daemon is loaded."""
    port = keys.port
    settings = config(**keys.listening(listen=f"tcp://127.0.0.1:{port}"))
    pair = keys.clients.issue("engine", "engine")
    far = open_worker(keys.client(pair, port))
    rows = []
    for life in range(2):
        with serving(settings), Client(settings.home_path) as client:
            driver = ClientDriver(client, NAMESPACE)
            if life == 0:
                driver.save(prompt(1, LENGTH))
                client.flush()
            plan = client.plan(prompt(1, LENGTH), NAMESPACE)
            rows.append(loaded(far, left_of(plan, 0)))
    assert torch.equal(*rows)


def test_all_loads_of_a_step_wait_for_a_silent_daemon_together(
    keys: Keys, open_worker: Callable[[StoreConfig], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes connections and says nothing."""
    waits: list[float] = []
    receive = Client.receive

    def noted(client: Client, request_id: bytes, timeout: float) -> Any:
        if threading.current_thread() is threading.main_thread():
            waits.append(timeout)
        return receive(client, request_id, min(timeout, 0.1))

    monkeypatch.setattr(Client, "receive", noted)
    monkeypatch.setattr("kvshare_connectors.vllm.worker._FETCH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        far = open_worker(keys.client(keys.clients.issue("engine", "engine"), port))
        plan = ReusePlan(namespace="", tokens=LENGTH, spans=(Span(0, 8, 0, 0, 0),),
                         blocks=(BlockRef("ab" * 32, 8, 1024, 0),), lease="lease")  # fmt: skip
        loads = [LoadSpec(str(at), plan, [2 * at, 2 * at + 1], 0) for at in range(4)]
        far.load(KVShareMetadata(loads=loads))
    assert far.take_failed_blocks() == set(range(8))
    assert sum(waits) <= 0.5, "what is left of the first wait, not as long again for each"
