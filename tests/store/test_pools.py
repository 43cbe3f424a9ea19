"""Pools: what the operator has put there serves every tenant, and joins no two of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.evicting import chosen_nodes
from kvshare_store.errors import NamespaceError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node
from kvshare_store.plan import ReusePlan
from kvshare_store.save.staging import Reuse, reuse_of
from kvshare_store.store import Store
from tests.support.oracle import Driver, RowBook, prompt
from tests.support.tiers import drop_from_host

HOUSE = ("house",)
TEMPLATE = prompt(1, 48)


class Rooms(NamedTuple):
    """Drivers of one store: two tenants and a pool."""

    store: Store
    ann: Driver
    bob: Driver
    pool: Driver


@pytest.fixture
def rooms(
    config: Callable[..., StoreConfig], namespace: Namespace
) -> Iterator[Callable[..., Rooms]]:
    """`rooms(field=value)`: a store in whose pool the template is."""
    opened: list[Store] = []

    def open_(**changes: object) -> Rooms:
        opened.append(Store(config(**changes)))
        found = rooms_of(opened[-1], namespace)
        assert found.pool.save(TEMPLATE)
        return found

    yield open_
    for store in opened:
        store.close()


def rooms_of(store: Store, namespace: Namespace) -> Rooms:
    book = RowBook(namespace.layout, whole=True)
    spaces = (namespace.for_tenant("ann"), namespace.for_tenant("bob"), namespace.in_pool("house"))
    return Rooms(store, *(Driver(store, space, book) for space in spaces))


def nodes_of(driver: Driver) -> list[Node]:
    return driver.store.nodes.state.of_namespace(driver.namespace.digest)


def request(seed: int, length: int = 16) -> list[int]:
    """The template, and what somebody asks."""
    return [*TEMPLATE, *prompt(seed, length)]


def served_and_saved(driver: Driver, tokens: list[int]) -> ReusePlan:
    """As an engine does that reads the pool."""
    plan = driver.plan(tokens, pools=HOUSE)
    driver.finish(plan)
    assert driver.save(tokens, plan)
    return plan


def test_every_tenant_builds_on_the_template(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    for seed, driver in enumerate((found.ann, found.bob), 2):
        plan = served_and_saved(driver, request(seed))
        assert (plan.exact, plan.generation) == (48, 0)
        assert len(plan.pooled) == len(plan.blocks)


def test_who_names_no_pool_reads_none(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    assert found.ann.plan(request(2)).declined == "empty_store"
    assert found.ann.plan(request(2), pools=("another",)).declined == "empty_store"


def test_a_pool_is_of_one_model_and_adapter(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    for other in (
        msgspec.structs.replace(found.ann.namespace, revision="later"),
        found.ann.namespace.for_tenant("ann", "adapter"),
    ):
        assert found.store.plan(request(2), other, pools=HOUSE).declined == "empty_store"


def test_what_a_tenant_saves_is_its_own(rooms: Callable[..., Rooms]) -> None:
    """Its node has all rows, in blocks of its namespace, and no parent in the pool."""
    found = rooms()
    served_and_saved(found.ann, request(2))
    (own,), (template,) = nodes_of(found.ann), nodes_of(found.pool)
    assert set(own.blocks).isdisjoint(template.blocks)
    assert (own.parent, own.exact_rows, own.pinned) == (None, 64, False)
    assert found.store.tree.children(template.id) == []
    again = found.ann.serve(request(3), pools=HOUSE)
    assert (again.exact, again.pooled) == (48, ()), "the tenant's own rows count first"


def test_edited_rows_of_a_pool_are_the_tenants_too(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    tokens = [*prompt(5, 8), *TEMPLATE, *prompt(6, 8)]
    plan = served_and_saved(found.ann, tokens)
    assert plan.reused
    assert (plan.exact, plan.generation) == (0, 1)
    (own,) = nodes_of(found.ann)
    assert (own.generation, own.exact_rows, own.policy) == (1, 8, "aggressive")
    assert set(own.blocks).isdisjoint(nodes_of(found.pool)[0].blocks)
    again = found.ann.serve([*tokens, *prompt(7, 8)], pools=HOUSE)
    assert again.continued == len(tokens)


def test_rows_of_tenant_and_pool_in_one_plan(rooms: Callable[..., Rooms]) -> None:
    """The pool has the beginning, the tenant the end. What is stored points at the tenant's."""
    found = rooms()
    question = prompt(8, 40)
    assert found.ann.save(question)
    tokens = [*TEMPLATE, *question, 1, 2, 3]
    plan = served_and_saved(found.ann, tokens)
    assert plan.exact == 48
    assert plan.reused > 60
    assert 0 < len(plan.pooled) < len(plan.blocks)
    old, new = sorted(nodes_of(found.ann), key=lambda node: node.length)
    assert new.parent == old.id, "its parent is its first donor that is no pool's"
    shared = set(new.blocks) & set(old.blocks)
    assert shared
    template = nodes_of(found.pool)[0]
    assert set(new.blocks).isdisjoint(template.blocks)


def test_no_tenant_reads_another_through_a_pool(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    secret = request(2, 32)
    served_and_saved(found.ann, secret)
    plan = found.bob.serve(secret, pools=HOUSE)
    assert plan.reused == plan.exact == 48, "the template, and nothing of what ann has asked"
    assert set(plan.block_names) <= set(nodes_of(found.pool)[0].blocks)


@pytest.mark.parametrize("salt", ["house", "pool:house", "house\0", ""])
def test_no_salt_leads_into_a_pool(rooms: Callable[..., Rooms], salt: str) -> None:
    found = rooms()
    space = found.pool.namespace.for_tenant(salt)
    assert not space.pool
    assert space.digest != found.pool.namespace.digest
    assert found.store.plan(TEMPLATE, space).declined == "empty_store"


def test_use_of_a_pool_leaves_no_trace_in_it(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    tree = found.store.tree
    tree.clock = lambda: time.monotonic() + 1000
    before = nodes_of(found.pool)
    served_and_saved(found.ann, request(2))
    found.ann.plan(request(3), pools=HOUSE)
    assert found.pool.plan(request(4)).exact == 48, "nor by whoever plans in the pool itself"
    assert [(node, ago > 500) for node, ago in tree.used_within(1e9) if node in before] == [
        (node, True) for node in before
    ]


def test_an_explanation_names_the_pools_nodes(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    (template,) = nodes_of(found.pool)
    told = found.store.explain(request(2), found.ann.namespace, pools=HOUSE)
    assert [(one.node, one.kept) for one in told.candidates] == [(template.id, 48)]
    assert told.by_kind["exact"] == 48
    assert found.store.explain(request(2), found.ann.namespace).declined == "empty_store"
    found.ann.serve(request(2), pools=HOUSE)
    assert found.store.requests.last(1)[0].pools == HOUSE


def test_what_is_learned_of_quality_stays_with_the_tenant(
    rooms: Callable[..., Rooms], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one tenant's answers would choose the policy of another's requests."""
    found, asked = rooms(quality_bound=0.1), []
    monkeypatch.setattr(
        found.store.quality, "rung", lambda space, _, policy: asked.append(space) or policy
    )
    for driver in (found.ann, found.bob):
        assert driver.serve([*prompt(5, 8), *TEMPLATE, *prompt(6, 8)], pools=HOUSE).pooled
    assert asked == [found.ann.namespace.digest, found.bob.namespace.digest]


def test_rows_of_the_operator_need_no_source(rooms: Callable[..., Rooms]) -> None:
    """A cap on what only others have sent does not concern them, and no source is noted there."""
    found = rooms(unconfirmed_share=0.0)
    tokens = [*prompt(5, 8), *TEMPLATE, *prompt(6, 8)]
    for source in (b"", b"ann"):
        assert found.ann.serve(tokens, pools=HOUSE, source=source).pooled
        found.pool.plan([*TEMPLATE, 1], source=source)
    found.store.flush()
    assert [node.sources for node in nodes_of(found.pool)] == [()]
    assert found.bob.save(tokens[:56])
    assert found.bob.serve(tokens[4:], source=b"other").reused == 0, "the cap holds for all else"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_of_the_operator_go_before_those_of_another_source(
    rooms: Callable[..., Rooms], share: float
) -> None:
    """Else somebody who sends the template behind a text of his own has it read instead, and with
    a cap nothing at all."""
    found = rooms(unconfirmed_share=share)
    theirs = [*prompt(9, 4), *TEMPLATE]
    assert found.ann.serve(theirs, source=b"eve").declined
    assert found.ann.save(theirs)
    asked = [*prompt(5, 4), *TEMPLATE]
    plan = found.ann.serve(asked, pools=HOUSE, source=b"ann")
    assert len(plan.pooled) == len(plan.blocks) > 0
    assert found.ann.save(TEMPLATE)
    plan = found.ann.serve(request(2), pools=HOUSE, source=b"ann")
    assert (plan.exact, plan.pooled) == (48, ()), "an exact prefix is the same, whoever sent it"
    plan = found.ann.serve(asked, pools=HOUSE, source=b"eve")
    assert plan.pooled == (), "to whoever has sent it, it is its own"


# --- what a client may claim ----------------------------------------------------------------------


def test_a_save_may_not_build_on_another_tenant_or_a_foreign_pool(
    rooms: Callable[..., Rooms],
) -> None:
    found = rooms()
    other = Driver(found.store, msgspec.structs.replace(found.pool.namespace, revision="later"))
    assert found.bob.save(request(2))
    assert other.save(request(3))
    for theirs in (found.bob, other):
        (node,) = nodes_of(theirs)
        reuse = Reuse(node.segments, tuple(node.blocks), (node.id,))
        with pytest.raises(NamespaceError):
            found.store.stage(node.tokens, found.ann.namespace, reuse)


def test_a_pool_builds_on_no_tenant_and_no_other_pool(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    annex = found.pool.namespace.in_pool("annex")
    assert found.ann.save(request(2))
    for theirs in (found.ann, found.pool):
        plan = theirs.plan([*request(2), 9])
        with pytest.raises(NamespaceError):
            found.store.stage([*request(2), 9], annex, reuse_of(plan))
        theirs.finish(plan)


def test_rows_that_are_withheld_are_not_taken_from_the_pool(rooms: Callable[..., Rooms]) -> None:
    """A client that says it needs to send no rows of the template is told which are wanted."""
    found = rooms()
    plan = found.ann.plan(request(2), pools=HOUSE)
    staged = found.store.stage(request(2), found.ann.namespace, reuse_of(plan))
    assert [tuple(run) for run in staged.fresh] == [(0, 64)]
    found.store.abandon(staged.id)
    found.ann.finish(plan)


# --- what the operator does -----------------------------------------------------------------------


def test_templates_stay_whatever_tenants_store(rooms: Callable[..., Rooms]) -> None:
    """They are pinned from the start, and no quota or rate of tenants is theirs."""
    found = rooms(namespace_nodes=1, saves_per_second=0.5)
    assert found.pool.save(prompt(9, 48))
    assert found.pool.save(prompt(10, 48))
    assert found.ann.save(request(2))
    found.store.evict(nodes=100)
    assert len(nodes_of(found.pool)) == 3
    assert nodes_of(found.ann) == []
    found.store.flush()
    assert all(node.pinned for node in nodes_of(found.pool))


def test_purge_of_a_tenant_leaves_the_pool(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    served_and_saved(found.ann, request(2))
    served_and_saved(found.bob, request(3))
    (done,) = found.store.purge(tenant="ann")
    assert not done.remaining
    assert nodes_of(found.ann) == []
    assert found.ann.serve(request(2), pools=HOUSE).exact == 48
    assert found.bob.serve([*request(3), 1], pools=HOUSE).exact == 64


def test_requests_without_a_tenant_are_not_the_pools(rooms: Callable[..., Rooms]) -> None:
    """The empty name means them in a purge, an eviction and an archive."""
    found = rooms()
    with pytest.raises(NamespaceError):
        found.store.purge(tenant="")
    with pytest.raises(NamespaceError):
        chosen_nodes(found.store, protocol.Evict(tenant=""))
    assert len(nodes_of(found.pool)) == 1


def test_purge_of_a_pool_leaves_the_tenants(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    served_and_saved(found.ann, request(2))
    blocks = set(nodes_of(found.pool)[0].blocks)
    (done,) = found.store.purge(pool="house")
    assert (done.nodes, done.remaining) == (1, ())
    assert blocks.isdisjoint(found.store.blocks.names())
    assert found.ann.serve([*request(2), 1], pools=HOUSE).exact == 64
    assert found.bob.plan(request(3), pools=HOUSE).declined == "empty_store"
    with pytest.raises(NamespaceError, match="pool"):
        found.store.purge(pool="house")


def test_purge_of_a_pool_waits_for_whoever_loads_from_it(rooms: Callable[..., Rooms]) -> None:
    """The rows stay until the load has ended, and what is computed behind them can be stored as
    long as the plan says where they came from."""
    found = rooms()
    plan = found.ann.plan(request(2), pools=HOUSE)
    (done,) = found.store.purge(pool="house")
    assert "leased" in done.remaining[0]
    found.ann.check(request(2), plan)
    assert found.ann.save(request(2), plan)
    found.ann.finish(plan)
    (done,) = found.store.purge(pool="house")
    assert not done.remaining
    assert found.ann.serve([*request(2), 1], pools=HOUSE).exact == 64


def test_a_save_behind_a_pool_that_is_gone_is_not_stored(rooms: Callable[..., Rooms]) -> None:
    found = rooms()
    plan = found.ann.plan(request(2), pools=HOUSE)
    found.ann.finish(plan)
    found.store.purge(pool="house")
    assert found.ann.save(request(2), plan) is None
    assert nodes_of(found.ann) == []


def test_an_encrypted_pool(rooms: Callable[..., Rooms], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are sealed with its own key, those of tenants with theirs."""
    monkeypatch.setenv("POOL_TEST_KEY", "00" * 32)
    found = rooms(encryption_key="env:POOL_TEST_KEY")
    served_and_saved(found.ann, request(2))
    found.store.flush()
    drop_from_host(found.store)
    assert found.bob.serve(request(3), pools=HOUSE).exact == 48
    found.store.purge(pool="house")
    drop_from_host(found.store)
    assert found.ann.serve([*request(2), 1], pools=HOUSE).exact == 64


def test_lossy_rows_of_a_pool_are_edited(rooms: Callable[..., Rooms]) -> None:
    found = rooms(disk_codec="int8")
    found.store.flush()
    drop_from_host(found.store)
    plan = found.store.plan(request(2), found.ann.namespace, pools=HOUSE)
    assert (plan.exact, plan.generation, plan.reused) == (0, 1, 48)
    assert plan.pooled


def test_a_pool_survives_a_restart(
    rooms: Callable[..., Rooms], config: Callable[..., StoreConfig], namespace: Namespace
) -> None:
    found = rooms()
    served_and_saved(found.ann, request(2))
    found.store.close()
    with Store(config()) as store:
        (node,) = store.nodes.state.of_namespace(namespace.in_pool("house").digest)
        assert node.pinned
        plan = store.plan(request(3), namespace.for_tenant("bob"), pools=HOUSE)
        assert plan.exact == 48


def test_published_once_and_read_on_every_machine(machine: Callable[..., Driver]) -> None:
    one, other = machine("one"), machine("other")
    pool = one.namespace.in_pool("house")
    assert Driver(one.store, pool, one.book).save(TEMPLATE)
    one.store.flush()
    deadline = time.monotonic() + 30
    space = one.namespace.for_tenant("bob")
    while other.store.plan(request(2), space, pools=HOUSE).exact != 48:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert other.store.plan(request(2), space).declined
