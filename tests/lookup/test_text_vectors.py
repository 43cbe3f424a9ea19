"""Text vectors: made while nobody wants the machine, kept in the catalogue, never waited for."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.config import StoreConfig
from kvshare_store.errors import UnsupportedError
from kvshare_store.lookup import text_vectors
from kvshare_store.lookup.embedding_process import Wanted
from kvshare_store.lookup.embedding_worker import EmbeddingWorker
from kvshare_store.lookup.text import decode
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import Driver, prompt

Config = Callable[..., StoreConfig]
Require = Callable[[bool, str], None]
NAMESPACE = Namespace("m", KVLayout(2, 1, 4, "float32"), tokenizer="words")
SCRIPT = Path(__file__).with_name("words_process.py")
PATIENCE = 60.0
"""Seconds after which a test that waits has failed."""


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(5e-3)
    return found


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`embedder(how)`: stores opened from now on embed with `words_process.py HOW`."""

    def use(how: str) -> None:
        command = [sys.executable, str(SCRIPT), how]
        monkeypatch.setattr(text_vectors, "embedding_command", lambda model: command)
        monkeypatch.setattr(text_vectors, "text_embeddings_installed", lambda: True)
        monkeypatch.setattr(text_vectors, "_QUIET_S", 0.0)

    return use


@pytest.fixture
def open_store(config: Config) -> Iterator[Callable[..., Driver]]:
    """`open_store(field=value)`: a driver of a store with text vectors, closed at the end."""
    stores: list[Store] = []

    def open_(**changes: Any) -> Driver:
        while stores:
            stores.pop().close()
        stores.append(Store(config(**{"semantic": "auto"} | changes)))
        return Driver(stores[0], NAMESPACE)

    yield open_
    for store in stores:
        store.close()


def embedding_process() -> psutil.Process | None:
    """The process that embeds for this one, while there is one."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if str(SCRIPT) in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                return child
    return None


def text_thread_lives() -> bool:
    return any(thread.name == "kvshare-text" for thread in threading.enumerate())


def vectors_of(engine: Driver) -> int:
    """Nodes that have a text vector."""
    index = engine.store.nodes.state.index(engine.namespace.digest)
    return 0 if index is None else len(index.semantic)


Embedder = Callable[[str], None]
OpenStore = Callable[..., Driver]


def test_vectors_are_made_kept_and_found_again(embedder: Embedder, open_store: OpenStore) -> None:
    embedder("well")
    engine = open_store()
    for seed in range(3):
        engine.save(prompt(seed, 40))
    wait_for(lambda: vectors_of(engine) == 3)
    again = open_store(semantic="never")  # closing has ended what was being written
    assert vectors_of(again) == 3
    again.store.evict(nodes=3)
    assert vectors_of(again) == 0


def test_no_text_is_embedded_while_an_engine_works(
    embedder: Embedder, open_store: OpenStore
) -> None:
    embedder("well")
    engine = open_store()
    store = engine.store
    engine.save(prompt(0, 40))
    wait_for(lambda: vectors_of(engine) == 1)
    child = embedding_process()
    assert child is not None
    for owner in ("one", "two"):
        store.text.working(owner, True)
    wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
    engine.save(prompt(1, 40))
    store.text.working("one", False)
    store.flush()
    assert engine.serve(prompt(1, 40)).exact == 39, "lookups go on"
    assert (vectors_of(engine), child.status()) == (1, psutil.STATUS_STOPPED)
    store.text.working("two", False)
    wait_for(lambda: vectors_of(engine) == 2)


def test_an_engine_that_died_blocks_idle_time_no_more(
    embedder: Embedder, open_store: OpenStore
) -> None:
    embedder("well")
    engine = open_store()
    engine.store.text.working("engine", True)
    engine.save(prompt(1, 40))
    engine.store.flush()
    assert vectors_of(engine) == 0
    engine.store.reap({"engine"})
    wait_for(lambda: vectors_of(engine) == 1)


def test_what_words_served_badly_comes_first(
    embedder: Embedder, open_store: OpenStore, tmp_path: Path
) -> None:
    embedder(str(tmp_path))
    engine = open_store()
    store = engine.store
    store.text.working("engine", True)
    engine.save([1, *prompt(1, 40)])
    assert store.plan([2, *prompt(2, 40)], NAMESPACE).declined == "no_donor"
    engine.save([2, *prompt(2, 40)])
    engine.save([3, *prompt(3, 40)])
    gone = engine.save([4, *prompt(4, 40)])
    store.nodes.remove([gone])
    store.text.working("engine", False)
    wait_for(lambda: vectors_of(engine) == 3)
    assert (tmp_path / "prompts").read_text().split() == ["2", "3", "1"]


def test_the_queue_is_bounded(
    embedder: Embedder, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder("well")
    monkeypatch.setattr(text_vectors, "_QUEUED", 4)
    monkeypatch.setattr(text_vectors, "_SERVED_BADLY", 3)
    engine = open_store()
    store = engine.store
    store.text.working("engine", True)
    for seed in range(12):
        engine.serve(prompt(seed, 40))
        engine.save(prompt(seed, 40))
    assert store.stats()["texts_waiting"] == 4
    for seed in range(20, 32):
        engine.serve(prompt(seed, 40))
    assert len(store.text.served_badly) == 3


def test_a_prompt_that_waited_too_long_is_dropped(
    embedder: Embedder, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder("well")
    monkeypatch.setattr(text_vectors, "_LATE_S", -1.0)
    engine = open_store()
    engine.save(prompt(0, 40))
    wait_for(lambda: not engine.store.text.jobs)
    engine.store.flush()
    assert (vectors_of(engine), embedding_process()) == (0, None)


def test_an_embedder_that_fails_stops_nothing(embedder: Embedder, open_store: OpenStore) -> None:
    embedder("fail")
    engine = open_store()
    for seed in range(3):
        engine.save(prompt(seed, 40))
    wait_for(lambda: engine.store.stats()["errors"].get("unavailable", 0) == 1)
    assert engine.serve(prompt(0, 40)).exact == 39
    assert engine.save(prompt(9, 40))
    assert engine.store.stats()["errors"] == {"unavailable": 1}, "it rests before it tries again"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stuck process is not waited for, nor is there a rest."""
    monkeypatch.setattr(text_vectors, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(text_vectors, "_LONGEST_S", 0.5)


@pytest.mark.usefixtures("hasty")
def test_a_process_that_is_stuck_is_ended_and_started_again(
    embedder: Embedder, open_store: OpenStore
) -> None:
    embedder("hang")
    engine = open_store()
    for seed in range(2):
        engine.save(prompt(seed, 40))
    wait_for(lambda: engine.store.stats()["errors"] == {"unavailable": 2})
    assert text_thread_lives()
    wait_for(lambda: embedding_process() is None)


@pytest.mark.parametrize("how", ["short", "nan"])
def test_what_is_no_vector_costs_its_prompt_only(
    embedder: Embedder, open_store: OpenStore, how: str
) -> None:
    """It is made of the first token 1; that of the others is fine."""
    embedder(how)
    engine = open_store()
    for first in (0, 1, 2):
        engine.save([first, *prompt(first, 40)])
    wait_for(lambda: vectors_of(engine) == 2)
    wait_for(lambda: engine.store.stats()["errors"] == {"internal": 1})
    assert embedding_process() is not None, "the process is fine"


def test_a_process_that_is_not_used_ends(
    embedder: Embedder, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder("well")
    monkeypatch.setattr(text_vectors, "_UNUSED_S", 0.05)
    engine = open_store()
    engine.save(prompt(0, 40))
    wait_for(lambda: vectors_of(engine) == 1)
    wait_for(lambda: embedding_process() is None)
    engine.save(prompt(1, 40))
    wait_for(lambda: vectors_of(engine) == 2)


def test_neighbours_by_text_are_candidates(embedder: Embedder, open_store: OpenStore) -> None:
    """A prompt like `known` in words finds what is like `known` in text, too."""
    engine = open_store(semantic="never", candidates=1, max_donors=2)
    text = prompt(7, 24)
    known = [*prompt(1, 30), *prompt(2, 10)]
    known_id, far_id = engine.save(known), engine.save([*prompt(3, 200), *text])
    index = engine.store.nodes.state.index(NAMESPACE.digest)
    assert index is not None
    for node in (known_id, far_id):
        index.semantic.add(node, np.eye(1, 384, dtype=np.float32)[0])
    for seed in range(10, 20):  # more candidates by words than are looked at
        engine.save([*prompt(1, 20), *prompt(seed, 40)])
    plan = engine.serve([*prompt(2, 10), *prompt(1, 8), *prompt(30, 60), *text])
    assert far_id in plan.donors


# --- the process --------------------------------------------------------------------------------


def test_the_process_is_of_the_idle_class_and_ends_with_its_parent(tmp_path: Path) -> None:
    """Also one that is stopped: its parent may be killed at any moment."""
    code = (
        "import sys, time\n"
        "from kvshare_store.lookup.embedding_process import Wanted\n"
        "from kvshare_store.lookup.embedding_worker import EmbeddingWorker\n"
        f"worker = EmbeddingWorker([sys.executable, {str(SCRIPT)!r}, 'idle'])\n"
        "worker.ask(Wanted('', bytes(4)))\n"
        "while not worker.answered(1.0): pass\n"
        "worker.answer(); worker.pause(); print(worker.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        policy = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[38]
        assert int(policy) == 5, "SCHED_IDLE"
        wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
        parent.send_signal(signal.SIGKILL)
        child.wait(PATIENCE)


def test_a_process_that_was_stopped_while_it_began_ends_with_its_parent() -> None:
    """A stop right after the start must not come before it has asked the kernel for that."""
    code = (
        "import sys, time\n"
        "from kvshare_store.lookup.embedding_process import Wanted\n"
        "from kvshare_store.lookup.embedding_worker import EmbeddingWorker\n"
        f"worker = EmbeddingWorker([sys.executable, {str(SCRIPT)!r}, 'well'])\n"
        "worker.ask(Wanted('', bytes(4))); worker.pause()\n"
        "print(worker.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        try:
            child.wait(PATIENCE)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def test_a_process_that_begins_is_stopped_once_it_has() -> None:
    worker = EmbeddingWorker([sys.executable, str(SCRIPT), "well"])
    worker.ask(Wanted("", bytes(4)))
    worker.pause()
    assert worker.pid is not None
    child = psutil.Process(worker.pid)
    wait_for(lambda: worker.answered(0.1) or child.status() == psutil.STATUS_STOPPED)
    wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
    worker.resume()
    wait_for(lambda: worker.answered(0.1))
    worker.close()


def test_a_prompt_larger_than_a_pipe_waits_for_nobody(tmp_path: Path) -> None:
    worker = EmbeddingWorker([sys.executable, str(SCRIPT), "well"])
    worker.ask(Wanted("", np.arange(200_000, dtype=np.int32).tobytes()))
    worker.pause()
    assert not any(worker.answered(0.01) for _ in range(20))
    worker.resume()
    wait_for(lambda: worker.answered(0.1))
    vector = worker.answer()
    assert vector is not None
    assert vector.shape == (384,)
    worker.close()


def test_a_process_that_others_have_stopped_goes_on() -> None:
    worker = EmbeddingWorker([sys.executable, str(SCRIPT), "well"])
    worker.ask(Wanted("", bytes(4)))
    assert worker.pid is not None
    psutil.Process(worker.pid).suspend()
    assert not any(worker.answered(0.01) for _ in range(20))
    worker.resume()
    wait_for(lambda: worker.answered(0.1))
    worker.close()


def test_the_store_itself_loads_no_model() -> None:
    code = (
        "import sys; from kvshare_store import Store, StoreConfig, Namespace, KVLayout\n"
        "import tempfile, time; home = tempfile.mkdtemp()\n"
        "with Store(StoreConfig(home=home, host_bytes=1 << 20)) as store:\n"
        "    store.plan(range(64), Namespace('m', KVLayout(1, 1, 4, 'float16')))\n"
        "print([name for name in ('torch', 'sentence_transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- settings -----------------------------------------------------------------------------------


def test_always_without_the_library_is_said_at_once(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_vectors, "text_embeddings_installed", lambda: False)
    with pytest.raises(UnsupportedError, match=r"kvshare-store\[semantic\]"):
        Store(config(semantic="always"))
    with Store(config(semantic="auto")) as store:  # the home was not left locked
        engine = Driver(store, NAMESPACE)
        engine.save(prompt(0, 40))
        assert not text_thread_lives()


@pytest.mark.parametrize("content", [None, "not JSON", '{"version": "1.0"}'])
def test_without_a_tokenizer_there_is_no_text(
    config: Config, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    space = Namespace("m", KVLayout(2, 1, 4, "float32"), tokenizer=str(tmp_path))
    with Store(config(semantic="never", delimiters=True)) as store:
        engine = Driver(store, space)
        engine.save(range(40))
        assert engine.serve(range(40)).exact == 39


@pytest.mark.parametrize("folder", ["", "no\0path", "\ud800", "x" * 5000])
def test_a_folder_that_cannot_be_looked_at_has_no_tokenizer(folder: str) -> None:
    assert decode(folder, np.arange(3, dtype=np.int32)) is None


@pytest.mark.parametrize("how", ["nan", "long"])
def test_a_vector_that_is_none_costs_no_node(
    how: str, embedder: Callable[[str], None], open_store: Callable[..., Driver]
) -> None:
    embedder(how)
    engine = open_store()
    ids = [engine.save([1, *prompt(seed, 40)]) for seed in (1, 2, 3)]
    wait_for(lambda: sum(engine.store.stats()["errors"].values()) >= 3)
    assert vectors_of(engine) == 0
    bad = np.full(384, np.nan if how == "nan" else 3.0, np.float32)
    Rewriter(engine.store.repository).describe({str(node): bad for node in ids})
    assert vectors_of(engine) == 0
    again = open_store(semantic="never")
    assert (len(again.store.tree), again.store.stats()["errors"]) == (3, {})
