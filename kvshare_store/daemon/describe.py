"""What the daemon tells people about its nodes, in plain types."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from typing import Any

import numpy as np

from kvshare_store.errors import NodeError
from kvshare_store.errors.wording import short
from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.lookup.text import decode
from kvshare_store.maintenance.purge import matching
from kvshare_store.nodes.edits import Edit, Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.plan.contexts import Context, cut_contexts
from kvshare_store.store import Store

_PREVIEW_TOKENS = 24


def list_nodes(
    store: Store, limit: int, pool: str = "", tenant: str | None = None
) -> list[dict[str, Any]]:
    """Summaries of the nodes, or of those of a pool or a tenant, the most recently used first;
    `NamespaceError` for a tenant that has no namespace here."""
    whole = bool(pool) or tenant is not None
    with store.nodes.lock:  # nodes do not change: what takes time is done without it
        newest = store.tree.newest(len(store.tree) if whole else limit)
        spaces = store.nodes.namespaces.by_digest()
        theirs = matching(store.nodes, "", tenant) if tenant is not None else spaces.values()
    if whole:
        meant = {space.digest for space in theirs if not pool or space.pool == pool}
        newest = [node for node in newest if node.namespace in meant]
    return [summary(store, node) for node in newest[: max(0, limit)]]


def show_node(store: Store, beginning: str) -> dict[str, Any]:
    """A node in full: summary, text of every edit, blocks with the tier they are in, path."""
    whole = shown_node(store, beginning).id
    with store.nodes.lock:
        node = found_node(store, whole)
        parent = store.tree.get(node.parent) if node.parent else None
        family = {
            "path": [ancestor.id for ancestor in store.tree.path(node.id)],
            "children": store.tree.children(node.id),
            "lineage": _lineage(store, node),
        }
        users = [len(store.tree.users(name)) for name in node.blocks]
    return {
        **summary(store, node),
        **family,
        "contexts": [{"start": at.start, "stop": at.stop} for at in node.contexts],
        "continued_rows": continued_rows(node, parent),
        "edits": [edit_text(store, node, parent, edit) for edit in node.edits] if parent else [],
        "text": _text(store, node, 0, node.length),
        "verdict": store.verdicts.of_node(node.id),
        "blocks": _blocks(store, node, users),
    }


def continued_rows(node: Node, parent: Node | None) -> int:
    """Rows behind the exact ones that stay in the context in which `parent` has them: the same
    tokens before them, and the same edited rows."""
    if parent is None:
        return 0
    common = common_prefix(node.tokens, parent.tokens)
    pairs = zip_longest(node.contexts, parent.contexts)
    differ = next(({one, other} - {None} for one, other in pairs if one != other), set[Context]())
    # where the first two that differ both begin, they are the same up to the end of one, if at all
    places = (min((at.start for at in differ), default=common), *(at.stop for at in differ))
    ends = {common, *(end for end in places if end < common)}
    for end in sorted(ends, reverse=True):
        if cut_contexts(node.contexts, end) == cut_contexts(parent.contexts, end):
            return max(0, end - node.exact_rows)
    return 0


def _blocks(store: Store, node: Node, users: list[int]) -> list[dict[str, Any]]:
    rows = Counter[int]()
    for segment in node.segments:
        rows[segment.block] += segment.length
    return [
        {
            "name": name,
            "tier": store.blocks.tier_of(name) or "gone",
            "rows": rows[index],
            "users": users[index],
        }
        for index, name in enumerate(node.blocks)
    ]


def pin_node(store: Store, beginning: str, pinned: bool) -> str:
    """Pin the one node that begins so, or pin it no longer; its id, once that is durable."""
    node = found_node(store, beginning)
    if not store.pin(node.id, pinned):
        raise NodeError(f"node {short(node.id)} has just left the store")
    store.flush()
    return node.id


def found_node(store: Store, beginning: str) -> Node:
    """The one node whose id begins so, or that replaced the one whose id began so; `NodeError` if
    there is none, or are several."""
    return _only(_beginning(store, beginning), beginning)


def shown_node(store: Store, beginning: str) -> Node:
    """As `found_node`, and also for a node that was replaced before a restart. Only for those who
    ask: whoever removes or pins nodes means those that are there."""
    found = _beginning(store, beginning) or store.saving.answers.replaced_before(beginning)
    return _only(found, beginning)


def _beginning(store: Store, beginning: str) -> list[Node]:
    """The nodes whose ids begin so, or that replaced those whose ids began so."""
    whole = store.tree.get(beginning)  # all ids have one length
    if whole is not None:
        return [whole]
    with store.nodes.lock:
        found = [node for node in store.tree if node.id.startswith(beginning)]
    return found or store.saving.answers.successors(beginning)


def _only(found: list[Node], beginning: str) -> Node:
    if len(found) != 1:
        raise NodeError(
            f"{len(found)} nodes begin with {beginning!r}; `kvshare ls` shows their ids"
        )
    return found[0]


def _lineage(store: Store, node: Node) -> dict[str, dict[str, Any]]:
    """For each ancestor, the node and each child: what its edit cost, and the rows it brought."""
    children = [store.tree.get(child) for child in store.tree.children(node.id)]
    family = [*store.tree.path(node.id), *(child for child in children if child is not None)]
    return {one.id: place_of(store, one) for one in family}


def place_of(store: Store, node: Node) -> dict[str, Any]:
    """What the edit that led to a node cost, and the rows that it brought."""
    parent = store.tree.get(node.parent) if node.parent else None
    shared = set(parent.blocks) if parent is not None else set()
    own = {at for at, name in enumerate(node.blocks) if name not in shared}
    return {
        "tokens": node.length,
        "added": sum(len(edit.tokens) for edit in node.edits),
        "removed": sum(e.stop - e.start for e in node.edits if e.kind in ("delete", "replace")),
        "own_rows": sum(s.length for s in node.segments if s.block in own),
        "own_blocks": len(own),
        "pinned": node.pinned,
        "merged": node.merged,
    }


def summary(store: Store, node: Node) -> dict[str, Any]:
    """What a list says of a node."""
    namespace = store.namespace(node.namespace)
    return {
        "id": node.id,
        "namespace": short(node.namespace),
        "model": namespace.model if namespace else "",
        "tenant": namespace.tenant if namespace else "",
        "pool": (namespace.pool or "") if namespace else "",
        "tokens": node.length,
        "answer_tokens": node.answer_tokens,
        "exact_rows": node.exact_rows,
        "generation": node.generation,
        "policy": node.policy,
        "parent": node.parent,
        "parent_stored": not node.parent or node.parent in store.tree,
        "created": node.created,
        "pinned": node.pinned,
        "merged": node.merged,
        "sources": len(node.sources),
        "preview": _preview(store, node),
    }


def _preview(store: Store, node: Node) -> str:
    """What tells a prompt from others: of one that was edited where its first new text stands, of
    any other its beginning, which chats and templates have in common."""
    start = _first_new(node)
    return ("… " if start else "") + _text(store, node, start, start + _PREVIEW_TOKENS)


def _first_new(node: Node) -> int:
    """Where the first text is that the parent does not have; 0 if there is none."""
    at = 0
    for edit in node.edits:
        if edit.tokens:
            return at
        if edit.kind == "keep":
            at += edit.stop - edit.start
    return 0


def edit_text(store: Store, node: Node, parent: Node, edit: Edit) -> dict[str, Any]:
    """An edit of `parent` that leads to `node`, in words."""
    removed = "" if edit.kind == "insert" else _text(store, parent, edit.start, edit.stop)
    return {
        "kind": edit.kind,
        "start": edit.start,
        "stop": edit.stop,
        "removed": removed,
        "added": words_of(store, node.namespace, np.asarray(edit.tokens, np.int32)),
    }


def _text(store: Store, node: Node, start: int, stop: int) -> str:
    return words_of(store, node.namespace, node.tokens[start:stop])


def words_of(store: Store, digest: str, tokens: Tokens) -> str:
    """Tokens as text, or as numbers where the namespace names no tokenizer."""
    namespace = store.namespace(digest)
    text = decode(namespace.tokenizer, tokens) if namespace is not None else None
    return text if text is not None else " ".join(map(str, tokens.tolist()))
