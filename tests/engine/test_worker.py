"""The worker side alone: paged blocks are plain tensors, and what it tells the daemon is
recorded."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing vLLM warns, and here warnings are errors
    pytest.importorskip("vllm.distributed")
    from kvshare_connectors.vllm import saver, timing, worker
    from kvshare_connectors.vllm.idle import IdleWorker
    from kvshare_connectors.vllm.metadata import KVShareMetadata, LoadSpec, SaveSpec
    from kvshare_connectors.vllm.paged_cache import PagedCache
    from kvshare_connectors.vllm.paged_formats import LogicalFormat

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.errors import KVShareError, LeaseError, StorageError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Run, Span
from kvshare_store.save.staging import Staged
from tests.support.paged import rows_at

pytestmark = [pytest.mark.filterwarnings("ignore:::(vllm|torch)")]

TOKENS, BLOCKS = 16, 12


class Notebook:
    """Stands in for the saver: keeps what it is told, and copies it when it is read."""

    def __init__(self, *_: Any) -> None:
        self.told: list[saver.Message] = []
        self.stored: list[str] = []

    def tell(self, message: saver.Message) -> None:
        self.told.append(message)

    def failed(self, error: KVShareError) -> None:
        self.tell(protocol.Failed(str(error.kind)))

    def check_room(self) -> None:
        pass

    def store(self, snapshot: saver.Snapshot) -> None:
        self.stored.append(snapshot.spec.request_id)

    def messages(self) -> list[protocol.Request]:
        return [message() if callable(message) else message for message in self.told]

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.messages() if isinstance(message, kind)]


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> worker.Worker:
    monkeypatch.setattr(worker, "Saver", Notebook)
    layer = SimpleNamespace(kv_cache=torch.zeros(BLOCKS, 2, TOKENS, 16))
    cache = PagedCache([layer], LogicalFormat())
    return worker.Worker(StoreConfig(), cache, rope=None)


def told(one: worker.Worker) -> Notebook:
    assert isinstance(one.saver, Notebook)
    return one.saver


def load_of(name: str, blocks: list[int], start: int = TOKENS) -> LoadSpec:
    """A request whose first block is a hit of vLLM's own cache; the rest is to be loaded."""
    spans = (Span(start, 20, start, 0, 0),)
    plan = ReusePlan(namespace="", tokens=start + 25, spans=spans, lease=f"lease-{name}")
    return LoadSpec(name, plan, blocks, start)


def save_of(name: str, blocks: list[int]) -> SaveSpec:
    length = len(blocks) * TOKENS
    fresh = [Run(0, length)]
    namespace = Namespace(model="m", layout=None)  # type: ignore[arg-type]
    return SaveSpec(name, namespace, b"", None, fresh, blocks)  # type: ignore[arg-type]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


# --- containment ----------------------------------------------------------------------------------

WHATEVER = pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no_space"),
        (MemoryError(), "no_space"),
        (IndexError("index 9 is out of bounds"), "internal"),
        (RuntimeError("CUDA error: invalid argument"), "internal"),
        (ValueError("buffer is too small"), "internal"),
        (LeaseError("gone"), "lease"),
        (StorageError("short read"), "storage"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)


@WHATEVER
def test_a_load_that_raises_anything_is_a_miss_of_its_request_alone(
    one: worker.Worker, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    bad, good = load_of("bad", [1, 2, 3]), load_of("good", [1, 4, 5])
    monkeypatch.setattr(one, "load_one", lambda spec: 7 if spec is good else raising(error)())
    one.load(KVShareMetadata(loads=[bad, good]))
    assert one.take_failed_blocks() == {2, 3}  # block 1 is shared, and correct
    failed, loaded = (message.outcome for message in told(one).of(protocol.Finish))
    assert (failed.failed, failed.recomputed) == (f"load_{kind}", bad.plan.tokens)
    assert (loaded.failed, loaded.nbytes) == ("", 7)
    assert [message.kind for message in told(one).of(protocol.Failed)] == [kind]


@WHATEVER
def test_a_save_that_raises_anything_loses_that_prompt_alone(
    one: worker.Worker, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    snapshot = one.cache.snapshot
    monkeypatch.setattr(
        one.cache, "snapshot", lambda ids: raising(error)() if 3 in ids else snapshot(ids)
    )
    one.after_forward(KVShareMetadata(saves=[save_of("bad", [3]), save_of("good", [5])]))
    assert told(one).stored == ["good"]
    assert [message.kind for message in told(one).of(protocol.Failed)] == [kind]


def test_a_block_that_cannot_be_kept_on_the_device_ends_nothing(
    one: worker.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one.resident, "fill", raising(torch.OutOfMemoryError("CUDA")))
    one.after_forward(KVShareMetadata(saves=[save_of("good", [5])]))
    assert told(one).stored == ["good"]
    assert [message.kind for message in told(one).of(protocol.Failed)] == ["no_space"]


def test_an_idle_worker_fails_what_is_asked_of_it() -> None:
    idle = IdleWorker("worker_unsupported", TOKENS)
    idle.load(KVShareMetadata(loads=[load_of("any", [1, 2, 3])]))
    idle.after_forward(KVShareMetadata(saves=[save_of("any", [1])]))
    assert idle.take_failed_blocks() == {2, 3}
    assert idle.take_failed_blocks() == set()
    assert idle.unserved.reason == "worker_unsupported"


# --- how long the device took ---------------------------------------------------------------------


class FarBehind:
    """A stopwatch of a device that is still working when all work has been submitted."""

    readers: list[threading.Thread]

    def __init__(self, device: torch.device) -> None:
        pass

    def stop(self) -> timing.Seconds:
        def seconds() -> float:
            self.readers.append(threading.current_thread())
            return 1000.0

        return seconds


@pytest.fixture
def far_behind(monkeypatch: pytest.MonkeyPatch) -> type[FarBehind]:
    FarBehind.readers = []
    monkeypatch.setattr(worker, "stopwatch", FarBehind)
    return FarBehind


def test_the_prefill_rate_is_of_the_work_not_of_its_launch(
    one: worker.Worker, far_behind: type[FarBehind]
) -> None:
    for tokens in (256, 512):
        step = KVShareMetadata(prefilled=tokens)
        one.step_begins(step)
        one.load(step)
        one.after_forward(step)
    assert not far_behind.readers  # the engine's thread did not wait for the device
    (observed,) = told(one).of(protocol.Observe)
    assert (observed.tokens, observed.seconds) == (512, 1000.0), "the first one is no measure"


def test_the_time_of_a_load_is_of_the_work_not_of_its_launch(
    one: worker.Worker, far_behind: type[FarBehind], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one, "load_one", lambda spec: 7)
    one.load(KVShareMetadata(loads=[load_of("any", [1, 2, 3])]))
    assert not far_behind.readers
    (finish,) = told(one).of(protocol.Finish)
    assert finish.outcome.seconds == 1000.0


class Stream:
    """A CUDA stream whose clock shows the end of the work submitted so far."""

    now_ms = 0.0


class Event:
    """A CUDA event. Reading one that was not waited for is an error."""

    def __init__(self, *, enable_timing: bool, blocking: bool) -> None:
        assert enable_timing
        assert blocking
        self.waited_for = False

    def record(self, stream: Stream) -> None:
        self.at_ms = stream.now_ms

    def synchronize(self) -> None:
        self.waited_for = True

    def elapsed_time(self, end: Event) -> float:
        assert end.waited_for
        return end.at_ms - self.at_ms


def test_a_gpu_is_timed_by_events_on_the_stream_of_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    watch = timing.stopwatch(torch.device("cuda"))
    stream.now_ms += 250
    seconds = watch.stop()
    stream.now_ms += 99  # one step later
    assert seconds() == 0.25


def test_a_cpu_is_timed_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([10.0, 10.25])
    clock = SimpleNamespace(perf_counter=lambda: next(readings))
    monkeypatch.setattr(timing, "time", clock)
    seconds = timing.stopwatch(torch.device("cpu")).stop()
    assert seconds() == seconds() == 0.25, "one step later it is the same"


# --- saver ----------------------------------------------------------------------------------------


class Daemon:
    """Stands in for the daemon's client: wants 32 and then 8 rows, and keeps what it gets."""

    committed: list[bytes]
    told: list[Any]

    def __init__(self, home: Path, role: str) -> None:
        assert role == "engine"

    def stage_bytes(self, *_: Any, **__: Any) -> Staged:
        return Staged(id="save", fresh=(Run(0, 40),), sizes=(32, 8))

    def commit(self, staged: Staged, blocks: Iterable[memoryview]) -> None:
        Daemon.committed = [bytes(block) for block in blocks]

    def call(self, message: Any) -> None:
        Daemon.told.append(message)

    def close(self) -> None:
        pass


def test_the_saver_commits_the_fresh_rows_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "Client", Daemon)
    Daemon.committed, Daemon.told = [], []
    cache = PagedCache(
        [SimpleNamespace(kv_cache=torch.randn(BLOCKS, 2, TOKENS, 16)) for _ in range(2)],
        LogicalFormat(),
    )
    one = worker.Worker(StoreConfig(), cache, rope=None)
    spec = save_of("a", [3, 1, 5])
    spec.fresh = [Run(0, 40)]
    one.saver.tell(protocol.Failed("before"))
    one.after_forward(KVShareMetadata(saves=[spec]))
    one.saver.tell(lambda: protocol.Failed("after"))
    one.close()
    slots = torch.cat([torch.arange(TOKENS) + block * TOKENS for block in spec.block_ids])[:40]
    parts = torch.split(rows_at(cache, slots), [32, 8], dim=2)
    assert Daemon.committed == [part.contiguous().numpy().tobytes() for part in parts]
    assert Daemon.told == [protocol.Failed("before"), protocol.Failed("after")]


class OldDaemon(Daemon):
    """A client of the release before, which does not know of answers and wants every row."""

    abandoned: list[str]

    def abandon(self, staged: str) -> None:
        OldDaemon.abandoned.append(staged)


def saved_with(daemon: type, specs: list[SaveSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker sends of these."""
    monkeypatch.setattr(saver, "Client", daemon)
    cache = PagedCache(
        [SimpleNamespace(kv_cache=torch.zeros(BLOCKS, 2, TOKENS, 16))], LogicalFormat()
    )
    one = worker.Worker(StoreConfig(), cache, rope=None)
    for spec in specs:
        one.after_forward(KVShareMetadata(saves=[spec]))
    one.close()


def test_an_older_daemon_stores_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    OldDaemon.committed, OldDaemon.abandoned = [], []
    answer = save_of("a", [3, 1, 5])
    answer.extends, answer.fresh = 30, [Run(30, 40)]
    saved_with(OldDaemon, [answer], monkeypatch)
    assert OldDaemon.abandoned == ["save"]
    assert OldDaemon.committed == []


# --- answers --------------------------------------------------------------------------------------


def test_answers_are_copied_before_the_step_writes_anything(one: worker.Worker) -> None:
    """Their blocks may belong to other requests in the same step."""
    rows = []
    one.load_one = lambda spec: rows.append(len(told(one).stored)) or 0  # type: ignore[method-assign]
    step = KVShareMetadata(answers=[save_of("a", [1, 2])], loads=[load_of("b", [1, 2])])
    one.save_answers(step)
    one.step_begins(step)
    assert told(one).stored == ["a"]
    one.load(step)
    assert rows == [1]
    one.after_forward(step)
    assert told(one).stored == ["a"]


def test_an_answer_in_blocks_whose_load_failed_is_not_stored(one: worker.Worker) -> None:
    one.load_one = raising(LeaseError("gone"))  # type: ignore[method-assign]
    one.load(KVShareMetadata(loads=[load_of("a", [1, 2, 3])]))
    answers = [save_of("a", [1, 2, 3]), save_of("b", [4, 5])]
    step = KVShareMetadata(answers=answers, handled={2, 3})
    one.save_answers(step)
    one.step_begins(step)
    assert told(one).stored == ["b"]
