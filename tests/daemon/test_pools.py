"""What clients of each role may do with a pool, whatever they send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import DeniedError, ProtocolError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.save.staging import Reuse
from tests.support.daemons import ClientDriver, serving
from tests.support.oracle import RowBook, prompt

TEMPLATE = prompt(1, 48)
HOUSE = ("house",)


class Sides(NamedTuple):
    """The operator in the pool, and an engine that serves a tenant."""

    operator: ClientDriver
    engine: ClientDriver

    def held(self) -> dict[str, bytes]:
        """What the pool holds, by node."""
        message = protocol.NodesOf(self.operator.namespace.digest)
        return dict(self.operator.client.call(message))


@pytest.fixture
def sides(config: Callable[..., StoreConfig], namespace: Namespace) -> Iterator[Sides]:
    """A daemon with a template in its pool."""
    settings = config()
    book = RowBook(namespace.layout)
    with (
        serving(settings),
        Client(settings.home_path) as admin,
        Client(settings.home_path, role="engine") as client,
    ):
        operator = ClientDriver(admin, namespace.in_pool("house"), book)
        assert operator.save(TEMPLATE)
        yield Sides(operator, ClientDriver(client, namespace.for_tenant("ann"), book))


def planned(client: Client, namespace: Namespace, **options: tuple[str, ...]) -> ReusePlan:
    plan = client.plan([*TEMPLATE, *prompt(2, 16)], namespace, **options)
    if plan.lease:
        client.call(protocol.Finish(plan.lease, Outcome(recomputed=plan.tokens)))
    return plan


def test_an_engine_reads_the_pools_that_it_names(sides: Sides) -> None:
    client, space = sides.engine.client, sides.engine.namespace
    found = planned(client, space, pools=HOUSE)
    assert (found.exact, found.pooled) == (48, tuple(range(len(found.blocks))))
    assert planned(client, space, pools=("annex", "another")).declined == "empty_store"
    assert planned(client, space).declined == "empty_store"


def test_no_name_of_a_pool_leads_to_a_tenant(sides: Sides) -> None:
    """Names are all that a plan can say: what it is made of is the request's own namespace."""
    space = sides.engine.namespace
    assert sides.engine.save([*TEMPLATE, *prompt(2, 16)])
    other = space.for_tenant("bob")
    for name in ("ann", space.digest, f"tenant={space.tenant}"):
        assert planned(sides.engine.client, other, pools=(name,)).declined == "empty_store"


def test_an_engine_cannot_store_into_a_pool(sides: Sides) -> None:
    before = sides.held()
    pool, tokens = sides.operator.namespace, np.asarray(prompt(3, 48), np.int32)
    with pytest.raises(DeniedError, match="kvshare publish"):
        sides.engine.client.stage(tokens, pool, Reuse())
    with pytest.raises(DeniedError):
        sides.engine.client.stage_bytes(tokens.tobytes(), pool, Reuse(), 40)
    both = msgspec.to_builtins(pool) | {"tenant": "ann"}
    message = msgspec.to_builtins(protocol.Stage(pool, tokens.tobytes(), Reuse()))
    body = msgspec.msgpack.encode(message | {"type": "stage", "namespace": both})
    with pytest.raises(ProtocolError, match="a pool has no tenant"):
        protocol.decode_request(body)
    assert sides.held() == before


def test_an_engine_cannot_remove_what_is_in_a_pool(sides: Sides) -> None:
    (node,) = sides.held()
    own = sides.engine.save(prompt(4, 32))
    forget = protocol.Forget((node, str(own)))
    assert sides.engine.client.call(forget) == [own], "its own it can"
    for message in (
        protocol.Pin(node, False),
        protocol.Purge(pool="house"),
        protocol.Purge(sides.operator.namespace.digest),
        protocol.Evict((node,)),
    ):
        with pytest.raises(DeniedError):
            sides.engine.client.call(message)
    assert list(sides.held()) == [node]
    assert sides.operator.client.call(forget) == [node]


def test_a_plan_names_few_pools(sides: Sides) -> None:
    message = protocol.Plan(sides.engine.namespace, b"1234", pools=("p",) * 17)
    with pytest.raises(ProtocolError):
        protocol.decode_request(protocol.encode(message))


def test_what_is_told_of_a_pool(sides: Sides) -> None:
    """Lists name it; requests without a tenant are not taken for it."""
    assert sides.engine.save(prompt(5, 32))
    call = sides.operator.client.call
    every, listed = call(protocol.ListNodes()), call(protocol.ListNodes(pool="house"))
    assert sorted((node["tenant"], node["pool"]) for node in every) == [("", "house"), ("ann", "")]
    assert [node["id"] for node in listed] == list(sides.held())
    assert call(protocol.ListNodes(pool="annex")) == []
    held = call(protocol.Held("model"))
    assert sorted(one["namespace"].get("pool", "") for one in held) == ["", "house"]
