"""Which nodes use which block, and the bytes of its rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from typing import cast

import numpy as np
import numpy.typing as npt

from kvshare_store.nodes.node import Node
from kvshare_store.nodes.packed import Names
from kvshare_store.nodes.postings import Keys, Postings, factors

Users = tuple[str, ...] | set[str]
Counts = npt.NDArray[np.int64]

_WORDS = 4
"""Of 64 bits, in a name."""
_FEW = 16
"""Up to so many users of a block are kept in a tuple. A set takes more memory, and is faster for
many."""


class BlockUsers:
    """Most blocks have one user. It is found through a hash of the block's name, and verified: the
    node must be in the tree and name the block. Users of other blocks are in a dictionary."""

    def __init__(self, node_of: Callable[[str], Node | None]) -> None:
        """`node_of`: looks a node up in the tree. Call `enter` before a node is in the tree,
        `leave` after it has left."""
        self._node_of = node_of
        self._alone = Postings()
        self._shared: dict[str, Users] = {}
        self._shared_bytes: dict[str, int] = {}
        self._count = 0
        self.bytes: Counter[str] = Counter()
        """Bytes of each namespace's blocks, each block counted once."""

    def __len__(self) -> int:
        """How many blocks have users."""
        return self._count

    def of(self, name: str) -> Users:
        """Ids of the nodes that use a block."""
        return self._shared.get(name) or self._alone_with(name)

    def _alone_with(self, name: str) -> Users:
        for node_id in self._alone.find(_key(name)):
            node = self._node_of(node_id)
            if node is not None and name in node.blocks:
                return (node_id,)
        return ()

    def size(self, name: str) -> int | None:
        """Bytes of the rows of a block; None if no node uses it."""
        if name in self._shared:
            return self._shared_bytes[name]
        node = next((self._node_of(node_id) for node_id in self.of(name)), None)
        if node is None or not node.block_bytes:
            return None if node is None else 0
        return node.block_bytes[node.blocks.index(name)]

    # --- changes -----------------------------------------------------------------------------

    def enter(self, node: Node) -> None:
        """From now on the node uses its blocks."""
        alone: list[int] = []
        sizes = _sizes(node)
        keys = _keys(Names.of(sizes).raw).tolist()
        known = self._alone.known(keys)
        for (name, size), key, maybe in zip(sizes.items(), keys, known, strict=True):
            users = self.of(name) if maybe or name in self._shared else ()
            if not users:
                alone.append(key)
                self._count += 1
                self.bytes[node.namespace] += size
            elif node.id not in users:
                if name not in self._shared:
                    self._shared_bytes[name] = self.size(name) or 0
                self._shared[name] = _with(users, node.id)
        self._alone.add(node.id, alone)

    def leave(self, node: Node, kept: Collection[str] = ()) -> list[str]:
        """The node no longer uses its blocks, except those that it has `kept`. Returns the blocks
        without users."""
        unused: list[str] = []
        for name, size in _sizes(node).items():
            if name in kept:
                continue
            if name in self._shared:
                self._leave_shared(name, node)
            else:
                unused.append(name)
                self._count -= 1
                self.bytes[node.namespace] -= size
        if not self.bytes[node.namespace]:
            del self.bytes[node.namespace]
        return unused

    def _leave_shared(self, name: str, node: Node) -> None:
        users = self._shared[name] = _without(self._shared[name], node.id)
        if len(users) > 1:
            return
        (last,) = users
        if not self._alone_with(name):
            self._alone.add(last, [_key(name)])
        del self._shared[name]
        self.bytes[node.namespace] += (self.size(name) or 0) - self._shared_bytes.pop(name)

    def forget(self, node_id: str) -> None:
        """The node has left the tree."""
        self._alone.remove(node_id)

    def fill(self, nodes: Sequence[Node]) -> None:
        """Enter many nodes at once: all that there are, already in the tree.

        Blocks are told apart by hashes of their names; those that seem to have several users are
        checked one by one.
        """
        counts = np.fromiter((len(node.blocks) for node in nodes), np.int64, len(nodes))
        keys = _keys(b"".join(cast(Names, node.blocks).raw for node in nodes))
        order = keys.argsort(kind="stable")
        once = _once(keys[order])
        whose = np.arange(len(nodes)).repeat(counts)
        alone, several = order[once], order[~once]
        self._alone.extend([node.id for node in nodes], keys[alone], whose[alone])
        self._alone.settle()
        self._count = len(alone)
        sizes = np.fromiter(chain.from_iterable(map(_block_bytes, nodes)), np.int64, len(keys))
        own = np.bincount(whose[alone], sizes[alone], len(nodes)).astype(np.int64)
        self._fill_bytes(nodes, own)
        blocks = several - (counts.cumsum() - counts)[whose[several]]
        self._fill_shared(nodes, zip(whose[several].tolist(), blocks.tolist(), strict=True))

    def _fill_bytes(self, nodes: Sequence[Node], own: Counts) -> None:
        """`own`: bytes of the blocks that only this node uses, for each of the nodes."""
        found: dict[str, int] = {}
        spaces = [found.setdefault(node.namespace, len(found)) for node in nodes]
        nbytes = np.bincount(spaces, own, len(found)).tolist()
        self.bytes.update({space: int(nbytes[at]) for space, at in found.items()})

    def _fill_shared(self, nodes: Sequence[Node], places: Iterable[tuple[int, int]]) -> None:
        """`places`: the number of the node and of the block in it, in the order of the nodes."""
        users: defaultdict[str, list[int]] = defaultdict(list)
        for number, block in places:
            users[nodes[number].blocks[block]].append(number)
        for name, numbers in users.items():
            first = nodes[numbers[0]]
            size = _sizes(first)[name]
            self.bytes[first.namespace] += size
            self._count += 1
            ids = tuple(dict.fromkeys(nodes[number].id for number in numbers))
            if len(ids) == 1:
                self._alone.add(first.id, [_key(name)])
            else:
                self._shared[name] = ids if len(ids) <= _FEW else set(ids)
                self._shared_bytes[name] = size


def _key(name: str) -> int:
    """0 for what is no name of a block, which clients may ask for. Names are compared, so nobody
    has it."""
    try:
        return int(_keys(Names.of((name,)).raw)[0])
    except ValueError:
        return 0


def _keys(names: bytes) -> Keys:
    """64-bit hashes of names, 32 bytes each: sums of products with numbers that each process draws.
    Others cannot choose names that collide, and nothing depends on it: names are compared."""
    keys: Keys = np.frombuffer(names, np.uint64).reshape(-1, _WORDS) @ factors(_WORDS)
    return keys


def _once(keys: Keys) -> npt.NDArray[np.bool_]:
    """Which of the sorted keys occur once."""
    edges = np.ones(len(keys) + 1, np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=edges[1:-1])
    return edges[1:] & edges[:-1]


def _block_bytes(node: Node) -> Sequence[int]:
    return node.block_bytes or (0,) * len(node.blocks)


def _sizes(node: Node) -> dict[str, int]:
    """Bytes of each block of a node, as far as the node knows them."""
    return dict(zip(node.blocks, _block_bytes(node), strict=True))


def _with(users: Users, node_id: str) -> Users:
    if isinstance(users, set):
        users.add(node_id)
        return users
    more = (*users, node_id)
    return more if len(more) <= _FEW else set(more)


def _without(users: Users, node_id: str) -> Users:
    if isinstance(users, set):
        users.discard(node_id)
        return users
    return tuple(user for user in users if user != node_id)
