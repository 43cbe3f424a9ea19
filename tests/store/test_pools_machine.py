"""The state machine of a store with two tenants and a pool that both may build on."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, rule

from kvshare_store.errors import NamespaceError
from kvshare_store.plan import ReusePlan
from tests.support.machines import StoreMachine, Which, examples, prompts
from tests.support.oracle import RowBook

POOL = 2
"""Its place among the namespaces, behind the tenants'."""
_MOST = 3
"""Templates: pinned rows must leave room in a small store."""


class PoolMachine(StoreMachine):
    """Also: publish, withdraw."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces.append(self.namespaces[0].in_pool("house"))
        self.books[self.namespaces[POOL].digest] = RowBook(self.row_layout, whole=True)

    def pools(self, space: int) -> tuple[str, ...]:
        return ("house",) if space < POOL else ()

    def check_blocks(self, plan: ReusePlan, space: int) -> None:
        """They are of the tenant or the pool, and the plan says which of them are the pool's. That
        they hold the right rows the book knows: a tenant's has what the tenant and the pool have
        stored."""
        own, pool = self.namespaces[space].digest, self.namespaces[POOL].digest
        for at, name in enumerate(plan.block_names):
            owners = {node.namespace for node in self.store.nodes.state.users(name)}
            assert owners == ({pool} if at in plan.pooled else {own})

    @rule(which=prompts)
    def publish(self, which: Which) -> None:
        """The operator stores a template; every tenant may be served its rows."""
        tokens = self._prompt(which)
        if self.store.tree.count_of(self.namespaces[POOL].digest) >= _MOST:
            return
        for space in self.namespaces[:POOL]:
            rows = self.books[space.digest].computed(tokens, len(tokens), "")
            self.books[space.digest].write(tokens, rows, range(len(tokens)), len(tokens))
        self._save_fresh(tokens, POOL)

    @rule()
    def withdraw(self) -> None:
        """The operator purges the pool once nobody loads from it: tenants lose nothing."""
        while self.open:
            self._finish(self.open.pop())
        digest = self.namespaces[POOL].digest
        others = [node.id for node in self.store.tree if node.namespace != digest]
        try:
            (done,) = self.store.purge(pool="house")
        except NamespaceError:
            assert self.store.tree.count_of(digest) == 0
            return
        assert done.remaining == ()
        assert [node.id for node in self.store.tree] == others

    @invariant()
    def namespaces_share_nothing(self) -> None:
        """Every block has rows of one namespace, and every parent is of its child's."""
        for node in self.store.tree:
            for name in node.blocks:
                assert {n.namespace for n in self.store.nodes.state.users(name)} == {node.namespace}
            parent = self.store.tree.get(node.parent) if node.parent else None
            assert parent is None or parent.namespace == node.namespace
            assert node.pinned == (node.namespace == self.namespaces[POOL].digest)


TestPoolMachine = pytest.mark.timeout(900)(PoolMachine.TestCase)  # shrinking a failure takes long
TestPoolMachine.settings = settings(
    max_examples=examples(6),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
