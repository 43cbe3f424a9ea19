"""The tree as it grows: cheapest edits, merges, pins, quotas and time to live."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvshare_store.blocks.pool import Reserved
from kvshare_store.errors import NoSpaceError
from kvshare_store.maintenance.check import check_tree
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]

REQ1 = prompt(1, 60)
REQ2 = [*REQ1[:20], *prompt(2, 10), *REQ1[20:]]
REQ3 = [*REQ2[:50], *prompt(3, 5), *REQ2[50:]]
"""The figure of the paper: 10 tokens from the first to the second, 5 from there to the third, and
so 15 from the first to the third."""


def files(home: Path) -> set[str]:
    return {file.stem for file in (home / "blocks").glob("*/*")}


def saved(engine: Driver, tokens: list[int]) -> Node:
    """Serve and save; the node."""
    name = engine.serve_and_save(tokens)
    assert name is not None
    node = engine.store.tree.get(name)
    assert node is not None
    return node


def here(engine: Driver, node: Node) -> Node:
    """The node as it is now."""
    found = engine.store.tree.get(node.id)
    assert found is not None
    return found


def added(node: Node) -> int:
    return sum(len(edit.tokens) for edit in node.edits)


# --- the cheapest path --------------------------------------------------------------------------


def test_the_cheapest_edit_is_found_and_remembered(driver: Open) -> None:
    engine = driver()
    req1, req2 = saved(engine, REQ1), saved(engine, REQ2)
    plan = engine.serve(REQ3)
    assert plan.donors[0] == req2.id
    assert plan.tokens - plan.reused == 5 + 1, "five tokens, and the last is never reused"
    req3 = saved(engine, REQ3)
    assert [node.id for node in engine.store.tree.path(req3.id)] == [req1.id, req2.id, req3.id]
    assert (added(req2), added(req3)) == (10, 5)
    own = set(req3.blocks) - set(req2.blocks)
    rows = sum(segment.length for segment in req3.segments if req3.blocks[segment.block] in own)
    assert rows == 5 + 1, "what is shared is not stored again"


def test_without_the_cheap_donor_the_edit_costs_three_times_as_much(driver: Open) -> None:
    engine = driver()
    req1 = saved(engine, REQ1)
    plan = engine.serve(REQ3)
    assert plan.donors == (req1.id,)
    assert plan.tokens - plan.reused == 15 + 1


def test_leaves_stay_usable_when_what_is_between_has_gone(driver: Open, home: Path) -> None:
    engine = driver()
    req1, req2, req3 = saved(engine, REQ1), saved(engine, REQ2), saved(engine, REQ3)
    engine.store.nodes.remove([req1.id, req2.id])
    engine.store.flush()
    assert files(home) == set(req3.blocks)
    assert engine.serve(REQ3).reused == len(REQ3) - 1
    engine = driver()
    assert engine.serve(REQ3).reused == len(REQ3) - 1
    assert [node.id for node in engine.store.tree.path(req3.id)] == [req3.id]
    assert here(engine, req3).parent == req2.id


# --- merges -------------------------------------------------------------------------------------


def edited(tokens: list[int], at: int) -> list[int]:
    return [*tokens[:at], 7 + at, *tokens[at + 1 :]]


def chain(engine: Driver, length: int) -> list[Node]:
    """A prompt, and edits of it, each before those that the prompt before has: that one is the best
    donor."""
    tokens, nodes = prompt(9, 64), []
    for at in range(length):
        nodes.append(saved(engine, tokens))
        tokens = edited(tokens, 45 - 10 * at)
    engine.store.flush()
    return nodes


@pytest.mark.parametrize("disk", [True, False])
def test_a_long_chain_is_merged_and_serves_the_same_rows(driver: Open, disk: bool) -> None:
    engine = driver(max_chain=2, disk=disk)
    nodes = chain(engine, 4)
    assert [node.generation for node in nodes] == [0, 1, 2, 3]
    assert engine.store.collect().merged == 1
    merged = here(engine, nodes[3])
    assert merged.merged
    assert (len(nodes[3].blocks), len(merged.blocks)) == (11, 8)
    new = set(merged.blocks) - set(nodes[3].blocks)
    assert len(new) == 4, "three edits and the last row; blocks without edits are the same bytes"
    same = ("parent", "edits", "generation", "exact_rows", "created", "token_bytes")
    assert all(getattr(merged, field) == getattr(nodes[3], field) for field in same)
    assert engine.store.collect().merged == 0
    # every row that is served is looked up in the book: token, place it was computed at, prefix
    assert engine.serve(nodes[3].tokens.tolist()).reused == 63
    engine.store.nodes.remove([node.id for node in nodes[:3]])
    engine.store.flush()
    assert engine.serve(nodes[3].tokens.tolist()).reused == 63


def test_moved_rows_keep_the_place_they_were_computed_at(driver: Open) -> None:
    engine = driver(max_chain=0)
    saved(engine, REQ1)
    req2 = saved(engine, REQ2)
    engine.store.collect()
    merged = here(engine, req2)
    assert merged.merged
    assert next((s.start, s.source) for s in merged.segments if s.source != s.start) == (30, 20)
    assert engine.serve(REQ2).reused == len(REQ2) - 1
    child = saved(engine, REQ3)
    assert engine.store.tree.chain(child.id) == 1
    assert engine.serve(REQ3).reused == len(REQ3) - 1


def test_what_lies_in_too_many_blocks_is_gathered(driver: Open) -> None:
    engine = driver(max_scatter=1.4)
    tokens = prompt(5, 20)
    for at in range(6):  # a conversation: each turn adds a few tokens
        saved(engine, tokens)
        tokens = [*tokens, *prompt(50 + at, 4)]
    node = saved(engine, tokens)
    assert len(node.blocks) > 1.4 * 6
    assert engine.store.collect().merged >= 1
    assert len(here(engine, node).blocks) == 6
    plan = engine.serve(tokens)
    assert plan.exact == len(tokens) - 1, "merged rows are the same bytes: exact stays exact"


def test_a_merge_survives_a_restart(driver: Open, home: Path) -> None:
    engine = driver(max_chain=1)
    nodes = chain(engine, 3)
    engine.store.collect()
    merged = here(engine, nodes[2])
    engine = driver(max_chain=1)
    assert here(engine, merged).segments == merged.segments
    assert here(engine, merged).merged
    assert engine.serve(merged.tokens.tolist()).reused == 63
    assert files(home) == engine.store.tree.blocks()
    assert engine.store.collect().merged == 0


def test_leased_rows_stay_until_their_plan_has_ended(driver: Open, home: Path) -> None:
    engine = driver(max_chain=1)
    nodes = chain(engine, 3)
    plan = engine.plan(nodes[2].tokens.tolist())
    engine.store.nodes.remove([node.id for node in nodes[:2]])
    engine.store.collect()
    engine.store.flush()
    engine.check(nodes[2].tokens.tolist(), plan)
    assert {ref.name for ref in plan.blocks} <= files(home)
    engine.finish(plan)
    engine.store.flush()
    assert files(home) == set(here(engine, nodes[2]).blocks)


def all_memory(engine: Driver) -> list[Reserved]:
    """Reserve what there is; the slots."""
    held = []
    for nbytes in (1 << 14, 1 << 10, 64):
        with contextlib.suppress(NoSpaceError):
            while True:
                held.append(engine.store.blocks.pool.reserve(nbytes))
    return held


def test_memory_full_of_rows_in_use_postpones_a_merge(driver: Open) -> None:
    engine = driver(max_chain=1)
    nodes = chain(engine, 3)
    held = all_memory(engine)
    assert engine.store.collect().merged == 0
    assert not here(engine, nodes[2]).merged
    for slot in held:
        engine.store.blocks.pool.cancel(slot)
    assert engine.store.collect().merged == 1


def test_a_node_that_is_pinned_while_it_is_merged_keeps_its_pin(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver(max_chain=1)
    nodes = chain(engine, 3)
    merger = engine.store.janitor.merger
    gather = merger.gather

    def gather_and_pin(*arguments: Any) -> list[str]:
        names = gather(*arguments)
        engine.store.pin(nodes[2].id)
        return names

    monkeypatch.setattr(merger, "gather", gather_and_pin)
    assert engine.store.collect().merged == 0
    engine.store.flush()
    engine = driver(max_chain=1)
    assert here(engine, nodes[2]).pinned
    assert engine.serve(nodes[2].tokens.tolist()).reused == 63
    assert engine.store.collect().merged == 1
    assert here(engine, nodes[2]).pinned


def test_a_node_that_leaves_while_it_is_merged_leaves_nothing(
    driver: Open, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver(max_chain=1)
    chain(engine, 3)
    catalog = engine.store.repository.catalog
    assert catalog is not None
    replace = catalog.replace

    def leave_after(*arguments: Any) -> bool:
        replaced = replace(*arguments)
        engine.store.nodes.remove([node.id for node in engine.store.tree], whatever=True)
        return replaced

    monkeypatch.setattr(catalog, "replace", leave_after)
    assert engine.store.collect().merged == 0
    engine.store.flush()
    assert files(home) == set()
    assert catalog.count() == 0


# --- pins, quotas, time to live -----------------------------------------------------------------


def test_pins_outlive_everything_but_a_purge(driver: Open, namespace: Namespace) -> None:
    engine = driver()
    first = saved(engine, prompt(1, 40))
    saved(engine, prompt(2, 40))
    assert engine.store.pin(first.id)
    assert not engine.store.pin("0" * 32)
    engine.store.flush()
    engine = driver(ttl_seconds=1e-6, max_nodes=1)
    assert here(engine, first).pinned
    engine.store.collect()
    assert [node.id for node in engine.store.tree] == [first.id]
    assert engine.store.evict(nodes=5) == 0
    engine.save(prompt(3, 40))
    assert first.id in engine.store.tree
    assert engine.serve(prompt(1, 40)).exact == 39
    assert engine.store.evict(namespace=namespace.digest) == 1
    assert len(engine.store.tree) == 0


def test_a_node_that_is_pinned_no_longer_can_go(driver: Open) -> None:
    engine = driver()
    node = saved(engine, prompt(1, 40))
    engine.store.pin(node.id)
    engine.store.pin(node.id, False)
    engine.store.flush()
    assert not here(driver(), node).pinned
    assert driver(ttl_seconds=1e-6).store.collect().nodes == 1


def test_a_full_namespace_evicts_its_own(driver: Open, namespace: Namespace) -> None:
    engine = driver(namespace_bytes=3 * 5 * 512)  # three prompts of five blocks
    tenant = Namespace("model", namespace.layout, tenant="b")
    neighbour = Driver(engine.store, tenant, engine.book)
    theirs = saved(neighbour, prompt(7, 40))
    first = saved(engine, prompt(1, 40))
    for seed in range(2, 4):
        engine.save(prompt(seed, 40))
    engine.serve(prompt(1, 40))
    engine.save(prompt(4, 40))
    assert theirs.id in engine.store.tree
    assert first.id in engine.store.tree, "used last"
    assert engine.plan(prompt(2, 40)).declined == "no_donor"
    assert engine.store.tree.bytes_of(namespace.digest) <= 3 * 5 * 512


def test_a_prompt_larger_than_its_quota_is_not_kept(driver: Open, home: Path) -> None:
    engine = driver(namespace_bytes=5 * 576)
    small = saved(engine, prompt(1, 40))
    engine.store.pin(small.id)
    engine.save(prompt(2, 40))
    engine.store.flush()
    assert [node.id for node in engine.store.tree] == [small.id]
    assert engine.store.stats()["errors"] == {"no_space": 1}
    assert files(home) == set(small.blocks)


def test_a_quota_that_is_new_is_held_by_the_janitor(driver: Open, home: Path) -> None:
    engine = driver()
    for seed in range(3):
        engine.save(prompt(seed, 40))
    engine.store.flush()
    total = sum(file.stat().st_size for file in (home / "blocks").glob("*/*"))
    engine = driver(namespace_bytes=total // 3 + 1)
    assert engine.store.collect().nodes == 2
    assert engine.serve(prompt(2, 40)).exact == 39


def test_a_quota_that_is_much_lower_keeps_nobody_waiting(
    driver: Open, monkeypatch: pytest.MonkeyPatch, namespace: Namespace
) -> None:
    """The lock is free after a few nodes."""
    monkeypatch.setattr("kvshare_store.commit.node_store._STEPS", 2)
    engine = driver()
    for seed in range(9):
        engine.save(prompt(seed, 40))
    engine.store.reload(msgspec.structs.replace(engine.store.config, namespace_nodes=1))
    assert engine.store.nodes.hold_quota(namespace.digest) == 2
    engine.save(prompt(9, 40))
    assert len(engine.store.tree) == 6
    assert engine.store.collect().nodes == 5
    assert engine.serve(prompt(9, 40)).exact == 39


def test_time_to_live_counts_from_the_last_use(driver: Open) -> None:
    now = [0.0]
    engine = driver(ttl_seconds=10.0)
    engine.store.tree.clock = lambda: now[0]
    first, second = saved(engine, prompt(1, 40)), saved(engine, prompt(2, 40))
    now[0] = 9.0
    engine.serve(prompt(1, 40))
    now[0] = 11.0
    assert engine.store.collect(dry_run=True).nodes == 1
    assert engine.store.collect().nodes == 1
    assert [node.id for node in engine.store.tree] == [first.id]
    assert second.id not in engine.store.tree
    now[0] = 19.5
    assert engine.store.collect().nodes == 1


def test_who_shares_the_beginning_of_a_prompt_does_not_renew_it(driver: Open) -> None:
    now = [0.0]
    engine = driver(policy="exact")
    engine.store.tree.clock = lambda: now[0]
    node = saved(engine, prompt(1, 40))
    now[0] = 9.0
    other = [*prompt(1, 40)[:32], *prompt(2, 20)]
    assert engine.serve(other).exact == 32
    assert engine.store.tree.idle_for(node.id) == 9.0, "the other prompt's node has what was used"
    engine.serve([*prompt(1, 40), *prompt(2, 20)])
    assert engine.store.tree.idle_for(node.id) == 0.0
    now[0] = 18.0
    plan = engine.store.plan_soon(other, engine.namespace, stores=False).result()
    assert engine.store.tree.idle_for(node.id) == 0.0, "a reader leaves no node"
    engine.finish(plan)


def test_age_survives_a_restart(driver: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    node = saved(driver(), prompt(1, 40))
    engine = driver(ttl_seconds=1000.0)
    assert engine.store.collect().nodes == 0
    assert 0 <= engine.store.tree.idle_for(node.id) < 500
    monkeypatch.setattr("kvshare_store.commit.recovery.time.time", lambda: node.created + 2000)
    engine = driver(ttl_seconds=1000.0)
    assert engine.store.collect().nodes == 1


def test_the_beginning_of_a_prompt_keeps_its_age_over_a_restart(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota has cut the prompt off after its last use, which was written down for all of it."""
    settings = {"ttl_seconds": 1000.0, "namespace_bytes": 80 * 64}
    engine = driver(**settings)
    node, begun, passed = saved(engine, prompt(1, 40)), time.time(), 0.0
    engine.store.tree.clock = lambda: time.monotonic() + passed
    assert engine.store.repository.uses is not None
    engine.store.repository.uses.clock = lambda: begun + passed
    passed = 900.0
    engine.serve(prompt(1, 40))
    engine.store.repository.uses.exchange()
    passed = 990.0
    engine.save(prompt(2, 60))
    assert node.id not in engine.store.tree
    monkeypatch.setattr("kvshare_store.commit.recovery.time.time", lambda: begun + 1100)
    engine = driver(**settings)
    assert engine.store.collect().nodes == 0
    assert sorted(node.length for node in engine.store.tree) == [16, 60]


# --- who is forgotten first ---------------------------------------------------------------------


def test_the_prompt_used_longest_ago_is_forgotten_first(driver: Open) -> None:
    """However often it was used before."""
    engine = driver()
    nodes = {"often": engine.save(prompt(1, 80))}
    for _ in range(2):
        engine.serve(prompt(1, 80))
    nodes["once"] = engine.save(prompt(2, 80))
    assert engine.store.evict(nodes=1) == 1
    assert [name for name, node in nodes.items() if str(node) in engine.store.tree] == ["once"]


def test_what_is_read_back_of_uses_changes_no_order(driver: Open) -> None:
    """This machine wrote it down itself, by a clock that says a little less."""
    tree = (engine := driver()).store.tree
    nodes = [engine.save(prompt(seed, 40)) for seed in range(3)]
    first = str(nodes[0])
    tree.used_before(first, tree.idle_for(first) - 1e-2)
    assert [node.id for node in tree.victims()] == nodes
    tree.used_before(first, tree.idle_for(first) - 5.0)
    assert [node.id for node in tree.victims()] == [*nodes[1:], first], "another machine used it"


@pytest.mark.parametrize("eviction", ["cost", "lru"])
def test_rows_that_many_prompts_share_outlive_rows_of_one(driver: Open, eviction: str) -> None:
    """In memory as well: every block of the others leaves before the shared ones do, by cost."""
    engine = driver(eviction=eviction, host_bytes=40 * (64 + 8 * 64))
    shared = prompt(1, 64)
    engine.save(shared)
    for number in range(3):
        engine.serve_and_save([*shared, *prompt(100 + number, 8)])
    engine.store.flush()
    names = engine.store.tree.get(node_of(engine, shared)).blocks  # type: ignore[union-attr]
    for seed in range(2, 8):
        engine.save(prompt(seed, 64))
        engine.store.flush()
    host = engine.store.blocks.host
    resident = sum(host.size(name) is not None for name in names)
    assert resident == (len(names) if eviction == "cost" else 0)


def node_of(engine: Driver, tokens: list[int]) -> str:
    """Id of the node of exactly this prompt."""
    return next(node.id for node in engine.store.tree if node.tokens.tolist() == tokens)


def test_a_prompt_that_comes_back_from_its_own_child_is_no_ancestor_of_itself(
    driver: Open,
) -> None:
    engine = driver()
    root = engine.save(REQ1)
    parent, child = saved(engine, REQ2), saved(engine, REQ3)
    assert child.parent == parent.id
    engine.store.nodes.remove([str(root), parent.id])
    engine.store.flush()
    back = saved(engine, REQ2)
    assert back.id == parent.id
    assert engine.store.tree.get(child.id) == child
    for reopened in (False, True):
        store = driver().store if reopened else engine.store
        assert check_tree(store.repository, repair=False).problems == ()
        for node in (back, child):
            assert node.id not in [one.id for one in store.tree.path(node.id)[:-1]]


def test_merges_that_cannot_succeed_do_not_keep_others_waiting(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver(max_chain=0)
    engine.save(REQ1)
    nodes = [saved(engine, [*REQ1[:30], 1000 + number, *REQ1[31:]]) for number in range(10)]
    janitor = engine.store.janitor
    merge_one, tried = janitor.merger.merge_one, []
    last = janitor.merger.scattered()[-1]

    def merge(node: Node) -> bool:
        tried.append(node.id)
        if node.id != last.id:
            raise NoSpaceError("there is no room for it")
        return merge_one(node)

    monkeypatch.setattr(janitor.merger, "merge_one", merge)
    assert janitor.collect(patient=True).merged == 0
    assert len(tried) == 8
    assert janitor.collect(patient=True).merged == 1
    assert here(engine, last).merged
    assert sorted(tried) == sorted(node.id for node in nodes)
    assert janitor.collect(patient=True).merged == 0
    assert len(tried) == 10
    engine.store.collect()  # somebody asks for it now
    assert len(tried) == 18


def test_a_full_disk_keeps_the_beginning_of_what_was_used_longest_ago(driver: Open) -> None:
    """It grows shorter save by save, and is found after a restart."""
    model = Namespace("model", KVLayout(2, 1, 512, "float32"))
    engine = Driver(driver(host_bytes=8 << 20, disk_bytes=4 << 20).store, model)
    first, lengths = prompt(1, 320), [320]
    engine.save(first)
    for seed in range(2, 60):
        engine.save(prompt(seed, 16))
        engine.store.flush()
        (beginning,) = (node for node in engine.store.tree if node.tokens[0] == first[0])
        assert first[: beginning.length] == beginning.tokens.tolist()
        lengths.append(beginning.length)
        if lengths[-1] < 200:
            break
    assert lengths == sorted(lengths, reverse=True)
    assert 100 < lengths[-1] < 200
    again = Driver(driver(host_bytes=8 << 20, disk_bytes=4 << 20).store, model, engine.book)
    assert again.serve([*first, 5]).exact == lengths[-1]
    assert check_tree(again.store.repository, repair=False).problems == ()
