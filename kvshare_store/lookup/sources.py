"""Who has sent which prompt: hashes of sources, on the nodes of the prompts.

A node remembers a few sources that have sent all of its tokens. Those of a prompt that is not
stored yet are remembered here, in memory, until it is saved. An edited node is only of those that
asked before it was saved: who sends its tokens later has not sent the text that its rows were
computed behind.
"""

from __future__ import annotations

from collections.abc import Collection

from kvshare_store.bounded import Latest
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import SOURCES, Node, node_id, prompt_key, with_sources

_PROMPTS = 4096
"""Prompts that are remembered: an engine saves one seconds after it has looked it up."""


class Sources:
    """Those of one store. Thread-safe under the lock of the nodes."""

    def __init__(self, nodes: NodeStore, rewriter: Rewriter) -> None:
        self._nodes = nodes
        self._rewriter = rewriter
        self._asked: Latest[bytes, tuple[bytes, ...]] = Latest(_PROMPTS)
        """By hash of namespace and prompt; what was asked for last is at the end."""

    def asked(self, namespace: Namespace, request: Tokens, source: bytes) -> None:
        """A source has sent this prompt. Where it is stored already, its node remembers that."""
        source = _sender(namespace, source)
        if not source:
            return
        key = prompt_key(namespace.digest, request)
        with self._nodes.lock:
            known = self._asked.get(key, ())
            self._asked[key] = known if source in known else (*known, source)[:SOURCES]
            node = self._nodes.tree.get(node_id(namespace.digest, request, True))
        if node is not None:
            self.confirm(node, (source,))

    def of(
        self, namespace: Namespace, tokens: Tokens, extends: int, source: bytes = b""
    ) -> tuple[bytes, ...]:
        """Those that have sent a prompt that is saved now, the `source` of the save among them. An
        answer (`extends` > 0) belongs to one request: it is of that source, or where the save names
        none, of one that has sent its prompt alone."""
        source = _sender(namespace, source)
        if source and extends:
            return (source,)
        asked = self._who_asked(namespace.digest, tokens[:extends] if extends else tokens)
        if extends:
            return asked if len(asked) == 1 else ()
        return tuple(dict.fromkeys((source, *asked)))[:SOURCES] if source else asked

    def _who_asked(self, namespace: str, tokens: Tokens) -> tuple[bytes, ...]:
        if not self._asked:  # where nobody names a source, no prompt is hashed for it
            return ()
        key = prompt_key(namespace, tokens)
        with self._nodes.lock:
            return self._asked.get(key, ())

    def confirm(self, node: Node, sources: Collection[bytes]) -> None:
        """These sources have sent all tokens of the node. It remembers them, durably soon, unless
        it is edited."""
        if node.exact and with_sources(node, sources) is not node:
            self._rewriter.confirm(node.id, sources)


def _sender(namespace: Namespace, source: bytes) -> bytes:
    """Whose a prompt is; empty if nobody says. Those of a pool are the operator's, whoever sends
    them, and have no source."""
    return b"" if namespace.pool else source
