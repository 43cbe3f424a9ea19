"""A purge of a node and its lineage: what was computed behind its rows goes, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.errors import LeaseError, NodeError
from kvshare_store.maintenance.purge_lineage import LineagePurge
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.store import Store
from tests.save.test_answers import save as save_answer
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]

HEAD, BODY = prompt(1, 24), prompt(2, 120)
INJECTED = [*HEAD, *prompt(3, 12), *BODY]
"""A template with a sentence behind its head."""
VICTIM = [*HEAD, *BODY, *prompt(4, 8)]
OTHER = [*prompt(5, 20), *prompt(6, 60)]


@pytest.fixture
def engine(driver: Open) -> Driver:
    return driver(policy="aggressive", min_prompt_tokens=4, approximation_price=0.0)


def found(engine: Driver, tokens: list[int], *, exact: bool) -> Node | None:
    name = node_id(engine.namespace.digest, np.asarray(tokens, np.int32), exact)
    return engine.store.tree.get(name)


def name_of(engine: Driver, tokens: list[int], *, exact: bool = True) -> str:
    node = found(engine, tokens, exact=exact)
    assert node is not None
    return node.id


def compute(engine: Driver, tokens: list[int]) -> str:
    """As under the policy `exact`."""
    engine.save(tokens, engine.serve(tokens, policy="exact"))
    return name_of(engine, tokens)


def build(engine: Driver, tokens: list[int]) -> str:
    """As a prompt with edited rows."""
    plan = engine.serve(tokens)
    assert plan.generation > 0
    engine.save(tokens, plan)
    return name_of(engine, tokens, exact=False)


def purge(engine: Driver, node: str) -> set[str]:
    """The ids of what went. The preview must have said the same, and no row of it may be left."""
    would = engine.store.purge_lineage(node, dry_run=True)
    before = {one.id for one in engine.store.tree}
    done = engine.store.purge_lineage(node)
    assert done == would
    gone = before - {one.id for one in engine.store.tree}
    assert gone == set(done.ids)
    assert done.nodes == len(gone)
    return gone


def test_what_was_computed_behind_a_node_goes_with_it(engine: Driver) -> None:
    bad, other = compute(engine, INJECTED), compute(engine, OTHER)
    child = build(engine, VICTIM)
    grandchild = build(engine, [*prompt(7, 10), *VICTIM])
    blocks = {name for one in engine.store.tree if one.id != other for name in one.blocks}
    assert purge(engine, bad) == {bad, child, grandchild}
    assert [one.id for one in engine.store.tree] == [other]
    assert blocks.isdisjoint(engine.store.blocks.names())


def test_prompts_that_go_on_from_it_go_too(engine: Driver) -> None:
    bad = compute(engine, INJECTED)
    longer = compute(engine, [*INJECTED, *prompt(8, 9)])
    assert purge(engine, bad) == {bad, longer}


def test_an_exact_prompt_that_shares_its_head_stays(engine: Driver) -> None:
    bad, honest = compute(engine, INJECTED), compute(engine, VICTIM)
    assert purge(engine, bad) == {bad}
    assert engine.serve(VICTIM).donors == (honest,)


def test_what_was_made_of_older_rows_of_an_honest_prompt_stays(engine: Driver) -> None:
    """The injected prompt itself took most of its rows from the honest one: they are not its."""
    honest = compute(engine, VICTIM)
    bad = build(engine, INJECTED)
    child = build(engine, [*prompt(9, 10), *BODY])
    assert purge(engine, bad) == {bad}
    assert {one.id for one in engine.store.tree} == {honest, child}


def test_the_head_that_an_older_prompt_has_as_well_stays(engine: Driver) -> None:
    honest = compute(engine, [*HEAD, *prompt(10, 30)])
    bad = compute(engine, INJECTED)
    child = build(engine, [*prompt(11, 6), *HEAD, *prompt(12, 10)])
    assert purge(engine, bad) == {bad}
    assert {one.id for one in engine.store.tree} == {honest, child}


def test_settled_prompts_and_what_was_saved_from_them_stay(engine: Driver) -> None:
    bad = compute(engine, INJECTED)
    build(engine, VICTIM)
    settled = compute(engine, VICTIM)
    assert found(engine, VICTIM, exact=False) is None
    child = build(engine, [*prompt(13, 10), *BODY, *prompt(4, 8)])
    at = engine.store.tree.get(child)
    assert at is not None
    assert at.parent == settled
    assert purge(engine, bad) == {bad}


def test_what_was_saved_from_a_prompt_before_it_was_settled_goes(engine: Driver) -> None:
    bad = compute(engine, INJECTED)
    build(engine, VICTIM)
    child = build(engine, [*prompt(14, 10), *VICTIM])
    settled = compute(engine, VICTIM)
    assert purge(engine, bad) == {bad, child}
    assert engine.store.tree.get(settled) is not None


LOST: list[dict[str, Any]] = [{"merged": True}, {"parent": "f" * 32}]


@pytest.mark.parametrize("change", LOST, ids=["merged", "parent gone"])
def test_where_blocks_say_nothing_text_does(engine: Driver, change: dict[str, Any]) -> None:
    """Rows that were copied, or that a node computed which is gone: nobody knows behind what."""
    bad = compute(engine, INJECTED)
    compute(engine, OTHER)
    build(engine, VICTIM)
    build(engine, [*OTHER[:20], *prompt(17, 3), *OTHER[20:]])
    for child in [one for one in engine.store.tree if not one.exact]:
        names = ("ab" * 32,) * len(child.blocks)
        own = msgspec.structs.replace(child, blocks=names, **change)
        engine.store.nodes.state.replace(child, own)
    done = engine.store.purge_lineage(bad, dry_run=True)
    assert (done.ids, done.unsure) == ((bad, name_of(engine, VICTIM, exact=False)), 1)


def test_what_was_stored_long_before_is_not_unsure(engine: Driver) -> None:
    bad = compute(engine, INJECTED)
    child = engine.store.tree.get(build(engine, VICTIM))
    assert child is not None
    old = msgspec.structs.replace(
        child, blocks=("ab" * 32,) * len(child.blocks), parent=None, created=child.created - 1e5
    )
    engine.store.nodes.state.replace(child, old)
    assert engine.store.purge_lineage(bad, dry_run=True).ids == (bad,)


def test_pinned_nodes_go(engine: Driver) -> None:
    bad = compute(engine, INJECTED)
    child = build(engine, VICTIM)
    assert engine.store.pin(child)
    assert purge(engine, bad) == {bad, child}


def test_nobody_saves_on_top_of_what_was_purged(engine: Driver) -> None:
    """Neither with a plan that is open, nor in a save that is staged, nor as an answer."""
    bad = compute(engine, INJECTED)
    plan = engine.plan(VICTIM)
    staged = engine.stage([*prompt(18, 5), *VICTIM], engine.serve([*prompt(18, 5), *VICTIM]))
    assert not staged.known
    engine.store.purge_lineage(bad)
    with pytest.raises(LeaseError):
        engine.commit(staged)
    assert engine.save(VICTIM, plan) is None
    engine.finish(plan)
    assert engine.save(VICTIM, plan) is None
    assert save_answer(engine, INJECTED, prompt(19, 10)) is None
    assert not list(engine.store.tree)


def test_nobody_saves_on_top_of_an_earlier_form(engine: Driver) -> None:
    """A pin or one more source gives a node another stamp; a plan has the form from before."""
    bad = compute(engine, INJECTED)
    plan = engine.plan(VICTIM)
    assert engine.store.pin(bad)
    engine.store.purge_lineage(bad)
    assert engine.save(VICTIM, plan) is None
    engine.finish(plan)
    assert not list(engine.store.tree)


def test_nobody_saves_on_top_of_a_prompt_whose_place_was_taken(engine: Driver) -> None:
    """Its answer has its rows now, and so is what is purged."""
    compute(engine, INJECTED)
    plan = engine.plan(VICTIM)
    longer = [*prompt(18, 5), *VICTIM]
    staged = engine.stage(longer, engine.serve(longer))
    answer = save_answer(engine, INJECTED, prompt(19, 10))
    assert answer is not None
    assert found(engine, INJECTED, exact=True) is None
    engine.store.purge_lineage(answer)
    with pytest.raises(LeaseError):
        engine.commit(staged)
    assert engine.save(VICTIM, plan) is None
    engine.finish(plan)
    assert not list(engine.store.tree)


def test_nobody_saves_on_top_of_a_prompt_of_which_the_beginning_is_left(engine: Driver) -> None:
    bad = compute(engine, INJECTED)
    plan = engine.plan(VICTIM)
    whole = engine.store.tree.get(bad)
    assert whole is not None
    engine.store.nodes.shorten(whole, 1)
    (left,) = engine.store.tree
    assert left.length < whole.length
    engine.store.purge_lineage(left.id)
    assert engine.save(VICTIM, plan) is None
    engine.finish(plan)
    assert not list(engine.store.tree)


def test_who_sends_it_again_and_again_keeps_no_purge(
    engine: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, remove, sent = compute(engine, INJECTED), LineagePurge._remove, list[str]()

    def removed(purge: LineagePurge, nodes: tuple[Node, ...]) -> None:
        remove(purge, nodes)
        assert len(sent) < 30
        sent.append(compute(engine, [*INJECTED, *prompt(100 + len(sent), 9)]))

    monkeypatch.setattr(LineagePurge, "_remove", removed)
    done = engine.store.purge_lineage(bad)
    assert set(done.ids) == {bad, *sent[:-1]}
    assert [one.id for one in engine.store.tree] == sent[-1:]


def test_it_is_durable(engine: Driver) -> None:
    bad, other = compute(engine, INJECTED), compute(engine, OTHER)
    build(engine, VICTIM)
    config = engine.store.config
    engine.store.purge_lineage(bad)
    engine.store.close()
    with Store(config) as again:
        assert [one.id for one in again.tree] == [other]


def test_a_node_that_is_not_there(engine: Driver) -> None:
    with pytest.raises(NodeError):
        engine.store.purge_lineage("ab" * 16)


# --- any family -----------------------------------------------------------------------------------


class Family:
    """Random prompts of one template, and for each row whether it was computed behind the bad
    prompt's rows."""

    def __init__(self, engine: Driver, seed: int) -> None:
        self.engine, self.draw = engine, random.Random(seed)
        self.pieces = [prompt(number, 15) for number in range(100, 108)] + [BODY[:60]]
        self.texts: list[list[int]] = []
        self.bad: list[int] = []
        self.soiled: dict[tuple[str, int], bool] = {}
        """By block and row."""

    def text(self) -> list[int]:
        """A new one, an edit of an earlier one, or its next turn."""
        draw = self.draw
        if self.texts and draw.random() < 0.2:
            return [*draw.choice(self.texts), *prompt(draw.randrange(10**6), 9)]
        base = [t for piece in draw.sample(self.pieces, draw.randint(3, 6)) for t in piece]
        if self.texts and draw.random() < 0.4:
            base = draw.choice(self.texts)
        at = draw.randrange(len(base))
        return [*base[:at], *prompt(draw.randrange(10**6), 4), *base[at + draw.randint(0, 6) :]]

    def store(self, *, bad: bool) -> None:
        """Serve and save one more prompt, and note what its rows were computed behind."""
        tokens = self.text()
        plan = self.engine.serve(tokens, policy=self.draw.choice(["exact", None, None]))
        name = self.engine.save(tokens, None if plan.declined else plan)
        node = self.engine.store.tree.get(name or "")
        if node is None:
            return
        self.texts.append(tokens)
        self.bad = tokens if bad else self.bad
        behind = bool(self.bad) and tokens[: len(self.bad)] == self.bad
        for place, at in places(node):
            behind |= at >= node.exact_rows and self.soiled.get(place, False)
            self.soiled.setdefault(place, behind)

    def tainted(self, node: Node) -> bool:
        rows = (self.soiled[place] for place, at in places(node) if at >= node.exact_rows)
        return any(rows) or node.tokens.tolist()[: len(self.bad)] == self.bad


def places(node: Node) -> Iterator[tuple[tuple[str, int], int]]:
    """Block and row of each position."""
    for one in node.segments:
        for at in range(one.length):
            yield (node.blocks[one.block], one.row + at), one.start + at


@pytest.mark.parametrize("seed", range(4))
def test_no_row_that_was_computed_behind_it_is_left(engine: Driver, seed: int) -> None:
    family = Family(engine, seed)
    for number in range(14):
        family.store(bad=number == 2)
    soiled = {one.id for one in engine.store.tree if family.tainted(one)}
    others = {one.id for one in engine.store.tree if one.exact} - soiled
    bad = found(engine, family.bad, exact=True) or found(engine, family.bad, exact=False)
    assert bad is not None
    gone = purge(engine, bad.id)
    assert soiled <= gone
    assert gone.isdisjoint(others)
