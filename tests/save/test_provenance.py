"""Rows are as exact as their plan says: from the tiers, under a lease that is late, and in saves
whose client says more than is true."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from kvshare_connectors.vllm.resident import Resident

from kvshare_store.errors import LeaseError, NamespaceError, PlanError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.plan.contexts import Context
from kvshare_store.plan.editor import Editor
from kvshare_store.plan.spans import Span
from kvshare_store.save.staging import Buffer, Reuse, Staged, reuse_of
from kvshare_store.store import Store
from tests.support.oracle import Driver, prompt
from tests.support.tiers import drop_from_host

Open = Callable[..., Driver]
ROW = 64
SLOT = 64 + 8 * ROW
TOKENS = prompt(1, 40)
ROWS = np.random.default_rng(0).standard_normal((2, 2, 40, 1, 4)).astype(np.float32)


def expire(store: Store, plan: ReusePlan) -> None:
    """The plan's lease ends as if by time; its engine does not know."""
    assert plan.lease in store.blocks.leases
    store.blocks.leases.clock = lambda: time.monotonic() + 1e6
    store.reap()
    store.blocks.leases.clock = time.monotonic
    assert plan.lease not in store.blocks.leases


# --- bytes that a codec changed -----------------------------------------------------------------


def saved(driver: Open, namespace: Namespace, **settings: Any) -> Store:
    """A store with one prompt of finite rows, durable through a lossy codec."""
    store = driver(disk_codec="int8", **settings).store
    assert store.save(TOKENS, namespace, ROWS.tobytes())
    store.flush()
    return store


def test_rounded_rows_on_a_device_do_not_come_back_as_exact(
    driver: Open, namespace: Namespace
) -> None:
    """They were kept there while the store had nothing better; then the prompt is saved again."""
    store = saved(driver, namespace)
    resident = Resident(1 << 16, "cpu", namespace.layout)
    editor = Editor(namespace.layout, None)
    arena = store.blocks.host.arena

    def load(plan: ReusePlan) -> np.ndarray[Any, Any]:
        """As the worker of an engine."""
        rows = editor.edit(
            plan.spans, plan.blocks, lambda ref: arena.rows(ref.offset, ref.nbytes), resident.rows
        ).rows.numpy()
        resident.used(arena, plan.blocks)
        resident.fill()
        return rows.copy()

    drop_from_host(store)
    for _ in range(2):
        plan = store.plan(TOKENS, namespace)
        assert (plan.exact, plan.generation) == (0, 1)
        assert not np.array_equal(load(plan), ROWS[:, :, :39])
        store.finish(plan, Outcome(edited=39))
    store.nodes.remove([node.id for node in store.tree])
    assert store.save(TOKENS, namespace, ROWS.tobytes())
    plan = store.plan(TOKENS, namespace)
    assert plan.exact == 39
    assert np.array_equal(load(plan), ROWS[:, :, :39])
    store.finish(plan, Outcome(exact=39))


def test_a_late_load_does_not_take_rounded_rows_for_the_planned_ones(
    driver: Open, namespace: Namespace
) -> None:
    store = saved(driver, namespace)
    plan = store.plan(TOKENS, namespace)
    assert plan.exact == 39
    expire(store, plan)
    drop_from_host(store)
    again = store.plan(TOKENS, namespace)  # somebody else's request brings the blocks back
    assert {ref.offset for ref in again.blocks} == {ref.offset for ref in plan.blocks}
    assert (again.exact, all(ref.lossy for ref in again.blocks)) == (0, True)
    with pytest.raises(LeaseError):
        store.load(plan)
    assert not np.array_equal(store.load(again).rows.numpy(), ROWS[:, :, :39])


def test_a_block_that_was_away_in_between_is_noticed(driver: Open) -> None:
    """Other rows were in its place while a paused engine was half through its copy."""
    engine = driver(host_bytes=1 << 20)
    store = engine.store
    engine.save(prompt(1, 8))
    store.flush()
    plan = engine.plan(prompt(1, 8))
    (ref,) = plan.blocks
    arena = store.blocks.host.arena
    arena.check(ref)
    first = bytes(arena.rows(ref.offset, ref.nbytes)[: ref.nbytes // 2])
    expire(store, plan)
    drop_from_host(store)
    engine.save(prompt(2, 8))
    (taken,) = store.blocks.host.names()
    assert store.blocks.host.ref(taken).offset == ref.offset  # type: ignore[union-attr]
    second = bytes(arena.rows(ref.offset, ref.nbytes)[ref.nbytes // 2 :])
    store.flush()
    drop_from_host(store)
    engine.serve(prompt(1, 8))
    now = store.blocks.host.ref(ref.name)
    assert now is not None
    assert (now.offset, now.lossy) == (ref.offset, False)
    assert bytes(arena.rows(ref.offset, ref.nbytes)) != first + second
    with pytest.raises(LeaseError):
        arena.check(ref)


# --- what a client says of its save -------------------------------------------------------------


def reuse_all(engine: Driver) -> Reuse:
    """The whole of the only node, as a client that lies would say."""
    (node,) = engine.store.tree
    spans = tuple(Span(at, 8, at, at // 8, 0, True) for at in range(0, 40, 8))
    return Reuse(spans, node.blocks, (node.id,), 0)


def changed(reuse: Reuse, index: int, **fields: Any) -> Reuse:
    spans = list(reuse.spans)
    spans[index] = msgspec.structs.replace(spans[index], **fields)
    return msgspec.structs.replace(reuse, spans=tuple(spans))


def refused(engine: Driver, tokens: list[int], reuse: Reuse) -> None:
    """`PlanError`, counted, and nothing is stored or kept."""
    before = engine.store.stats()
    with pytest.raises(PlanError):
        engine.store.stage(tokens, engine.namespace, reuse)
    after = engine.store.stats()
    assert after["errors"].get("plan", 0) == before["errors"].get("plan", 0) + 1
    assert (after["nodes"], after["staged"]) == (before["nodes"], 0)
    assert engine.serve(TOKENS).exact == 39
    assert engine.save(tokens), "the prompt can still be saved"


def test_what_is_true_of_a_donor_is_accepted(driver: Open) -> None:
    engine = driver()
    engine.save(TOKENS)
    staged = engine.store.stage([*TOKENS, *prompt(2, 8)], engine.namespace, reuse_all(engine))
    assert engine.store.commit(staged.id, Buffer(bytes(8 * ROW)))


def test_rows_of_another_prompt_are_not_exact(driver: Open) -> None:
    engine = driver()
    engine.save(TOKENS)
    refused(engine, prompt(2, 40), reuse_all(engine))


def test_one_token_that_differs_is_found(driver: Open) -> None:
    engine = driver()
    engine.save(TOKENS)
    tokens = [*TOKENS[:20], TOKENS[20] + 1, *TOKENS[21:]]
    reuse = reuse_all(engine)
    refused(engine, tokens, reuse)
    behind = engine.store.tree.get(reuse.donors[0])
    assert behind is not None
    other = [TOKENS[0] + 1, *TOKENS[1:]]  # all tokens of the later spans are the donor's
    refused(engine, other, msgspec.structs.replace(reuse, spans=reuse.spans[1:]))


@pytest.mark.parametrize("length", [9, 16, 40])
@pytest.mark.parametrize("at", [0, 3], ids=["in place", "moved"])
def test_more_rows_than_the_block_has(driver: Open, at: int, length: int) -> None:
    """All tokens are the donor's: nothing but the end of the block is against it."""
    engine = driver()
    engine.save(TOKENS)
    whole, moved = reuse_all(engine), at > 0
    span = Span(at, length, 0, 0, 0, exact=not moved)
    lie = Reuse((span,), whole.blocks[:1], whole.donors, generation=int(moved))
    refused(engine, [7] * at + TOKENS[:length] + prompt(2, 20), lie)


def test_rows_of_the_block_that_the_donor_does_not_use(driver: Open) -> None:
    """Before them the donor has rows of its own: those of the block are another prompt's."""
    engine = driver()
    engine.save(TOKENS)
    donor = engine.serve_and_save([*prompt(4, 12), *TOKENS[12:]])
    node = engine.store.tree.get(donor or "")
    assert node is not None
    partly = next(s for s in node.segments if s.row > 0)
    first = partly.start - partly.row
    tokens = node.tokens[first : partly.stop].tolist()
    source = partly.source - partly.row
    span = Span(3, len(tokens), source, 0, 0)
    lie = Reuse((span,), (node.blocks[partly.block],), (node.id,), generation=2)
    refused(engine, [7, 7, 7, *tokens, *prompt(5, 9)], lie)


@pytest.mark.parametrize(
    "fields",
    [{"length": 9}, {"row": 1}, {"row": 4, "length": 8}, {"length": 256}, {"block": 3}],
    ids=["into the next", "shifted", "over the end", "far over the end", "another block"],
)
def test_rows_that_the_block_does_not_have(driver: Open, fields: dict[str, int]) -> None:
    engine = driver()
    engine.save(TOKENS)
    longer = TOKENS + prompt(2, 300)
    refused(engine, longer, changed(reuse_all(engine), 4, **fields))


def test_a_wrong_source_would_rotate_wrongly(driver: Open) -> None:
    engine = driver()
    engine.save(TOKENS)
    edited = changed(reuse_all(engine), 2, source=15, exact=False)
    refused(engine, TOKENS + prompt(2, 8), msgspec.structs.replace(edited, generation=1))


def test_moved_rows_of_other_tokens(driver: Open) -> None:
    engine = driver()
    engine.save(TOKENS)
    reuse = Reuse((Span(3, 8, 0, 0, 0),), reuse_all(engine).blocks[:1], reuse_all(engine).donors, 1)
    refused(engine, prompt(3, 20), reuse)
    assert engine.store.stage([7, 7, 7, *TOKENS[:8], *prompt(3, 9)], engine.namespace, reuse).id, (
        "rows of the same tokens may move"
    )


def test_rows_without_a_prompt_they_come_from(driver: Open) -> None:
    engine = driver()
    engine.save(TOKENS)
    refused(engine, [*TOKENS, 1], msgspec.structs.replace(reuse_all(engine), donors=()))


def test_more_donors_than_any_plan_has(driver: Open) -> None:
    engine = driver(max_donors=2)
    engine.save(TOKENS)
    reuse = reuse_all(engine)
    refused(engine, [*TOKENS, 1], msgspec.structs.replace(reuse, donors=reuse.donors * 6))


@pytest.mark.parametrize("generation", [-1, 0, 1, 2, 1 << 40])
def test_a_generation_that_the_rows_do_not_have(driver: Open, generation: int) -> None:
    """Rows that an edited prompt computed are of generation 1; what is built on them of 2."""
    engine = driver()
    engine.save(TOKENS)
    middle = [*TOKENS[:10], 5, *TOKENS[11:], *prompt(4, 16)]
    node = engine.serve_and_save(middle)
    assert node is not None
    assert engine.store.tree.get(node).generation == 1  # type: ignore[union-attr]
    last = [9, 9, *middle[-16:], *prompt(5, 9)]
    plan = engine.plan(last)
    assert plan.generation == 2
    reuse = msgspec.structs.replace(reuse_of(plan), generation=generation)
    if generation == 2:
        assert engine.store.stage(last, engine.namespace, reuse).id
    else:
        with pytest.raises(PlanError):
            engine.store.stage(last, engine.namespace, reuse)
    engine.finish(plan)


def test_edited_rows_do_not_become_exact(driver: Open) -> None:
    """The positions behind an edit are those of that prompt, but not computed in full context."""
    engine = driver()
    engine.save(TOKENS)
    middle = [*TOKENS[:10], 5, *TOKENS[11:]]
    plan = engine.plan(middle)
    reuse = reuse_of(plan)
    edited = engine.save(middle, plan)
    engine.finish(plan)
    node = engine.store.tree.get(edited or "")
    assert node is not None
    assert node.exact_rows < 40
    exact = tuple(msgspec.structs.replace(s, exact=True, source=s.start) for s in node.segments)
    lie = Reuse(exact, node.blocks, (node.id,), 0)
    assert reuse.generation == 1
    with pytest.raises(PlanError):
        engine.store.stage([*middle, *prompt(6, 8)], engine.namespace, lie)


def edited_prompt(engine: Driver) -> Node:
    """Twenty exact rows, a changed token, the rest moved behind it."""
    engine.save(TOKENS)
    node_id = engine.serve_and_save([*TOKENS[:20], 5, *TOKENS[21:]])
    node = engine.store.tree.get(node_id or "")
    assert node is not None
    assert (node.exact_rows, node.generation, node.policy) == (21, 1, "aggressive")
    return node


def test_a_continued_prompt_keeps_generation_policy_and_context(driver: Open) -> None:
    engine = driver()
    node = edited_prompt(engine)
    (context,) = node.contexts
    assert context.start == node.exact_rows
    tokens = node.tokens.tolist()
    for turn in range(5):
        tokens = [*tokens, *prompt(10 + turn, 8)]
        longer = engine.store.tree.get(engine.serve_and_save(tokens) or "")
        assert longer is not None
        assert (longer.generation, longer.policy, longer.exact_rows) == (1, "aggressive", 21)
        assert longer.contexts == node.contexts
    other = [*tokens[:30], 9, *tokens[31:]]
    edited = engine.store.tree.get(engine.serve_and_save(other) or "")
    assert edited is not None
    assert edited.generation == 2
    assert [c.start for c in edited.contexts] == [node.exact_rows, 31]


def test_continued_rows_are_a_prefix_of_an_edited_prompt(driver: Open) -> None:
    """Not of another text, not moved, not behind edited rows, not of a lower generation."""
    engine = driver()
    node = edited_prompt(engine)
    tokens = [*node.tokens.tolist(), *prompt(7, 8)]
    plan = engine.plan(tokens)
    honest = reuse_of(plan)
    engine.finish(plan)
    assert engine.store.stage(tokens, engine.namespace, honest).id
    at = next(index for index, span in enumerate(honest.spans) if span.continued)
    lies = [
        (tokens, msgspec.structs.replace(honest, generation=0)),
        (tokens, changed(honest, at, exact=True)),
        (tokens, changed(honest, at, exact=True, continued=False)),
        (tokens, changed(honest, 0, exact=False)),
        ([tokens[0] + 1, *tokens[1:]], honest),
        ([1, *tokens], moved(honest)),
        (tokens, msgspec.structs.replace(honest, contexts=(Context(len(tokens), b""),))),
        (tokens, msgspec.structs.replace(honest, contexts=(Context(0, b""),) * (len(tokens) + 1))),
        (tokens, msgspec.structs.replace(honest, contexts=())),
    ]
    for request, lie in lies:
        with pytest.raises(PlanError):
            engine.store.stage(request, engine.namespace, lie)


def moved(reuse: Reuse) -> Reuse:
    """The same rows one position later, except for the exact ones."""
    spans = [
        msgspec.structs.replace(span, start=span.start + 1)
        for span in reuse.spans
        if span.continued
    ]
    return msgspec.structs.replace(reuse, spans=tuple(spans))


def test_a_context_that_is_cut_is_another_one(driver: Open) -> None:
    """Behind the cut stand other rows than behind the whole."""
    engine = driver()
    node = edited_prompt(engine)
    tokens = node.tokens.tolist()
    (context,) = node.contexts
    assert context.stop == len(tokens) - 1
    shorter = engine.plan(tokens[:30] + prompt(7, 20))
    (cut,) = shorter.contexts
    assert (cut.start, cut.stop) == (context.start, 30)
    assert cut.digest != context.digest
    engine.finish(shorter)


def test_a_pinned_prompt_stays_when_it_is_saved_exactly(driver: Open) -> None:
    engine = driver()
    node = edited_prompt(engine)
    engine.store.pin(node.id)
    engine.save(node.tokens.tolist())
    assert engine.store.tree.get(node.id) is not None


def test_a_stricter_policy_does_not_continue_laxer_rows(driver: Open) -> None:
    engine = driver()
    node = edited_prompt(engine)
    tokens = [*node.tokens.tolist(), *prompt(7, 8)]
    for policy in ("exact", "faithful", "balanced"):
        plan = engine.store.plan(tokens, engine.namespace, policy=policy)
        assert (plan.exact, plan.continued, plan.generation) == (21, 0, 0)
        engine.store.finish(plan, Outcome(exact=21))


def test_a_donor_of_another_tenant(driver: Open) -> None:
    engine = driver()
    engine.save(TOKENS)
    stranger = engine.namespace.for_tenant("stranger")
    with pytest.raises(NamespaceError):
        engine.store.stage([*TOKENS, 1], stranger, reuse_all(engine))
    assert engine.store.plan([*TOKENS, 1], stranger).declined == "empty_store"


def test_a_save_whose_donor_is_gone_is_not_wanted(driver: Open) -> None:
    """Nobody can say any more whether it is true; that is nobody's fault."""
    engine = driver()
    engine.save(TOKENS)
    reuse = reuse_all(engine)
    engine.store.evict(nodes=1)
    assert engine.store.stage([*TOKENS, 1], engine.namespace, reuse) == Staged(known=True)
    assert engine.store.stats()["errors"] == {"missing": 1}


def test_a_donor_that_was_merged_has_other_blocks(driver: Open) -> None:
    """The save was planned before; only a plan that is still open knows what it was."""
    engine = driver(max_chain=1)
    engine.save(TOKENS)
    tokens = TOKENS
    for at in (30, 20):
        tokens = [*tokens[:at], 5, *tokens[at + 1 :]]
        assert engine.serve_and_save(tokens)
    engine.store.flush()
    last = [*tokens[:10], 7, *tokens[11:]]
    plan = engine.plan(last)
    assert engine.store.collect().merged == 1
    merged = engine.store.tree.get(plan.donors[0])
    assert merged is not None
    assert merged.merged
    staged = engine.stage(last, plan)
    assert not staged.known
    engine.store.abandon(staged.id)
    engine.finish(plan)
    assert engine.store.stage(last, engine.namespace, reuse_of(plan)).known
    assert engine.store.stats()["errors"] == {"missing": 1}


def test_a_donor_that_was_saved_anew_has_other_blocks(driver: Open) -> None:
    """Its plan has ended, so nobody knows its old form any more; the client is honest."""
    engine = driver()
    donor = engine.save(TOKENS)
    tokens = [*TOKENS, *prompt(2, 8)]
    plan = engine.plan(tokens)
    reuse = reuse_of(plan)
    engine.finish(plan)
    engine.store.evict(nodes=1)
    engine.save([*TOKENS[:20], *prompt(3, 20)])
    assert engine.serve_and_save(TOKENS) == donor == reuse.donors[0]
    anew = engine.store.tree.get(donor)
    assert anew is not None
    assert not set(reuse.blocks) <= set(anew.blocks)
    assert engine.store.stage(tokens, engine.namespace, reuse).known
    assert engine.store.stats()["errors"] == {"missing": 1}
    lie = msgspec.structs.replace(reuse, stamps=(anew.stamp,))
    with pytest.raises(PlanError):
        engine.store.stage(tokens, engine.namespace, lie)


def test_blocks_that_no_span_uses_are_not_kept(driver: Open) -> None:
    engine = driver()
    engine.save(TOKENS)
    reuse = reuse_all(engine)
    kept = msgspec.structs.replace(reuse, spans=reuse.spans[:2])
    tokens = [*TOKENS[:16], *prompt(2, 8)]
    staged = engine.store.stage(tokens, engine.namespace, kept)
    node = engine.store.tree.get(engine.store.commit(staged.id, Buffer(bytes(8 * ROW))) or "")
    assert node is not None
    assert node.blocks[:2] == reuse.blocks[:2]
    assert len(node.blocks) == 3


# --- what a client says of its loads ------------------------------------------------------------


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(exact=-1),
        Outcome(exact=40),
        Outcome(edited=1 << 62),
        Outcome(exact=39, recomputed=2),
        Outcome(exact=39, nbytes=40 * ROW),
        Outcome(exact=39, nbytes=-1),
        Outcome(exact=39, seconds=-1.0),
        Outcome(exact=39, seconds=float("nan")),
        Outcome(exact=39, seconds=1e9),
        Outcome(failed="x" * 1000),
    ],
    ids=str,
)
def test_an_outcome_that_cannot_be(driver: Open, outcome: Outcome) -> None:
    """It ends the lease, and no counter or rate believes it."""
    engine = driver()
    engine.save(TOKENS)
    rates = {tier: rate.value for tier, rate in engine.store.costs.load.items()}
    plan = engine.plan(TOKENS)
    with pytest.raises(PlanError):
        engine.store.finish(plan, outcome)
    stats = engine.store.stats()
    assert (stats["leases"], stats["misses"], stats["hits_exact"]) == (0, 1, 0)
    assert stats["errors"] == {"plan": 1}
    assert stats["declined"] == {"bad_outcome": 1}
    assert stats["tokens_reused_exact"] == stats["tokens_reused_edited"] == 0
    assert {tier: rate.value for tier, rate in engine.store.costs.load.items()} == rates
