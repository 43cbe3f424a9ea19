"""What people ask about a store, answered for a daemon or for whoever opened the home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import msgspec
import numpy as np

from kvshare_store.daemon import protocol
from kvshare_store.daemon.describe import (
    edit_text,
    list_nodes,
    show_node,
    shown_node,
    summary,
    words_of,
)
from kvshare_store.daemon.planned_again import differs, under_its_bound
from kvshare_store.daemon.scored import quality
from kvshare_store.daemon.walking import branch, donor_parts
from kvshare_store.errors import NamespaceError, NodeError, PlanError
from kvshare_store.errors.wording import short
from kvshare_store.lookup.align import align
from kvshare_store.lookup.request_log import Logged
from kvshare_store.lookup.text import encode
from kvshare_store.maintenance.purge import matching
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens, edit_script
from kvshare_store.nodes.node import Node
from kvshare_store.store import Store

Question = (
    protocol.ListNodes | protocol.Branch | protocol.ShowNode | protocol.Explain
    | protocol.ListRequests | protocol.Quality | protocol.Diff
)  # fmt: skip
QUESTIONS = get_args(Question)


def answer(store: Store, message: Question) -> Any:
    """The answer to one message, in plain types. Nothing changes."""
    if isinstance(message, protocol.ListNodes):
        return list_nodes(store, message.limit, message.pool, message.tenant)
    if isinstance(message, protocol.Branch):
        return branch(store, message)
    if isinstance(message, protocol.ShowNode):
        return show_node(store, message.node)
    if isinstance(message, protocol.Explain):
        return explain(store, message)
    if isinstance(message, protocol.Quality):
        return quality(store, message)
    if isinstance(message, protocol.Diff):
        return diff(store, message.first, message.second)
    found = store.requests.last(
        message.limit, declined=message.declined, slow=message.slow, request=message.request
    )
    return [_plain(store, _with_donors_now(store, entry)) for entry in found]


def _with_donors_now(store: Store, entry: Logged) -> Logged:
    """The entry with its donors under the ids that they have now: the answer to a donor may have
    made its node a longer one since."""
    now = [(donor, store.saving.answers.now(donor)) for donor in entry.donors]
    donors = tuple(donor if node is None else node.id for donor, node in now)
    return msgspec.structs.replace(entry, donors=donors)


def _plain(store: Store, entry: Logged) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(
        msgspec.structs.replace(entry, prompt=b"", source=b"")
    )
    del found["prompt"], found["source"]
    verdict = store.verdicts.of_request(entry.request, entry.namespace)
    return found | {"verdict": verdict}


def diff(store: Store, first: str, second: str) -> dict[str, Any]:
    """The edits that turn the first prompt into the second."""
    one, other = shown_node(store, first), shown_node(store, second)
    matches = align(other.tokens, one.tokens)
    edits = edit_script(matches, one.length, other.tokens)
    kept = sum(match.length for match in matches)
    return {
        "first": summary(store, one),
        "second": summary(store, other),
        "kept": kept,
        "removed": one.length - kept,
        "added": other.length - kept,
        "edits": [edit_text(store, other, one, edit) for edit in edits],
    }


def explain(store: Store, message: protocol.Explain) -> dict[str, Any]:
    """Why a plan is so. For a logged request also how it ended, which is all if its tokens were not
    kept; it is planned under the policy that it got, unless another is asked for."""
    logged = _logged(store, message.request) if message.request else None
    if logged is not None and not logged.prompt:
        return {"request": _plain(store, logged), "explanation": None, "differs": ""}
    asked = shown_node(store, message.node) if message.node else None
    tokens, namespace, without = _prompt(store, message, logged, asked)
    if len(tokens) > protocol.EXPLAINED_TOKENS:
        raise PlanError(
            f"a prompt of {len(tokens):,} tokens is too long to be explained: "
            f"at most {protocol.EXPLAINED_TOKENS:,}"
        )
    for pool in message.pools:
        if store.nodes.namespaces.get(namespace.in_pool(pool).digest) is None:
            raise NodeError(f"no pool {pool!r} has prompts of this model: see kvshare ls --pool")
    only = shown_node(store, message.only) if message.only else None
    found = store.explain(
        tokens,
        namespace,
        policy=message.policy if logged is None else message.policy or logged.policy,
        only=only.id if only is not None else "",
        without=without,
        pools=message.pools if logged is None else logged.pools,
        source=b"" if logged is None else logged.source,
    )
    if logged is not None:
        found = under_its_bound(logged, found)
    plain: dict[str, Any] = msgspec.to_builtins(found)
    plain["donor_parts"] = [] if only is None else donor_parts(store, only, plain["parts"])
    for part in plain["parts"]:
        words = tokens[part["start"] : part["stop"]]
        part["tokens"] = words.tolist()
        part["text"] = words_of(store, namespace.digest, words)
    if plain["divergence"] is not None:
        for side in ("request", "donor"):
            ids = np.asarray(plain["divergence"][side], np.int32)
            plain["divergence"][f"{side}_text"] = words_of(store, namespace.digest, ids)
    return {
        "request": None if logged is None else _plain(store, logged),
        "explanation": {
            "namespace": short(namespace.digest),
            "model": namespace.model,
            "tenant": namespace.tenant,
            "answer_tokens": 0 if asked is None else asked.answer_tokens,
            **plain,
        },
        "differs": "" if logged is None else differs(logged, found),
    }


def _logged(store: Store, request: str) -> Logged:
    """The one request of this number or name, or whose name begins so: the last of that name."""
    beginning = request.rstrip("…")  # as `kvshare log` shows a name that it cut
    found = store.requests.last(None, request=beginning) if beginning else []
    if not found:
        raise NodeError(f"no logged request is {request!r}; `kvshare log` shows the last ones")
    found = [entry for entry in found if entry.request == beginning] or found
    names = {entry.request for entry in found}
    if len(names) > 1:
        raise NodeError(f"{len(names)} logged requests begin with {beginning!r}; name more of it")
    return _with_donors_now(store, found[0])


def _own(store: Store, logged: Logged, tokens: Tokens, namespace: Namespace) -> list[str]:
    """The nodes that a request left: its prompt, exact or edited, also with what followed. Those
    that it took rows from were there before it."""
    with store.nodes.lock:
        nodes = store.nodes.state.of_namespace(namespace.digest)
    return [
        node.id
        for node in nodes
        if node.length >= len(tokens)
        and node.id not in logged.donors
        and np.array_equal(node.tokens[: len(tokens)], tokens)
    ]


def _prompt(
    store: Store, message: protocol.Explain, logged: Logged | None, asked: Node | None
) -> tuple[Tokens, Namespace, Sequence[str]]:
    """The tokens to plan, their namespace, and the nodes that are no candidates. `asked`: the node
    that the message names."""
    if logged is not None:
        (namespace,) = matching(store.nodes, logged.namespace, None)
        tokens = np.frombuffer(logged.prompt, np.int32)
        return tokens, namespace, _own(store, logged, tokens, namespace)
    if asked is not None:
        found = store.namespace(asked.namespace)
        if found is None:
            raise NodeError(f"node {short(asked.id)} has just left the store")
        return asked.tokens, found, [asked.id]
    namespace = _namespace(store, message.namespace, message.tenant)
    if message.text:
        ids = encode(namespace.tokenizer, message.text)
        if ids is None:
            raise PlanError(
                f"namespace {short(namespace.digest)} names no tokenizer that can be read here: "
                "name one with --tokenizer, or give token ids with --tokens"
            )
        return np.asarray(ids, np.int32), namespace, ()
    if not message.tokens or len(message.tokens) % 4:
        raise PlanError("the prompt is empty, or its tokens are not int32")
    return np.frombuffer(message.tokens, np.int32), namespace, ()


def _namespace(store: Store, beginning: str, tenant: str | None) -> Namespace:
    if beginning:
        return matching(store.nodes, beginning, None)[0]
    if tenant is not None:
        known = matching(store.nodes, "", tenant)
    else:
        with store.nodes.lock:
            known = list(store.nodes.namespaces)
    if len(known) == 1:
        return known[0]
    if not known:
        raise NamespaceError("the store holds no prompt yet")
    names = ", ".join(
        f"{short(one.digest)} ({one.model}{f', {one.owner}' if one.owner else ''})"
        for one in known[:8]
    )
    raise NamespaceError(
        f"{len(known)} namespaces are here, name one with --namespace or --tenant: {names}"
    )
