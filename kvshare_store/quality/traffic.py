"""Traffic: the class of a request, whose quality is known together.

A class is a namespace, a family of prompts and a kind of edit. What is planned and what is scored
later must fall into the same class, although the tree changes meanwhile: a root grows by its
answer, and edited prompts that settle become roots of their own. So a family is named by one gram
of the beginning of its root, the same one as long as that gram stays. And text at the end of a
prompt is no edit, since each prompt ends in its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import blake3

from kvshare_store.bounded import Latest
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import Edit, Tokens
from kvshare_store.nodes.grams import GRAM, gram_hashes
from kvshare_store.nodes.node import Node, prompt_key

Kind = Literal["append", "insert", "delete", "replace", "several"]

_ROOT_TOKENS = 256
"""Of a root, one gram of which names its family."""
_LASTING = 8
"""Equal tokens that part two edits; fewer are as a rule words that both texts happen to have."""

_REMEMBERED = 4096
"""Plans whose class is remembered: answers are scored within minutes."""


class PlannedTraffic:
    """The class that each of the last prompts was planned in, so that its score counts for no
    other, whatever became of its donor. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._classes: Latest[bytes, tuple[str, str]] = Latest(_REMEMBERED)
        """Namespace and class, by what names a prompt."""
        self._donors: Latest[tuple[str, str], str] = Latest(_REMEMBERED)
        """Of the last plan, by namespace and class."""

    def planned(self, namespace: str, prompt: Tokens, traffic: str, donor: str = "") -> None:
        """A prompt was planned as one of this class, from rows of this node."""
        with self._lock:
            self._classes[prompt_key(namespace, prompt)] = namespace, traffic
            if donor:
                self._donors[namespace, traffic] = donor

    def donor(self, namespace: str, traffic: str) -> str:
        """The node that the last prompt of a class was planned from; empty if nobody remembers."""
        with self._lock:
            return self._donors.get((namespace, traffic), "")

    def classes(self) -> list[tuple[str, str]]:
        """Namespace and class of the last plans."""
        with self._lock:
            return list(self._donors)

    def forget(self, namespace: str) -> None:
        """A namespace was purged."""
        with self._lock:
            for name in [name for name, at in self._classes.items() if at[0] == namespace]:
                del self._classes[name]
            for of in [of for of in self._donors if of[0] == namespace]:
                del self._donors[of]

    def of(self, tree: DeltaTree, node: Node, length: int) -> str:
        """The class of an edited node whose first `length` tokens are its prompt: as planned, or
        else by its parent. Hold the lock of the nodes."""
        with self._lock:
            found = self._classes.get(prompt_key(node.namespace, node.tokens[:length]))
        if found is not None:
            return found[1]
        parent = tree.get(node.parent) if node.parent is not None else None
        return traffic_of(tree, parent or node, node.edits, length)


def traffic_of(tree: DeltaTree, donor: Node, edits: Sequence[Edit], length: int) -> str:
    """The class of a request: short and printable. Hold the lock of the nodes.

    `donor`: the first donor of a plan, or the parent of the node that was made of it (the node
    itself if that is gone). `edits`: the script that turns the donor into the prompt, whose first
    `length` tokens count; what follows is its answer.
    """
    path = tree.path(donor.id)
    family = _family(path[0] if path else donor)
    return f"{donor.namespace[:12]}/{family}/{kind_of(edits, length)}"


def edit_of(traffic: str) -> str:
    """The kind of edit of a class by its name; empty of controls, which have none."""
    kind = traffic.rpartition("/")[2]
    return kind if kind in get_args(Kind) else ""


def _family(root: Node) -> str:
    """Of two roots the same with the chance that their beginnings' grams are (MinHash, Broder
    1997)."""
    beginning = root.tokens[:_ROOT_TOKENS]
    hashes = gram_hashes(beginning)
    at = int(hashes.argmin()) if len(hashes) else 0
    hasher = blake3.blake3(f"{root.namespace}:".encode())
    hasher.update(beginning[at : at + GRAM].tobytes())
    return hasher.hexdigest(length=4)


def kind_of(edits: Iterable[Edit], length: int) -> Kind:
    """What was done to the donor before the last text that both have. `append`: nothing."""
    found = list(changes(edits, length))
    if not found:
        return "append"
    if len(found) > 1:
        return "several"
    inserted, removed, _ = found[0]
    return "delete" if not inserted else "replace" if removed else "insert"


class Change(NamedTuple):
    """What was done to the donor between two texts that stay: tokens."""

    inserted: int
    removed: int
    stop: int
    """Where in the prompt the next text begins that stays."""


def changes(edits: Iterable[Edit], length: int) -> Iterator[Change]:
    """What was done between two texts that stay, each of `_LASTING` tokens or more (the first one
    of any length, where the donor's beginning stays)."""
    at = inserted = removed = 0
    for edit in edits:
        if at >= length:
            return
        size, across = _sizes(edit, length - at)
        at += size
        if edit.kind != "keep":
            inserted, removed = inserted + size, removed + across
        elif size < _LASTING and (inserted or removed):
            inserted, removed = inserted + size, removed + size
        elif inserted or removed:
            yield Change(inserted, removed, at - size)
            inserted = removed = 0


def _sizes(edit: Edit, most: int) -> tuple[int, int]:
    """Tokens of the prompt that an operation covers, `most` at most, and of the donor."""
    across = edit.stop - edit.start
    return (min(across, most) if edit.kind == "keep" else min(len(edit.tokens), most)), across
