"""Nodes by their ids, for clients that keep objects under names of their own."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest

from kvshare_store.daemon.protocol import Holding
from kvshare_store.store import Store


def has_nodes(store: Store, ids: Sequence[str], *, use: bool = True) -> list[bool]:
    """For each id whether that node is here; with `use` those that are count as used just now."""
    tree = store.tree
    with store.nodes.lock:
        store.nodes.remove_lost()
        for node in map(tree.get, ids if use else ()):
            if node is not None:
                store.nodes.used(node)
        return [node_id in tree for node_id in ids]


def forget(store: Store, ids: Sequence[str], *, pools: bool = False) -> list[str]:
    """Remove nodes; the ids of those that were here. Leased rows stay until their lease ends.
    `pools`: also those of pools, which others cannot remove."""
    with store.nodes.lock:
        found = (store.tree.get(node_id) for node_id in dict.fromkeys(ids))
        here = [n.id for n in found if n is not None and (pools or not store.nodes.pooled(n))]
        store.nodes.remove(here, whatever=True)
    return here


def held(store: Store, model: str) -> list[Holding]:
    """What is stored of each namespace whose model's name begins so."""
    with store.nodes.lock:
        known = [(digest, store.namespace(digest)) for digest in sorted(store.tree.namespaces())]
        return [
            Holding(
                digest,
                namespace,
                store.tree.bytes_of(digest),
                store.tree.count_of(digest),
                *store.nodes.limits.of(namespace),  # in the order in which it has them
            )
            for digest, namespace in known
            if namespace is not None and namespace.model.startswith(model)
        ]


def nodes_of(store: Store, namespace: str, after: str, limit: int) -> list[tuple[str, bytes]]:
    """The next `limit` exact nodes of a namespace behind the id `after`: id and int32 tokens."""
    with store.nodes.lock:
        found = [
            node
            for node in store.nodes.state.of_namespace(namespace)
            if node.exact and node.id > after
        ]
    chosen = nsmallest(limit, found, key=lambda node: node.id)
    return [(node.id, node.token_bytes) for node in chosen]
