"""The DELTA tree in steps that people take: some nodes at a time, and a prompt beside its donor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import nsmallest
from typing import Any

import numpy as np

from kvshare_store.daemon import protocol
from kvshare_store.daemon.describe import place_of, shown_node, summary, words_of
from kvshare_store.errors import NodeError
from kvshare_store.maintenance.purge import matching
from kvshare_store.nodes.node import Node
from kvshare_store.store import Store

UNUSED = "unused"
"""Tokens of a donor that the prompt does not take."""


def branch(store: Store, message: protocol.Branch) -> dict[str, Any]:
    """Nodes where a tree begins, or children of one, as far as a list shows them at once."""
    found = _children(store, message.node) if message.node else _of_namespace(store, message)
    rest = [node for node in found if _rank(node) > _cursor(message.after)]
    shown = nsmallest(message.limit, rest, key=_rank)
    return {
        "nodes": [_listed(store, node) for node in shown],
        "total": len(found),
        "next": _text(shown[-1]) if len(rest) > len(shown) else "",
    }


def _children(store: Store, beginning: str) -> list[Node]:
    node = shown_node(store, beginning)
    with store.nodes.lock:
        children = (store.tree.get(child) for child in store.tree.children(node.id))
        return [child for child in children if child is not None]


def _of_namespace(store: Store, message: protocol.Branch) -> list[Node]:
    """Nodes do not change, so what takes time is done without the lock."""
    (namespace,) = matching(store.nodes, message.namespace, None)
    with store.nodes.lock:
        found = store.nodes.state.of_namespace(namespace.digest)
    if message.whole:
        return found
    return [node for node in found if node.parent is None or node.parent not in store.tree]


def _listed(store: Store, node: Node) -> dict[str, Any]:
    return {
        **summary(store, node),
        **place_of(store, node),
        "children": len(store.tree.children(node.id)),
    }


# --- where a list goes on: behind the moment and the id of the last node that it showed -----------


def _rank(node: Node) -> tuple[float, str]:
    """The last stored first."""
    return -node.created, node.id


def _text(node: Node) -> str:
    return f"{node.created!r}-{node.id}"


def _cursor(text: str) -> tuple[float, str]:
    created, _, node_id = text.rpartition("-")
    try:
        return (-float(created), node_id) if text else (-np.inf, "")
    except ValueError as error:
        raise NodeError(f"no list goes on at {text[:60]!r}; begin it anew") from error


# --- a prompt beside the one donor that it may take rows from -------------------------------------


def donor_parts(
    store: Store, donor: Node, parts: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The donor's prompt in runs, each of the kind as which the other prompt takes it."""
    kind_of = np.full(donor.length, UNUSED, "<U10")
    for part in parts:
        if part["donor"] == donor.id:
            kind_of[part["source"] : part["source"] + part["stop"] - part["start"]] = part["kind"]
    cuts = (np.flatnonzero(kind_of[1:] != kind_of[:-1]) + 1).tolist()
    return [
        {
            "start": start,
            "stop": stop,
            "kind": str(kind_of[start]),
            "text": words_of(store, donor.namespace, donor.tokens[start:stop]),
        }
        for start, stop in _runs(cuts, donor.length)
    ]


def _runs(cuts: Sequence[int], length: int) -> Iterable[tuple[int, int]]:
    return zip([0, *cuts], [*cuts, length], strict=True)
