"""What a store does for each message. In the threads of the lanes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import by_id, protocol, roles
from kvshare_store.daemon.chores import CHORES, do_chore
from kvshare_store.daemon.connection import Connection
from kvshare_store.daemon.outbox import Received
from kvshare_store.daemon.questions import QUESTIONS, answer
from kvshare_store.daemon.rows import Inboxes, read_rows
from kvshare_store.errors import DeadlineError, PlanError
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import ReusePlan
from kvshare_store.store import Store

_INBOX_SHARE = 4
"""Rows that other machines send may take this part of `host_bytes` before they are saved."""
_OWNERS = ("remote", "catalog", "encryption_key", "tenant_key", "source_key", "http_token")
"""Settings in which addresses with passwords, or commands, may stand."""
_WRITING = (protocol.Commit, protocol.Clear, *CHORES)

_OF_THE_STORE: dict[type, Callable[[Store, Any, Any], Any]] = {
    protocol.Decline: lambda store, it, _: store.outcomes.decline(
        it.reason, it.tokens, it.request, it.namespace
    ),
    protocol.Prefilled: lambda store, it, _: store.requests.prefilled(it.request, it.seconds),
    protocol.EngineCached: lambda store, it, _: store.outcomes.engine_cached(it.tokens, it.request),
    protocol.Finish: lambda store, it, _: store.finish(it.lease, it.outcome),
    protocol.Working: lambda store, it, client: store.text.working(client.owner, it.busy),
    protocol.NextLook: lambda store, it, client: store.next_look(
        client.owner, it.namespaces, scores=it.scores
    ),
    protocol.Looked: lambda store, it, client: store.saving.looks.ended(
        client.owner, it.node, it.stamp, it.end, it.regrets
    ),
    protocol.ReadRows: lambda store, it, _: read_rows(store, it),
    protocol.Failed: lambda store, it, _: store.metrics.error(it.kind),
    protocol.Ready: lambda store, *_: {
        "state": store.metrics.health.report()["state"],
        "draining": store.draining,
    },
    protocol.Flush: lambda store, _, client: store.flush(owner=client.owner),
    **dict.fromkeys(QUESTIONS, lambda store, it, _: answer(store, it)),
    protocol.HasNodes: lambda store, it, _: by_id.has_nodes(store, it.nodes, use=it.use),
    protocol.Forget: lambda store, it, client: by_id.forget(
        store, it.nodes, pools=client.role == "admin"
    ),
    protocol.Held: lambda store, it, _: by_id.held(store, it.model),
    protocol.NodesOf: lambda store, it, _: by_id.nodes_of(store, it.namespace, it.after, it.limit),
    protocol.Clear: lambda store, *_: store.clear(),
}
"""What is done for messages that the store answers alone: called with it, the message and the
client."""


class Handling:
    """Answers for one store. Thread-safe."""

    def __init__(
        self,
        store: Store,
        stats: Callable[[], dict[str, Any]],
        check_home: Callable[[], None],
    ) -> None:
        """`stats`: of store and daemon; `check_home`: raises if nothing may be written any more."""
        self._store = store
        self._stats = stats
        self._check_home = check_home
        self.inboxes = Inboxes(store.config.host_bytes // _INBOX_SHARE)
        self._handlers: dict[type, Callable[[Any, Any], Any]] = {
            protocol.Settings: self._settings,
            protocol.Observe: self._observe,
            protocol.Stage: self._stage,
            protocol.WriteRows: lambda it, client: self.inboxes.write(self._store, client, it),
            protocol.Commit: self._commit,
            protocol.Abandon: self._abandon,
            protocol.Stats: lambda *_: self._stats(),
            protocol.PlanNode: self._plan_node,
        }

    def answer(
        self, message: Any, client: Connection | None, came: float, given_up: Callable[[], bool]
    ) -> Any:
        """What is answered to a message, or the future of that. `client`: None for whoever asks a
        question from this process; `came`: when it arrived (monotonic seconds); `given_up`: whether
        nobody wants the answer any more."""
        if isinstance(message, _WRITING):
            self._check_home()
        if isinstance(message, CHORES):
            return do_chore(self._store, message, given_up)
        if isinstance(message, protocol.Plan) and client is not None:
            return self._plan(message, client, came)
        own = self._handlers.get(type(message))
        if own is not None:
            return own(message, client)
        return _OF_THE_STORE[type(message)](self._store, message, client)

    def _plan(self, message: protocol.Plan, client: Connection, came: float) -> Any:
        """`came`: when the request arrived (monotonic seconds)."""
        now, tokens, space = time.monotonic(), _tokens(message.tokens), message.namespace
        if client.gone or (0 < message.until < now and not client.remote):
            raise DeadlineError("the engine has stopped waiting for this plan")
        if now - came > self._store.config.plan_deadline_ms / 1e3:
            if not message.look:
                self._store.outcomes.decline("late", len(tokens), message.request, space)
            return ReusePlan(namespace=space.digest, tokens=len(tokens), declined="late")
        return self._store.plan_soon(
            tokens,
            space,
            policy=message.policy,
            owner=client.owner,
            request=message.request,
            far=client.remote,
            look=message.look,
            pools=message.pools,
            source=b"" if client.role == "reader" else message.source,  # nodes remember sources
            stores=client.role != "reader",
        )

    def _plan_node(self, message: protocol.PlanNode, client: Connection) -> Any:
        left_ms = self._store.config.plan_deadline_ms
        if message.until and not client.remote:
            left_ms = min((message.until - time.monotonic()) * 1e3, left_ms)
        if client.gone or not left_ms >= 0:  # nor where it is no number
            raise DeadlineError("the client has stopped waiting for these rows")
        return self._store.serving.plan_node(message.node, client.owner, left_ms, far=client.remote)

    def _settings(self, _: protocol.Settings, client: Connection | None) -> StoreConfig:
        """Without what may hold secrets, for engines of other machines."""
        config = self._store.config
        if client is None or not client.remote or client.role == "admin":
            return config
        return msgspec.structs.replace(config, **dict.fromkeys(_OWNERS, ""))

    def _observe(self, message: protocol.Observe, client: Connection) -> None:
        self._store.observe(message.model, message.tokens, message.seconds, far=client.remote)

    def _stage(self, message: protocol.Stage, client: Connection) -> Any:
        self.inboxes.clear(client)
        roles.check_writer(message.namespace, client.role)
        return self._store.stage(
            _tokens(message.tokens),
            message.namespace,
            message.reuse,
            owner=client.owner,
            extends=message.extends,
            greedy=message.greedy,
            request=message.request,
            source=message.source,
        )

    def _commit(self, message: protocol.Commit, client: Connection) -> str | None:
        try:
            return self._store.commit(message.staged, Received(client.outbox))
        finally:
            self.inboxes.clear(client)

    def _abandon(self, message: protocol.Abandon, client: Connection) -> None:
        self.inboxes.clear(client)
        self._store.abandon(message.staged)


def _tokens(raw: bytes) -> Tokens:
    try:
        return np.frombuffer(raw, np.int32)
    except ValueError as error:
        raise PlanError(f"{len(raw)} bytes are no int32 tokens") from error
