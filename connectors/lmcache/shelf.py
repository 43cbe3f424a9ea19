"""Stores and loads objects in a home, for the adapter's threads. It does not know LMCache.

A daemon that is gone is started again, once in each call. Errors are left to the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import msgspec
from kvshare_connectors.lmcache.objects import MODEL, ROWS, Parts, Place, key_of, nbytes_of

from kvshare_store.bounded import pieces
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.spawn import ensure_daemon
from kvshare_store.errors import (
    ConfigError,
    KVShareError,
    MissError,
    NoSpaceError,
    OverloadError,
    UnavailableError,
)
from kvshare_store.errors.wording import short
from kvshare_store.namespace import Tenants
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.save.staging import Reuse

T = TypeVar("T")

PATIENCE_S = 30.0
"""The longest time for one object to come from the slowest tier, and for one message to be
answered."""
_FLUSH_S = 600.0
_ASKED_AT_ONCE = 10_000
"""Ids in one message."""


class Shelf:
    """One connection to a home's daemon. One thread, one shelf.

    `ConfigError` if the home refuses objects of this size of prompt; `UnavailableError` if no
    daemon can be started.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._client: Client | None = None

    def client(self) -> Client:
        """Connected to a daemon that takes objects."""
        if self._client is None:
            client = ensure_daemon(self._config)
            try:
                check_settings(client)
            except KVShareError:
                client.close()
                raise
            self._client = client
        return self._client

    def close(self) -> None:
        """Let go of the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tried(self, work: Callable[[Client], T]) -> T:
        try:
            return work(self.client())
        except UnavailableError:  # the daemon was restarted, or is to be
            self.close()
            return work(self.client())

    def _ask(self, message: protocol.Request, kind: Any) -> Any:
        answer = self._tried(lambda client: client.call(message, PATIENCE_S))
        return msgspec.convert(answer, kind)

    # --- what is here ----------------------------------------------------------------------------

    def has(self, nodes: Sequence[str]) -> list[bool]:
        """Which nodes are here; these will be among the last to be evicted."""
        found: list[bool] = []
        for some in pieces(nodes, _ASKED_AT_ONCE):
            found += self._ask(protocol.HasNodes(tuple(some)), list[bool])
        return found

    def held(self, model: str = "") -> list[protocol.Holding]:
        """What is stored of each namespace of objects, of every model or of one."""
        found = self._ask(protocol.Held(MODEL + model), list[protocol.Holding])
        return [one for one in found if not model or one.namespace.model == MODEL + model]

    def keys(
        self, holding: protocol.Holding, after: str, limit: int, tenants: Tenants
    ) -> list[tuple[str, Parts, int]]:
        """The next objects of a namespace by id: id, key and size."""
        message = protocol.NodesOf(holding.digest, after, limit)
        found = self._ask(message, list[tuple[str, bytes]])
        nbytes = nbytes_of(holding.namespace)
        return [
            (node, key_of(holding.namespace, tokens, tenants), nbytes) for node, tokens in found
        ]

    # --- in and out ------------------------------------------------------------------------------

    def put(self, place: Place, data: memoryview) -> None:
        """Store an object; it is durable after `flush`."""
        self._tried(lambda client: _put(client, place, data))

    def flush(self) -> None:
        """Return once all that was put is durable; `StorageError` if some of it may be lost."""
        self._tried(lambda client: client.flush(_FLUSH_S))

    def take(self, place: Place, target: memoryview) -> bool:
        """Copy an object into `target`, which has its size; False if it is not here."""
        return self._tried(lambda client: _take(client, place, target))

    def forget(self, nodes: Sequence[str]) -> set[str]:
        """Remove objects; the ids of those that were here."""
        gone: set[str] = set()
        for some in pieces(nodes, _ASKED_AT_ONCE):
            gone |= set(self._ask(protocol.Forget(tuple(some)), list[str]))
        return gone


def check_settings(client: Client) -> None:
    """`ConfigError` if the home would refuse objects as prompts that are too short."""
    settings = client.call(protocol.Settings())
    least = settings["min_prompt_tokens"]
    if least > ROWS:
        raise ConfigError(
            f"min_prompt_tokens of {client.home} is {least}: LMCache's objects are prompts of "
            f"{ROWS} tokens there; set it to {ROWS} or less, or give LMCache a home of its own"
        )


def _put(client: Client, place: Place, data: memoryview) -> None:
    try:
        _save(client, place, data)
    except (NoSpaceError, OverloadError):  # too much waits for the disk
        client.flush(_FLUSH_S)
        _save(client, place, data)


def _save(client: Client, place: Place, data: memoryview) -> None:
    staged = client.stage(place.tokens, place.namespace, Reuse())
    if not staged.known:
        client.commit(staged, place.blocks(data, staged.sizes))


def _take(client: Client, place: Place, target: memoryview) -> bool:
    until = time.monotonic() + PATIENCE_S
    answer = client.call(protocol.PlanNode(place.node, until), PATIENCE_S)
    plan = msgspec.convert(answer, ReusePlan)
    if plan.declined:
        return False
    start = time.perf_counter()
    try:
        _copy(client, plan, target)
    except KVShareError as error:
        client.finish(plan.lease, Outcome(recomputed=plan.tokens, failed=str(error.kind)))
        if isinstance(error, MissError):
            return False
        raise
    seconds = time.perf_counter() - start
    client.finish(plan.lease, Outcome(exact=plan.tokens, nbytes=len(target), seconds=seconds))
    return True


def _copy(client: Client, plan: ReusePlan, target: memoryview) -> None:
    """The blocks of an object in the order in which they were stored."""
    at, leased = 0, client.leased_rows(plan.lease, plan.arena, plan.blocks)
    for span in plan.spans:
        ref = plan.blocks[span.block]
        if span.row or span.length != ref.rows:
            raise MissError(f"block {short(ref.name)} was packed anew")
        part = target[at : at + ref.nbytes]
        leased.check(ref)
        part[:] = leased.rows(ref.offset, ref.nbytes)[: len(part)]
        at += ref.nbytes
    for ref in plan.blocks:
        leased.check(ref)
