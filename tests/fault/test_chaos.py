"""Some kills of the kill test, and that it finds the errors it looks for."""

from __future__ import annotations

import fcntl
import multiprocessing
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
import torch

from kvshare_store.blocks.tiers.base import TierUse
from kvshare_store.blocks.tiers.disk.inventory import Inventory
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, ReusePlan
from kvshare_store.plan.editor import Editor
from kvshare_store.plan.spans import Span
from kvshare_store.store import Store
from kvshare_store.tensors.layout import DTypeName, KVLayout
from kvshare_store.tensors.rope import Rope
from tests.support.chaos.audit import Auditor
from tests.support.chaos.namespaces import possible
from tests.support.chaos.report import Report
from tests.support.chaos.rows import DescribedRows, WrongRowError, moved, quarter_turns
from tests.support.chaos.run import run
from tests.support.chaos.variants import variant
from tests.support.chaos.worker import Engine, Orders, guarded
from tests.support.daemons import Daemon
from tests.support.forking import IMPORTED_ONCE
from tests.support.needs import need
from tests.support.oracle import Driver, Rows, prompt
from tests.support.servers import RedisServer

pytestmark = pytest.mark.fault

SPACE = Namespace("chaos", KVLayout(2, 1, 16, "float32"))
OTHER = SPACE.for_tenant("other")
TOKENS = prompt(1, 40)
HOME_2 = Path(__file__).parent.parent / "data" / "home-2"
"""A home that the release before has written."""


def test_processes_are_forked_where_no_thread_runs() -> None:
    """Threads do not survive a fork, and a lock that one of them held stays locked."""
    modules = ["tests.support.chaos.__main__", *IMPORTED_ONCE]
    script = f"import sys, threading, {', '.join(modules)}; sys.exit(threading.active_count() - 1)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remote", "kills", "uncommon"),
    [
        ("none", 20, {"daemon before the next release", "client with foreign pid",
                      "daemon at the same path", "power"}),
        ("redis", 12, {"remote"}),
    ],
    ids=["none", "redis"],
)  # fmt: skip
def test_kills(remote: str, kills: int, uncommon: set[str]) -> None:
    """Every kind of kill occurs at least once, which takes twelve of them. The first store began as
    one of the release before."""
    need(remote == "none" or RedisServer.installed(), "redis-server")
    need(remote != "none" or possible(), "namespaces of the kernel")
    need(remote != "none" or shutil.which("strace") is not None, "strace")
    report = run(kills, seed=20, remote=remote, first=HOME_2 if remote == "none" else None)
    assert report.findings == [], "seed 20"
    assert report.kills.total() >= kills
    kinds = {"daemon", "daemon at start"}
    kinds |= {"client", "client with lease", "client with save", "client frozen"}
    assert set(report.kills) == kinds | uncommon
    assert report.rows > 500 * kills
    assert report.hits > 5 * kills
    assert report.durable > kills


class ClearedMeanwhile(Client):
    """The store is cleared after each list."""

    def call(self, message: protocol.Request, timeout: float | None = None) -> Any:
        answer = super().call(message, timeout)
        if isinstance(message, protocol.ListNodes):
            super().call(protocol.Clear(), timeout)
        return answer


def test_a_node_may_go_while_it_is_looked_at(config: StoreConfig) -> None:
    ours, theirs = multiprocessing.Pipe()
    with Daemon(config), ClearedMeanwhile(config.home_path) as client, ours, theirs:
        orders = Orders(theirs)
        guarded(orders, partial(Engine(client, [SPACE], orders).look_around, random.Random(0)))
        assert ours.recv() == ("refused", "node")


# --- rows that describe themselves ----------------------------------------------------------------


def planned(*spans: Span) -> ReusePlan:
    return ReusePlan(namespace=SPACE.digest, tokens=len(TOKENS), spans=spans)


def exact_rows() -> Rows:
    return DescribedRows(SPACE).computed(TOKENS, 40, "")


def test_the_rows_of_this_very_prefix_are_right() -> None:
    DescribedRows(SPACE).check(TOKENS, planned(Span(0, 39, 0, 0, 0, True)), exact_rows())


def test_a_row_that_moved_is_right_for_its_root() -> None:
    tokens = [1, 2, *TOKENS]
    rows = np.concatenate([np.zeros_like(exact_rows()[:, :, :2]), exact_rows()], axis=2)
    DescribedRows(SPACE).check(tokens, planned(Span(2, 38, 0, 0, 0)), rows)
    with pytest.raises(WrongRowError, match="computed at"):
        DescribedRows(SPACE).check(tokens, planned(Span(2, 38, 1, 0, 0)), rows)


def test_any_flipped_bit_is_found() -> None:
    plan, chance = planned(Span(0, 39, 0, 0, 0, True)), random.Random(1)
    edited = planned(Span(0, 39, 0, 0, 0))
    for _ in range(60):
        rows = exact_rows()
        at = tuple(chance.randrange(size) for size in rows[:, :, :39].shape)
        rows[at] ^= np.uint32(1 << chance.randrange(32))
        for asked in (plan, edited):
            with pytest.raises(WrongRowError):
                DescribedRows(SPACE).check(TOKENS, asked, rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: DescribedRows(OTHER).computed(TOKENS, 40, ""), "nobody computed"),
        (lambda: DescribedRows(SPACE).computed([*TOKENS[:5], 9, *TOKENS[6:]], 40, ""), "token 9"),
        (lambda: DescribedRows(SPACE).computed(TOKENS, 10, "salt"), "poses as exact"),
        (lambda: np.roll(exact_rows(), 1, axis=2), "got the row of token"),
        (lambda: np.zeros_like(exact_rows()), "token 0"),
    ],
)
def test_what_may_not_stand_there_is_refused(rows: Callable[[], Rows], message: str) -> None:
    with pytest.raises(WrongRowError, match=message):
        DescribedRows(SPACE).check(TOKENS, planned(Span(0, 39, 0, 0, 0, True)), rows())


def test_an_exact_row_of_another_prefix_is_refused() -> None:
    other = DescribedRows(SPACE).computed([7, *TOKENS[1:]], 40, "")
    rows = np.concatenate([exact_rows()[:, :, :1], other[:, :, 1:]], axis=2)
    with pytest.raises(WrongRowError, match="another prefix"):
        DescribedRows(SPACE).check(TOKENS, planned(Span(0, 39, 0, 0, 0, True)), rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_editor_turns_rows_as_the_oracle_does(dtype: DTypeName) -> None:
    layout = KVLayout(2, 2, 16, dtype)
    rows = DescribedRows(Namespace("chaos", layout)).computed(TOKENS, 40, "")
    cos, sin = quarter_turns(100, 16)
    editor = Editor(layout, Rope(torch.from_numpy(cos), torch.from_numpy(sin), neox=True))
    block = BlockRef("name", 40, rows.nbytes, 0)
    for shift in (0, 1, 2, 3, 5, -3):
        span = Span(10 + shift, 20, 10, 0, 10)
        edited = editor.edit([span], [block], lambda ref: rows.tobytes())
        words = edited.rows.view(torch.uint32 if layout.itemsize == 4 else torch.uint16).numpy()
        expected = moved(rows[:, :, 10:30], range(10, 30), range(10 + shift, 30 + shift))
        assert np.array_equal(words, expected)
        assert bool(shift) == (not np.array_equal(words, rows[:, :, 10:30]))


# --- what the auditor finds in a home -------------------------------------------------------------


@pytest.fixture
def config(home: Path) -> StoreConfig:
    tried = variant(random.Random(1), home, host_bytes=1 << 22, disk_bytes=1 << 26)
    with Store(tried.config) as store:
        driver = Driver(store, SPACE, DescribedRows(SPACE))
        for seed in range(3):
            driver.save(prompt(seed, 60))
            driver.serve_and_save([*prompt(seed, 60)[:30], 7, 8, 9, *prompt(seed, 60)[32:]])
    return tried.config


def audited(config: StoreConfig) -> tuple[set[str], Report]:
    report = Report(0)
    return Auditor(report, random.Random(0)).committed(config, [SPACE, OTHER]), report


def test_a_sound_home_has_nothing_wrong(config: StoreConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in config.home_path.rglob("*")}
    nodes, report = audited(config)
    assert len(nodes) == 6
    assert report.findings == []
    assert report.rows > 6 * 59
    assert {path: path.stat().st_mtime_ns for path in config.home_path.rglob("*")} == before


def test_a_home_is_copied_only_once_its_owner_is_gone(config: StoreConfig) -> None:
    """Files that a killed process is still removing must not vanish during the copy."""
    with (config.home_path / "lock").open("rb") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copying = pool.submit(audited, config)
        wait([copying], 0.2)
        assert not config.home_path.with_name("home-copy").exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        nodes, report = copying.result()
    assert (len(nodes), report.findings) == (6, [])


def test_a_missing_block_is_found(config: StoreConfig) -> None:
    next((config.home_path / "blocks").glob("*/*")).unlink()
    nodes, report = audited(config)
    assert len(nodes) < 6
    assert report.findings


def test_a_row_of_the_catalogue_that_does_not_verify_is_found(config: StoreConfig) -> None:
    nodes = lancedb.connect(str(config.home_path / "catalog")).open_table("nodes")
    nodes.update(where="true", values={"namespace": OTHER.digest})
    _, report = audited(config)
    assert report.problems


def test_bytes_that_the_disk_tier_does_not_count_are_found(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inventory, "counted", lambda _: TierUse(7, config.disk_bytes, 6))
    _, report = audited(config)
    assert any("counts 7 bytes" in finding for finding in report.problems)


def test_rows_that_nobody_computed_are_found(home: Path, config: StoreConfig) -> None:
    """As if a store confused blocks: the files are sound, the rows are wrong."""
    with Store(config) as store:
        driver = Driver(store, SPACE, DescribedRows(OTHER))
        driver.save(prompt(9, 60))
    _, report = audited(config)
    assert any("nobody computed" in finding for finding in report.wrong_rows)


def test_a_node_that_serves_less_than_it_should_is_lost(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Auditor, "_compare", lambda *_: 3)
    _, report = audited(config)
    assert report.lost_nodes
