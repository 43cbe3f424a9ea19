"""Which nodes an operator wants forgotten."""

from __future__ import annotations

import time

import msgspec

from kvshare_store.config import policy_names
from kvshare_store.daemon import protocol
from kvshare_store.daemon.describe import found_node
from kvshare_store.errors import ConfigError
from kvshare_store.errors.wording import unknown
from kvshare_store.maintenance.purge import matching
from kvshare_store.nodes.node import Node
from kvshare_store.store import Store


class Evicted(msgspec.Struct, frozen=True):
    """What was, or would be, forgotten."""

    nodes: tuple[str, ...]
    tokens: int
    pinned: tuple[str, ...]
    """They match, and stay."""


def evict_nodes(store: Store, message: protocol.Evict) -> Evicted:
    """Forget the nodes that a message means. `NodeError` for one that is not here, `ConfigError`
    for a message that means all or a policy that does not exist, `NamespaceError` for a tenant that
    is not known."""
    if not (message.nodes or message.tenant is not None or message.older_than is not None
            or message.policy):  # fmt: skip
        raise ConfigError("name what to evict; `kvshare clear` forgets every prompt")
    if message.policy and message.policy not in policy_names():
        raise ConfigError(unknown("policy", message.policy, policy_names()))
    with store.nodes.lock:
        found = chosen_nodes(store, message)
        goes = [node for node in found if not node.pinned]
        if not message.dry_run:
            store.nodes.remove([node.id for node in goes], whatever=True)
    if not message.dry_run:
        store.repository.queue.flush(removed=True)
    return Evicted(
        tuple(node.id for node in goes),
        sum(node.length for node in goes),
        tuple(node.id for node in found if node.pinned),
    )


def chosen_nodes(store: Store, message: protocol.Evict) -> list[Node]:
    """The nodes for which all holds that a message says; `NamespaceError` for a tenant that has
    no namespace here."""
    with store.nodes.lock:
        found = [node for node in _named(store, message) if _meant(node, message)]
        if message.tenant is None:
            return found
        theirs = {namespace.digest for namespace in matching(store.nodes, "", message.tenant)}
        return [node for node in found if node.namespace in theirs]


def _named(store: Store, message: protocol.Evict) -> list[Node]:
    if not message.nodes:
        return list(store.tree)
    named = (found_node(store, beginning) for beginning in message.nodes)
    return list({node.id: node for node in named}.values())


def _meant(node: Node, message: protocol.Evict) -> bool:
    if message.older_than is not None and time.time() - node.created <= message.older_than:
        return False
    return not message.policy or node.policy == message.policy
