"""What a daemon exposes to Prometheus, compared with what happened to it."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.blocks.tiers.breaker import Breaker
from kvshare_store.blocks.tiers.remote import RemoteTier
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import UnavailableError
from kvshare_store.namespace import Namespace
from kvshare_store.observability.exposition import FAMILIES, exposition
from kvshare_store.observability.version import version
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.save.staging import Reuse
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.daemon.test_exposition_quality import COMPARED
from tests.support.daemons import ClientDriver, Daemon
from tests.support.documents import ROOT
from tests.support.exposition import Exposed, unread
from tests.support.neighbours import until
from tests.support.oracle import Driver, prompt
from tests.support.peer import Peer

ACME = Namespace("model", KVLayout(2, 1, 4, "float32"), tenant="acme")
OTHER = Namespace("model", KVLayout(2, 1, 4, "float32"), tenant="other")
ROW = ACME.layout.row_bytes
LOADED_S = 0.003
Config = Callable[..., StoreConfig]


@pytest.fixture
def tenant_key(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_text("ab" * 32)
    path.chmod(0o600)
    return f"file:{path}"


def outcome(plan: ReusePlan) -> Outcome:
    """All of the plan is loaded."""
    continued = max(0, plan.continued - plan.exact)
    edited = plan.reused - plan.exact - continued
    left, nbytes = plan.tokens - plan.reused, plan.reused * ROW
    return Outcome(plan.exact, edited, left, nbytes, LOADED_S, continued=continued)


class Script:
    """A workload, and what it must have counted."""

    def __init__(self, daemon: Daemon, client: Client) -> None:
        self.daemon, self.client, self.began = daemon, client, time.time()
        self.engines = {space.tenant: ClientDriver(client, space) for space in (ACME, OTHER)}
        self.lookups = 0
        self.asked = 0
        """Tokens, of all lookups."""
        self.outcomes: list[Outcome] = []
        self.missed = dict.fromkeys(self.engines, 0)
        """Tokens."""
        self.saved: dict[str, list[int]] = {}
        self.others = ""
        """The other tenant's node."""
        self.promoted = 0
        """Blocks that came back from below."""

    def plan(self, tokens: list[int], tenant: str = "acme") -> ReusePlan:
        self.lookups += 1
        self.asked += len(tokens)
        return self.engines[tenant].plan(tokens)

    def serve(self, tokens: list[int], tenant: str = "acme") -> ReusePlan:
        plan = self.plan(tokens, tenant)
        if plan.declined:
            self.missed[tenant] += len(tokens)
        else:
            self.outcomes.append(outcome(plan))
            self.client.finish(plan.lease, self.outcomes[-1])
        return plan

    def save(self, tokens: list[int], plan: ReusePlan | None = None, tenant: str = "acme") -> None:
        node = self.engines[tenant].save(tokens, plan)
        assert node is not None
        self.saved[node] = tokens
        self.others = self.others or (node if tenant == OTHER.tenant else "")
        self.client.flush()

    def run(self) -> None:
        """Requests of every kind, a full host tier, a block that goes bad on disk, somebody who
        does not say hello; a plan and a save that do not end."""
        first = prompt(1, 40)
        edited = [*first[:16], *prompt(2, 4), *first[20:]]
        assert self.serve(first).declined == "empty_store"
        self.save(first)
        self.serve(first)
        self.save(edited, self.serve(edited))
        self.serve([*edited, *prompt(3, 8)])
        self.serve(first, "other")
        self.save(first, tenant="other")
        self.client.call(protocol.EngineCached(16))  # of a prompt that was missed
        self.client.call(protocol.Decline("policy_off", 30))
        self.client.call(protocol.Failed("lease"))
        with Peer(self.daemon.config.home_path) as peer:
            assert peer.ask(protocol.Stats()).error == "protocol"
        while not self.client.stats()["evicted"]:
            self.save(prompt(1000 + len(self.saved), 400))
        self.read_what_went_bad()
        self.plan(first)
        self.client.stage(np.asarray(prompt(9, 40), np.int32), ACME, Reuse())

    def read_what_went_bad(self) -> None:
        """A prompt whose blocks have left shared memory; one of them is wrong on disk."""
        home = self.daemon.config.home_path
        for node, tokens in self.saved.items():
            gone = [block["name"] for block in self.blocks(node) if block["tier"] == "disk"]
            if gone and node != self.others:
                (bad,) = home.glob(f"blocks/*/{gone[0]}.kvb")
                bad.write_bytes(b"bad" + bad.read_bytes()[3:])
                assert self.serve(tokens).exact == len(tokens) - 1
                self.promoted = len(gone)
                until(bad.exists)  # copied from the remote, behind the answer
                return
        raise AssertionError("nothing has left shared memory")

    def blocks(self, node: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.call(protocol.ShowNode(node))["blocks"]
        return found

    def rows(self) -> dict[str, int]:
        """Rows of each block that is stored."""
        rows: dict[str, int] = {}
        for node in self.saved:
            for block in self.blocks(node):
                rows[block["name"]] = max(rows.get(block["name"], 0), block["rows"])
        return rows


@pytest.fixture
def script(config: Config, tmp_path: Path, tenant_key: str) -> Iterator[Script]:
    settings = config(
        remote=f"file://{tmp_path / 'remote'}",
        remote_write="through",
        remote_timeout_ms=5_000.0,
        tenant_key=tenant_key,
        gc_seconds=0.2,
    )
    with Daemon(settings) as daemon, Client(settings.home_path, timeout=60) as client:
        yield Script(daemon, client)


Labelled = dict[tuple[str, ...], float]


def expected(script: Script, tmp_path: Path) -> dict[str, Labelled]:
    """Every sample that is not zero, by metric and labels; of histograms the counts. Metrics of
    answers and of second looks have a workload of their own (`test_exposition_quality.py`)."""
    rows, served = script.rows(), script.outcomes
    reused = Counter[str]()
    for each in served:
        reused.update(each.reused._asdict())
    left = sum(each.recomputed for each in served)
    hits = Counter(each.reused.kind for each in served)
    return {
        "kvshare_build_info": {(version(), "aggressive"): 1},
        **requests(script, hits, reused, left),
        "kvshare_save_seconds": {(): len(script.saved)},
        "kvshare_stored_bytes_total": {(): ROW * sum(rows.values())},
        "kvshare_staged_saves": {(): 1},
        "kvshare_nodes": {(): len(script.saved)},
        "kvshare_blocks": {(): len(rows)},
        "kvshare_leases": {(): 1},
        "kvshare_reserved_slots": {},
        "kvshare_catalog_bytes": {(): bytes_in(script.daemon.config.home_path / "catalog")},
        **tiers(script, rows, tmp_path),
        "kvshare_healthy": {(): 1},
        "kvshare_part_failing": {},
        "kvshare_part_failures_total": {},
        "kvshare_thread_alive": {(f"kvshare-{part}",): 1 for part in ("commit", "io", "janitor")},
        "kvshare_errors_total": {("corrupt",): 1, ("lease",): 1},
        "kvshare_commit_refused_total": {},
        "kvshare_connections": {(): 1},
        "kvshare_requests_in_progress": {(): 1},
        "kvshare_waiting_requests": {},
        "kvshare_draining": {},
        "kvshare_text_vectors_waiting": {},
        "kvshare_cut_off_total": {(): 1},
        **namespaces(script, rows, hits, reused, left),
    }


def requests(
    script: Script, hits: Counter[str], reused: Counter[str], left: int
) -> dict[str, Labelled]:
    missed = sum(script.missed.values())
    tokens = {**reused, "not_reused": left + missed + 30}
    return {
        "kvshare_lookups_total": {(): script.lookups + 1},
        "kvshare_requests_total": {**by(hits), ("miss",): 3},
        "kvshare_declined_total": {("empty_store",): 2, ("policy_off",): 1},
        "kvshare_requested_tokens_total": {(): script.asked + 30},
        "kvshare_tokens_total": by(tokens),
        "kvshare_engine_cached_tokens_total": {(): 16},
        "kvshare_loaded_bytes_total": {(): sum(each.nbytes for each in script.outcomes)},
        "kvshare_lookup_seconds": {(): script.lookups},
        "kvshare_load_seconds": {(): len(script.outcomes)},
    }


def tiers(script: Script, rows: dict[str, int], tmp_path: Path) -> dict[str, Labelled]:
    disk = bytes_in(script.daemon.config.home_path / "blocks")
    catalog = bytes_in(script.daemon.config.home_path / "catalog")
    back = script.promoted
    blocks = {
        ("new", "host"): len(rows), ("host", "disk"): len(rows), ("host", "remote"): len(rows),
        ("disk", "host"): back - 1, ("remote", "host"): 1, ("remote", "disk"): 1,
    }  # fmt: skip
    everything, full = ROW * sum(rows.values()), ROW * script.daemon.config.block_tokens
    return {
        "kvshare_tier_bytes": {
            ("disk",): disk + catalog,
            ("remote",): bytes_in(tmp_path / "remote" / "blocks"),
        },
        "kvshare_tier_budget_bytes": {("host",): 1 << 20, ("disk",): 1 << 24},
        "kvshare_tier_blocks": {("disk",): len(rows), ("remote",): len(rows)},
        "kvshare_moved_blocks_total": {move: count for move, count in blocks.items() if count},
        "kvshare_moved_bytes_total": {
            move: everything if count == len(rows) else count * full
            for move, count in blocks.items()
            if count
        },
        "kvshare_quarantined_blocks_total": {("disk",): 1},
        "kvshare_tier_retries_total": {},
        "kvshare_tier_hedged_reads_total": {},
        "kvshare_tier_refused_calls_total": {},
        "kvshare_tier_breaker_state": {("remote", "closed"): 1},
    }


def namespaces(
    script: Script, rows: dict[str, int], hits: Counter[str], reused: Counter[str], left: int
) -> dict[str, Labelled]:
    acme, other = ((space.digest[:12], space.tenant, "model") for space in (ACME, OTHER))
    unknown = ("other", "", "")  # what comes before a namespace's first prompt is saved
    tokens = {**reused, "not_reused": left}
    return {
        "kvshare_namespace_requests_total": {
            **{(*acme, kind): count for kind, count in hits.items()},
            (*unknown, "miss"): 2,
        },
        "kvshare_namespace_tokens_total": {
            **{(*acme, kind): count for kind, count in tokens.items()},
            (*unknown, "not_reused"): sum(script.missed.values()),
        },
        "kvshare_namespace_nodes": {acme: len(script.saved) - 1, other: 1},
        "kvshare_namespace_bytes": {
            acme: ROW * (sum(rows.values()) - 40),
            other: ROW * 40,
        },
    }


def by(counts: dict[str, int]) -> Labelled:
    return {(name,): count for name, count in counts.items()}


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def of_one_moment(script: Script, tmp_path: Path) -> tuple[dict[str, Labelled], Exposed]:
    """What is expected, and what is exposed while the janitor does not compact the catalogue."""
    catalog = script.daemon.config.home_path / "catalog"
    while True:
        before = bytes_in(catalog)
        found = expected(script, tmp_path), Exposed(exposition(script.client.stats()).decode())
        if bytes_in(catalog) == before:
            return found


def test_every_metric_is_what_happened(script: Script, tmp_path: Path) -> None:
    script.run()
    wanted, exposed = of_one_moment(script, tmp_path)
    labels = {family.name: family.labels for family in FAMILIES}
    found = {name: exposed.by(name, *labels[name]) for name in wanted}
    for family in FAMILIES:
        if family.kind == "histogram":
            found[family.name] = exposed.by(f"{family.name}_count")
    host = found["kvshare_tier_blocks"].pop(("host",))
    assert 0.9 < found["kvshare_tier_bytes"].pop(("host",)) / (1 << 20) <= 1
    assert found == wanted
    moved = exposed.total("kvshare_moved_blocks_total", target="host")
    assert exposed.by("kvshare_evicted_blocks_total", "tier") == {("host",): moved - host}
    check_times(script, exposed)
    others = {
        "kvshare_start_time_seconds", "kvshare_part_last_success_timestamp_seconds",
        "kvshare_commit_queue_length", "kvshare_commit_busy_seconds",
        "kvshare_evicted_blocks_total",
    }  # fmt: skip
    assert wanted.keys() | others | COMPARED == {family.name for family in FAMILIES}
    assert unread(script.client.stats()) == set(), "the other way round; see also scores"


def check_times(script: Script, exposed: Exposed) -> None:
    now = time.time()
    loads = len(script.outcomes)
    assert exposed.value("kvshare_load_seconds_bucket", le="0.002") == 0
    assert exposed.value("kvshare_load_seconds_bucket", le="0.005") == loads
    assert exposed.value("kvshare_load_seconds_sum") == pytest.approx(loads * LOADED_S)
    for name in ("lookup", "save"):
        assert 0 < exposed.value(f"kvshare_{name}_seconds_sum") < now - script.began
    for part in ("kvshare-commit", "kvshare-janitor"):
        well = exposed.value("kvshare_part_last_success_timestamp_seconds", part=part)
        assert script.began < well <= now
    assert script.began - 60 < exposed.value("kvshare_start_time_seconds") < now


# --- trouble ------------------------------------------------------------------------------------


def scrape(store: Store) -> Exposed:
    return Exposed(exposition(store.stats()).decode())


def test_a_remote_that_does_not_answer(
    driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting = partial(Breaker, pause_s=3600.0)  # it stays open, however slow this machine is
    monkeypatch.setattr("kvshare_store.blocks.tiers.wrappers.Breaker", lasting)
    engine = driver(remote=f"file://{tmp_path / 'remote'}", remote_write="through")
    calls = itertools.count()

    async def refused(self: RemoteTier, name: str, block: object) -> None:
        next(calls)
        raise UnavailableError("nobody answers")

    monkeypatch.setattr(RemoteTier, "put", refused)
    for number in range(5):  # three failures open the breaker
        engine.save(prompt(number, 8))
        engine.store.flush()
    exposed = scrape(engine.store)
    assert exposed.by("kvshare_tier_breaker_state", "tier", "state") == {("remote", "open"): 1}
    assert exposed.value("kvshare_tier_retries_total", tier="remote") == next(calls) - 3
    assert exposed.value("kvshare_tier_refused_calls_total", tier="remote") == 2
    assert exposed.value("kvshare_errors_total", kind="unavailable") == 5
    assert exposed.by("kvshare_moved_blocks_total", "source", "target") == {
        ("new", "host"): 5,
        ("host", "disk"): 5,
    }


def test_a_committer_that_hangs(driver: Callable[..., Driver]) -> None:
    store = driver().store
    queue, released = store.repository.queue, threading.Event()
    hung = queue.call(lambda: released.wait(60))
    until(lambda: scrape(store).value("kvshare_commit_busy_seconds") > 0)
    waiting = [queue.call(lambda: None) for _ in range(3)]
    exposed = scrape(store)
    assert exposed.value("kvshare_commit_queue_length") == 3
    assert exposed.value("kvshare_thread_alive", part="kvshare-commit") == 1
    released.set()
    assert all(done.result(60) is None for done in waiting)
    assert hung.result(60)
    until(lambda: scrape(store).value("kvshare_commit_busy_seconds") == 0)


def test_a_part_that_fails(driver: Callable[..., Driver]) -> None:
    store = driver().store
    health = store.metrics.health
    for _ in range(2):
        health.failed("kvshare-commit", OSError("no"))
    exposed = scrape(store)
    assert exposed.value("kvshare_healthy") == 0
    assert exposed.value("kvshare_part_failing", part="kvshare-commit") == 1
    assert exposed.value("kvshare_part_failing", part="kvshare-io") == 0
    assert exposed.value("kvshare_part_failures_total", part="kvshare-commit") == 2
    health.well("kvshare-commit")
    exposed = scrape(store)
    assert exposed.value("kvshare_healthy") == 1
    assert exposed.value("kvshare_part_failing", part="kvshare-commit") == 0


# --- tenants ------------------------------------------------------------------------------------


def test_a_salt_that_proves_nothing_is_not_shown(config: Config) -> None:
    """Whoever knows it gets in."""
    with Store(config()) as store:
        Driver(store, ACME).save(prompt(1, 40))
        text = exposition(store.stats()).decode()
    assert "acme" not in text
    assert Exposed(text).value("kvshare_namespace_nodes", namespace=ACME.digest[:12]) == 1


def test_a_purge_leaves_no_series(config: Config, tenant_key: str) -> None:
    with Store(config(tenant_key=tenant_key)) as store:
        Driver(store, ACME).serve_and_save(prompt(1, 40))
        assert "acme" in exposition(store.stats()).decode()
        store.purge(tenant="acme")
        text = exposition(store.stats()).decode()
    assert "acme" not in text
    assert ACME.digest[:12] not in text


def test_names_of_tenants_cannot_break_the_format(config: Config, tenant_key: str) -> None:
    hostile = 'a"} 1\nkvshare_healthy 0 # \\'
    space = msgspec.structs.replace(ACME, tenant=hostile)
    with Store(config(tenant_key=tenant_key)) as store:
        Driver(store, space).save(prompt(1, 40))
        exposed = scrape(store)
    assert exposed.value("kvshare_namespace_nodes", tenant=hostile) == 1
    assert exposed.value("kvshare_healthy") == 1


# --- documents ----------------------------------------------------------------------------------


def test_every_name_in_a_query_exists() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    known = {family.name for family in FAMILIES}
    known |= {f"{family.name}_bucket" for family in FAMILIES if family.kind == "histogram"}
    named = set(re.findall(r"(?<![:\w])kvshare_\w+", page.split("## What to watch")[1]))
    assert named
    assert named <= known


def test_the_store_does_without_the_library() -> None:
    program = """
import sys
sys.modules["prometheus_client"] = None
import kvshare_store.daemon.server
from kvshare_store.errors import UnsupportedError
try:
    import kvshare_store.observability.exposition
except UnsupportedError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stderr == ""
    assert "pip install 'kvshare-store[metrics]'" in ended.stdout
