"""Store.plan, save, commit, evict, stats: what they answer and what they count."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.errors import ConfigError, LeaseError, NamespaceError, PlanError
from kvshare_store.namespace import Namespace
from kvshare_store.observability.version import version
from kvshare_store.plan import Outcome
from kvshare_store.plan.spans import Span
from kvshare_store.save.staging import Buffer, Reuse, Staged, reuse_of
from kvshare_store.store import Store
from tests.support.edits import apply_edits
from tests.support.faulty import SlowTier
from tests.support.oracle import Driver, pick, prompt, rows_for

Open = Callable[..., Driver]
ROW = 64


def edited(tokens: list[int], at: int, gone: int, added: list[int]) -> list[int]:
    return tokens[:at] + added + tokens[at + gone :]


def identity(store: Store) -> None:
    """Every lookup has ended once, or is still open."""
    stats = store.stats()
    ended = (
        sum(stats[f"hits_{kind}"] for kind in ("exact", "continued", "edited")) + stats["misses"]
    )
    assert stats["lookups"] == ended + stats["leases"]
    assert sum(stats["declined"].values()) == stats["misses"]


# --- plan and load ------------------------------------------------------------------------------


def test_a_prompt_is_served_again(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 40)
    assert engine.plan(tokens).declined == "empty_store"
    assert engine.save(tokens)
    plan = engine.serve(tokens)
    assert (plan.exact, plan.reused, plan.generation, plan.policy) == (39, 39, 0, "aggressive")
    stats = engine.store.stats()
    assert stats["lookups"] == 2
    assert (stats["hits_exact"], stats["hits_edited"], stats["misses"]) == (1, 0, 1)
    assert stats["declined"] == {"empty_store": 1}
    assert stats["tokens_requested"] == 80
    assert stats["tokens_reused_exact"] == 39
    assert stats["tokens_recomputed"] == 41
    assert stats["bytes_loaded"] == 39 * ROW
    assert stats["bytes_stored"] == 40 * ROW
    assert (stats["nodes"], stats["blocks"], stats["leases"]) == (1, 5, 0)
    assert all(stats["seconds"][name]["p50"] > 0 for name in ("lookup", "load", "save"))
    identity(engine.store)


def test_an_edited_prompt_is_served_from_the_original(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 80)
    engine.save(tokens)
    changed = edited(tokens, 30, 3, [7, 8])
    plan = engine.serve(changed)
    assert (plan.exact, plan.generation, plan.reused) == (30, 1, 76)
    assert engine.store.stats()["hits_edited"] == 1
    assert engine.store.stats()["tokens_reused_edited"] == 46
    identity(engine.store)


def test_what_came_from_edits_is_never_an_exact_prefix(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 80)
    engine.save(tokens)
    changed = edited(tokens, 30, 0, [7, 8])
    node = engine.store.tree.get(engine.serve_and_save(changed) or "")
    assert node is not None
    # the two inserted tokens were computed in their own full context, what follows was not
    assert (node.exact, node.generation, node.exact_rows) == (False, 1, 32)
    again = engine.serve(changed, policy="exact")
    assert (again.exact, again.reused) == (32, 32)
    engine.save(changed)
    exact = engine.serve(changed, policy="exact")
    assert (exact.exact, exact.reused, exact.generation) == (81, 81, 0)


def test_an_exact_node_takes_the_place_of_the_edited_one(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 80)
    engine.save(tokens)
    changed = edited(tokens, 30, 1, [7])
    approximate = engine.serve_and_save(changed)
    exact = engine.save(changed)
    engine.store.flush()
    assert approximate not in engine.store.tree
    assert exact in engine.store.tree
    assert engine.store.stats()["nodes"] == 2
    assert engine.stage(changed).known
    plan = engine.plan(edited(tokens, 20, 1, [9]))
    staged = engine.stage(changed, None)
    assert staged.known, "the exact node makes saving the edited one pointless"
    engine.finish(plan)


def test_a_child_stores_only_its_fresh_rows(driver: Open) -> None:
    engine = driver(edit_window=2)
    tokens = prompt(1, 160)
    parent = engine.save(tokens)
    before = engine.store.stats()
    changed = edited(tokens, 100, 4, [1, 2, 3])
    plan = engine.plan(changed)
    fresh = plan.tokens - plan.reused
    assert fresh == 3 + 2 + 1
    engine.finish(plan)
    child = engine.store.tree.get(engine.save(changed, plan) or "")
    after = engine.store.stats()
    assert after["bytes_stored"] - before["bytes_stored"] == fresh * ROW
    assert after["blocks"] - before["blocks"] == 1
    assert child is not None
    assert child.parent == parent
    there = engine.store.tree.get(parent or "")
    assert there is not None
    assert apply_edits(child.edits, there.tokens).tolist() == changed
    assert engine.store.tree.children(there.id) == [child.id]


def test_a_row_moved_twice_still_points_to_where_it_was_computed(driver: Open) -> None:
    engine = driver(max_generation=3, eviction="lru")
    tokens = prompt(1, 80)
    engine.save(tokens)
    first = edited(tokens, 30, 0, [7, 7, 7])
    second = edited(first, 10, 0, [8, 8])
    engine.serve_and_save(first)
    engine.store.evict(nodes=1)  # the original leaves the tree, its blocks stay with the child
    plan = engine.plan(second)
    assert plan.generation == 2
    assert {span.start - span.source for span in plan.spans if span.start > 40} == {5}
    engine.finish(plan)


def test_generations_stop_at_the_cap(driver: Open) -> None:
    engine = driver(max_generation=2)
    tokens = prompt(1, 80)
    engine.save(tokens)
    chain = [tokens]
    for step in range(4):
        chain.append(edited(chain[-1], 10 * step + 5, 1, [step]))
        engine.serve_and_save(chain[-1])
        engine.store.evict(nodes=1)
    generations = [node.generation for node in engine.store.tree]
    assert max(generations, default=0) <= 2


@pytest.mark.parametrize(
    "tokens",
    [[1.5], [-1], [2**31], [[1, 2]], ["a"]],
    ids=["float", "negative", "large", "2d", "text"],
)
def test_what_is_no_prompt_is_no_lookup(driver: Open, namespace: Namespace, tokens: Any) -> None:
    engine = driver()
    with pytest.raises(PlanError):
        engine.store.plan(tokens, namespace)
    with pytest.raises(PlanError):
        engine.store.stage(tokens, namespace)
    assert engine.store.stats()["lookups"] == 0


def test_prompts_may_come_as_lists_and_as_arrays(driver: Open, namespace: Namespace) -> None:
    engine = driver()
    tokens = prompt(1, 40)
    engine.save(tokens)
    for given in (tokens, tuple(tokens), np.asarray(tokens), np.asarray(tokens, np.int32)[:]):
        plan = engine.store.plan(given, namespace)
        assert plan.exact == 39
        engine.finish(plan)


def _everything_on_disk(home: Path) -> dict[Path, tuple[int, int]]:
    files = (path for path in home.rglob("*") if path.is_file())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_planning_writes_nothing(driver: Open, namespace: Namespace, home: Path) -> None:
    engine = driver()
    tokens = prompt(1, 60)
    engine.save(tokens)
    engine.store.flush()
    before = _everything_on_disk(home)
    engine.serve(tokens)
    engine.serve(edited(tokens, 20, 1, [5]))
    engine.serve(prompt(2, 60))
    for tenant in range(5):
        engine.store.plan(tokens, namespace.for_tenant(str(tenant)))
    engine.store.flush()
    assert _everything_on_disk(home) == before


# --- policies -----------------------------------------------------------------------------------


def test_a_request_may_be_stricter_and_never_laxer(driver: Open) -> None:
    engine = driver(policy="balanced")
    tokens = prompt(1, 200)
    engine.save(tokens)
    changed = edited(tokens, 50, 1, [5])
    usual = engine.serve(changed)
    assert usual.policy == "balanced"
    lax = engine.serve(changed, policy="aggressive")
    assert (lax.policy, lax.spans) == ("balanced", usual.spans)
    faithful = engine.serve(changed, policy="faithful")
    assert faithful.policy == "faithful"
    assert faithful.reused < usual.reused
    exact = engine.serve(changed, policy="exact")
    assert (exact.exact, exact.reused) == (50, 50)
    assert engine.serve(changed, policy="off").declined == "policy_off"
    with pytest.raises(ConfigError):
        engine.plan(changed, policy="reckless")
    identity(engine.store)


def test_no_saving_is_declined(driver: Open) -> None:
    engine = driver(min_saving_ms=5.0)
    tokens = prompt(1, 40)
    engine.save(tokens)
    engine.store.costs.of(engine.namespace.model_digest).prefill.value = 1e6
    assert engine.plan(tokens).declined == "no_saving"
    engine.store.costs.of(engine.namespace.model_digest).prefill.value = 1e3
    assert engine.serve(tokens).exact == 39


def test_loads_are_measured_at_the_tier_they_came_from(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 40)
    engine.save(tokens)
    much = Outcome(exact=39, nbytes=39 * ROW, seconds=0.9)
    for rate in engine.store.costs.load.values():
        rate.smallest = 1
    before = {name: rate.value for name, rate in engine.store.costs.load.items()}
    engine.store.finish(engine.plan(tokens), much)
    assert engine.store.costs.load["host"].value != before["host"]
    assert engine.store.costs.load["disk"].value == before["disk"]
    engine = driver()
    for rate in engine.store.costs.load.values():
        rate.smallest = 1
    engine.serve(tokens[:20])  # only these blocks are brought into memory
    before = {name: rate.value for name, rate in engine.store.costs.load.items()}
    engine.store.finish(engine.plan(tokens), much)
    # the first blocks were in memory, the others were not
    assert engine.store.costs.load["host"].value == before["host"]
    assert engine.store.costs.load["disk"].value != before["disk"]


# --- save and commit ----------------------------------------------------------------------------


def test_rows_are_packed_block_by_block(driver: Open, namespace: Namespace) -> None:
    engine = driver()
    tokens = prompt(1, 20)
    staged = engine.store.stage(tokens, namespace)
    assert (staged.sizes, staged.rows) == ((8, 8, 4), 20)
    rows = rows_for(tokens, namespace.layout)
    blocks = [pick(rows, range(at, min(at + 8, 20))) for at in (0, 8, 16)]
    engine.book.write(tokens, rows, range(20), 20)
    assert engine.plan(tokens).declined == "empty_store"
    assert engine.store.commit(staged.id, Buffer(b"".join(blocks)))
    assert engine.serve(tokens).exact == 19


def test_a_prompt_is_stored_once(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 40)
    first = engine.stage(tokens)
    assert engine.stage(tokens) == Staged(known=True), "somebody is saving it already"
    engine.commit(first)
    assert engine.stage(tokens) == Staged(known=True)
    assert engine.store.stats()["bytes_stored"] == 40 * ROW
    assert engine.stage(tokens[:7]).known, "short prompts are not stored"


def test_an_abandoned_save_leaves_nothing(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 40)
    staged = engine.stage(tokens)
    assert engine.stage(tokens).known
    engine.store.abandon(staged.id)
    engine.store.abandon(staged.id)
    assert engine.store.stats()["tiers"]["host"]["bytes"] == 0
    with pytest.raises(LeaseError):
        engine.commit(staged)
    assert engine.save(tokens)


def test_a_commit_happens_once(driver: Open) -> None:
    engine = driver()
    staged = engine.stage(prompt(1, 40))
    assert engine.commit(staged)
    with pytest.raises(LeaseError):
        engine.commit(staged)
    engine.store.abandon(staged.id)
    assert engine.serve(prompt(1, 40)).exact == 39


@pytest.mark.parametrize("rows", [0, 1, 39, 41])
def test_the_wrong_number_of_rows(driver: Open, namespace: Namespace, rows: int) -> None:
    engine = driver()
    with pytest.raises(NamespaceError):
        engine.store.save(prompt(1, 40), namespace, bytes(rows * ROW))
    assert engine.store.stats()["tiers"]["host"]["bytes"] == 0
    assert engine.save(prompt(1, 40))


def test_equal_blocks_are_stored_once(driver: Open, home: Path) -> None:
    engine = driver()
    tokens = prompt(1, 40)
    engine.save(tokens)
    engine.save(tokens[:16] + prompt(2, 24))  # saved in full, without a plan
    engine.store.flush()
    assert engine.store.stats()["blocks"] == 8
    assert len(list((home / "blocks").glob("*/*"))) == 8
    assert engine.store.stats()["tiers"]["host"]["blocks"] == 8


def test_rows_that_left_meanwhile_make_no_node(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 80)
    engine.save(tokens)
    changed = edited(tokens, 30, 1, [7])
    plan = engine.plan(changed)
    staged = engine.stage(changed, plan)
    engine.finish(plan)
    engine.store.clear()
    assert engine.commit(staged) is None
    stats = engine.store.stats()
    assert stats["nodes"] == 0
    assert stats["errors"] == {"missing": 1}
    engine.store.flush()
    assert stats["tiers"]["host"]["bytes"] == 0
    assert engine.save(changed)


def test_a_plan_keeps_the_rows_that_its_request_builds_on(driver: Open) -> None:
    engine = driver()
    tokens = prompt(1, 80)
    engine.save(tokens)
    changed = edited(tokens, 30, 1, [7])
    plan = engine.plan(changed)
    engine.store.clear()
    assert engine.save(changed, plan)
    engine.finish(plan)
    engine.store.flush()
    assert engine.serve(changed).reused > 70


def test_a_block_that_is_wanted_again_is_not_deleted(driver: Open) -> None:
    """The deletion was ordered before the block was wanted again, and is carried out after."""
    engine = driver()
    tokens = prompt(1, 40)
    engine.save(tokens)
    engine.store.flush()
    gate = _hold_the_committer(engine.store)
    engine.store.evict(nodes=1)
    engine.save(tokens)
    gate()
    engine.store.flush()
    assert engine.store.stats()["errors"] == {}
    assert engine.serve(tokens).exact == 39
    assert driver().serve(tokens).exact == 39


def _hold_the_committer(store: Store) -> Callable[[], None]:
    """Pause the committer thread before its next piece of work; calling the result resumes it."""
    go = threading.Event()
    store.repository.queue.call(lambda: go.wait(30))
    return go.set


# --- saves that contradict themselves -----------------------------------------------------------


def test_edited_rows_cannot_make_an_exact_node(driver: Open, namespace: Namespace) -> None:
    engine = driver()
    tokens = prompt(1, 80)
    engine.save(tokens)
    changed = edited(tokens, 30, 1, [7])
    plan = engine.plan(changed)
    posing = msgspec.structs.replace(reuse_of(plan), generation=0)
    with pytest.raises(PlanError):
        engine.store.stage(changed, namespace, posing)
    engine.finish(plan)
    assert engine.store.stats()["nodes"] == 1
    assert engine.save(changed), "the failed save left the prompt free"


@pytest.mark.parametrize(
    "spans",
    [
        (Span(0, 50, 0, 0, 0, True),),
        (Span(0, 8, 0, 9, 0, True),),
        (Span(8, 8, 8, 1, 0), Span(0, 8, 0, 0, 0)),
        (Span(8, 8, 0, 1, 0, True),),
    ],
    ids=["too long", "no such block", "out of order", "moved yet exact"],
)
def test_reuse_that_does_not_fit(
    driver: Open, namespace: Namespace, spans: tuple[Span, ...]
) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    plan = engine.plan(prompt(1, 40))
    reuse = Reuse(spans, tuple(ref.name for ref in plan.blocks), plan.donors, plan.generation)
    before = engine.store.stats()["tiers"]["host"]["bytes"]
    with pytest.raises(PlanError):
        engine.store.stage(prompt(1, 32) + prompt(2, 8), namespace, reuse)
    engine.finish(plan)
    assert engine.store.stats()["tiers"]["host"]["bytes"] == before


# --- namespaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "b"},
        {"lora": "adapter"},
        {"revision": "2"},
        {"model": "other"},
        {"ranks": "tp2:0"},
        {"rope": "yarn"},
        {"kv_dtype": "fp8"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_namespaces_never_share(driver: Open, namespace: Namespace, change: dict[str, str]) -> None:
    engine = driver()
    tokens = prompt(1, 40)
    engine.save(tokens)
    other = Driver(engine.store, msgspec.structs.replace(namespace, **change))
    assert other.plan(tokens).declined == "empty_store"
    assert other.save(tokens), "what one namespace knows, the other must store for itself"
    engine.store.flush()
    mine, theirs = list(engine.store.tree)
    assert not set(mine.blocks) & set(theirs.blocks)
    assert other.serve(tokens).exact == 39
    assert engine.store.evict(namespace=namespace.digest) == 1
    assert engine.plan(tokens).declined == "empty_store"
    assert other.serve(tokens).exact == 39


def test_rows_of_another_namespace_cannot_be_built_on(driver: Open, namespace: Namespace) -> None:
    engine = driver()
    tokens = prompt(1, 40)
    engine.save(tokens)
    plan = engine.plan(tokens)
    stranger = namespace.for_tenant("stranger")
    with pytest.raises(NamespaceError):
        engine.store.stage(tokens, stranger, reuse_of(plan))
    engine.finish(plan)
    assert engine.store.plan(tokens, stranger).declined == "empty_store"


def test_another_tokenizer_is_the_same_namespace(driver: Open, namespace: Namespace) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    same = Driver(engine.store, msgspec.structs.replace(namespace, tokenizer="/x"), engine.book)
    assert same.serve(prompt(1, 40)).exact == 39


# --- evict and forget ---------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", ["cost", "lru"])
def test_of_equal_nodes_the_least_recently_used_goes_first(
    driver: Open, home: Path, eviction: str
) -> None:
    engine = driver(eviction=eviction)
    for seed in range(4):
        engine.save(prompt(seed, 40))
    engine.serve(prompt(0, 40))
    engine.stage(prompt(1, 40))  # another client wanted to save it again: that counts as a use
    assert engine.store.evict(nodes=2) == 2
    engine.store.flush()
    assert [engine.serve(prompt(seed, 40)).exact for seed in range(4)] == [39, 39, 0, 0]
    assert len(list((home / "blocks").glob("*/*"))) == 10
    assert engine.store.evict(nodes=10) == 2
    assert engine.store.evict(nodes=10) == 0
    engine.store.flush()
    assert list((home / "blocks").glob("*/*")) == []


def test_shared_blocks_stay_with_the_last_node(driver: Open) -> None:
    engine = driver(eviction="lru")
    tokens = prompt(1, 80)
    engine.save(tokens)
    changed = edited(tokens, 30, 1, [7])
    engine.serve_and_save(changed)
    engine.store.evict(nodes=1)
    engine.store.flush()
    assert engine.store.stats()["nodes"] == 1
    assert engine.serve(changed).reused == 79
    assert driver().serve(changed).reused == 79


def test_max_nodes(driver: Open) -> None:
    engine = driver(max_nodes=3)
    for seed in range(6):
        engine.save(prompt(seed, 20))
    assert engine.store.stats()["nodes"] == 3
    assert [engine.serve(prompt(seed, 20)).exact for seed in range(6)] == [0, 0, 0, 19, 19, 19]


def test_clear(driver: Open, home: Path) -> None:
    engine = driver()
    for seed in range(3):
        engine.save(prompt(seed, 40))
    plan = engine.plan(prompt(0, 40))
    assert engine.store.clear() == 3
    engine.check(prompt(0, 40), plan)
    engine.finish(plan)
    engine.store.flush()
    stats = engine.store.stats()
    assert (stats["nodes"], stats["blocks"]) == (0, 0)
    used = {name: tier["bytes"] for name, tier in stats["tiers"].items()}
    assert used == {"host": 0, "disk": stats["catalog_bytes"]}
    assert list((home / "blocks").glob("*/*")) == []
    assert driver().plan(prompt(1, 40)).declined == "empty_store"


# --- what requests say when they end ------------------------------------------------------------


def test_a_plan_that_failed_is_a_miss(driver: Open) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    plan = engine.plan(prompt(1, 40))
    engine.store.finish(plan, Outcome(failed="aborted", recomputed=40))
    stats = engine.store.stats()
    assert (stats["hits_exact"], stats["misses"]) == (0, 1)
    assert stats["declined"] == {"aborted": 1}
    assert stats["tokens_recomputed"] == 40
    assert stats["tokens_reused_exact"] == 0
    identity(engine.store)


def test_a_plan_of_which_nothing_was_used_is_a_miss(driver: Open) -> None:
    """Whoever ends it names no reason, so the store does. No load was timed either."""
    engine = driver()
    engine.save(prompt(1, 40))
    for cached in (0, 36):
        unused = Outcome(recomputed=40 - cached, cached=cached)
        engine.store.finish(engine.plan(prompt(1, 40)), unused)
    stats = engine.store.stats()
    assert (stats["hits_exact"], stats["misses"]) == (0, 2)
    assert stats["declined"] == {"not_taken": 2}
    assert (stats["tokens_recomputed"], stats["tokens_engine_cached"]) == (44, 36)
    assert stats["seconds"]["load"]["buckets"][-1] == 0
    logged = engine.store.requests.last(2)
    assert [(entry.outcome, entry.reason) for entry in logged] == [("miss", "not_taken")] * 2
    identity(engine.store)


def test_every_requested_token_is_counted_once(driver: Open) -> None:
    """As reused, computed, or hit in the engine's own prefix cache, however the request ended."""
    engine = driver()
    engine.save(prompt(1, 40))
    plan = engine.plan(edited(prompt(1, 40), 20, 2, [7, 8, 9]))
    reused = plan.reused - 8
    engine.store.finish(plan, Outcome(12, reused - 12, 41 - 8 - reused, cached=8))
    assert engine.plan(prompt(2, 30)).declined  # the engine's own cache has half of this one
    engine.store.outcomes.engine_cached(15)
    engine.store.outcomes.decline("multimodal", 50)
    given_up = engine.plan(prompt(1, 40))
    engine.store.finish(given_up, Outcome(failed="engine_prefix", recomputed=4, cached=36))
    stats = engine.store.stats()
    assert stats["tokens_engine_cached"] == 8 + 15 + 36
    parts = ("reused_exact", "reused_edited", "recomputed", "engine_cached")
    assert sum(stats[f"tokens_{part}"] for part in parts) == stats["tokens_requested"]
    assert stats["tokens_requested"] == 41 + 30 + 50 + 40


def test_stats_say_what_is_counted_and_since_when(driver: Open) -> None:
    before = time.time()
    stats = driver(policy="faithful").store.stats()
    assert before <= stats["since"] <= time.time()
    assert (stats["policy"], stats["pid"], stats["version"]) == ("faithful", os.getpid(), version())


def test_a_first_lookup_loads_no_module(home: Path) -> None:
    """An import takes tens of milliseconds, for which the request would wait."""
    code = """
import sys
import numpy as np
from kvshare_store import KVLayout, Namespace, Store, StoreConfig

layout = KVLayout(2, 1, 4, "float32")
namespace = Namespace(model="m", layout=layout)
tokens = np.arange(400, dtype=np.int32)
config = StoreConfig(home=sys.argv[1], host_bytes=1 << 22, disk=False, semantic="never",
                     min_saving_ms=-1e9)
with Store(config) as store:
    assert store.save(tokens, namespace, np.zeros(layout.shape(400), np.float32))
    before = set(sys.modules)
    edited = store.plan(np.concatenate([tokens[:200], [5, 6, 7], tokens[202:]]), namespace)
    moved = store.plan(np.concatenate([tokens[200:], tokens[:200]]), namespace)
    assert edited.reused > 100 < moved.reused, (edited, moved)
    print(sorted(set(sys.modules) - before))
"""
    command = [sys.executable, "-c", code, str(home)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_finishing_twice_counts_once(driver: Open) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    plan = engine.plan(prompt(1, 40))
    engine.finish(plan)
    engine.finish(plan)
    engine.store.finish("no such lease", Outcome())
    assert engine.store.stats()["hits_exact"] == 1
    identity(engine.store)


def test_rows_that_are_late_are_a_miss_and_there_the_next_time(driver: Open) -> None:
    driver().save(prompt(1, 40))
    engine = driver()
    store = engine.store
    level = store.blocks.levels.named("disk")
    level.tier = slow = SlowTier(level.tier, get=0.2)
    plan = engine.plan(prompt(1, 40), deadline_ms=1.0)
    assert plan.declined == "not_resident"
    assert store.stats()["leases"] == 0
    identity(store)
    slow.seconds["get"] = 0.0
    assert engine.serve(prompt(1, 40)).exact == 39


def test_evicting_fewer_than_none(driver: Open) -> None:
    engine = driver()
    engine.save(prompt(1, 40))
    with pytest.raises(ConfigError, match="-1"):
        engine.store.evict(nodes=-1)
    assert engine.store.stats()["nodes"] == 1
