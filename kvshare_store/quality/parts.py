"""Parts: the answers of a class apart by how much of their prompts was computed, and by how far
they begin behind the nearest edit.

The ladder goes by the class as a whole: parts are only reported, so they split no evidence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from kvshare_store.nodes.node import Node
from kvshare_store.plan.spans import Span
from kvshare_store.quality.traffic import changes


class Bucket(NamedTuple):
    """Values from `start` to below `stop`; None: no limit."""

    start: int
    stop: int | None

    @property
    def name(self) -> str:
        """What its scores are kept under. Other bounds have other names."""
        return f"{self.start}-{'' if self.stop is None else self.stop}"


COMPUTED = (Bucket(0, 10), Bucket(10, 25), Bucket(25, 50), Bucket(50, None))
"""Percent of the prompt's tokens behind its exact prefix that the engine computed."""
DISTANCE = (Bucket(0, 64), Bucket(64, 256), Bucket(256, 1024), Bucket(1024, None))
"""Tokens from the end of the nearest edit to the first token of the answer."""


def bucket_of(buckets: Sequence[Bucket], value: float | None) -> str:
    """The name of the bucket of a value; empty if it is not known."""
    if value is None or value < 0:
        return ""
    return buckets[bisect_right(buckets, value, key=lambda one: one.start) - 1].name


class Served(msgspec.Struct, frozen=True):
    """How the rows of a prompt came about. None: not known."""

    computed: float | None = None
    """The share of its tokens behind the exact prefix that the engine computed."""
    edit: int | None = None
    """Where the edit ends that is nearest to the prompt's end."""

    def distance(self, answer: int) -> int | None:
        """Tokens from the edit to an answer that begins there."""
        return None if self.edit is None or self.edit > answer else answer - self.edit


def served_of(
    node: Node, length: int, spans: Sequence[Span] | None, parent: Served | None
) -> Served:
    """Of an edited node whose first `length` tokens are its prompt. `spans`: the rows that it was
    built on; `parent`: of the node's parent. None if nobody knows them any more."""
    computed = None if spans is None else _share_computed(spans, length)
    return Served(computed, _nearest_edit(node, length, None if parent is None else parent.edit))


def _share_computed(spans: Iterable[Span], length: int) -> float | None:
    exact = reused = 0
    for span in spans:
        if span.exact:
            exact = max(exact, span.stop)
        else:
            reused += span.length
    return 1.0 - reused / (length - exact) if exact < length else None


def _nearest_edit(node: Node, length: int, parent: int | None) -> int | None:
    """By the node's own script, or that of what it goes on from. Where nobody knows that, where the
    rows begin that stand behind other text than their own."""
    edits = tuple(node.edits)
    last = max((change.stop for change in changes(edits, length)), default=None)
    if last is not None:
        return last
    kept = edits[0].stop if edits and edits[0].kind == "keep" and not edits[0].start else 0
    if parent is not None and parent <= min(kept, length):
        return parent
    return node.contexts[-1].start if node.contexts else None
