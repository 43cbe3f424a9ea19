"""The DELTA tree in memory: nodes, their children, and which nodes use which block."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import pairwise

import msgspec

from kvshare_store.blocks.eviction import LRU, EvictionPolicy
from kvshare_store.tree.node import Node


class DeltaTree:
    """Metadata only. Not thread-safe by itself: the Store holds its lock."""

    def __init__(
        self,
        make_policy: Callable[[], EvictionPolicy] = LRU,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._nodes: dict[str, Node] = {}
        self._children: defaultdict[str, set[str]] = defaultdict(set)
        self._users: dict[str, str | set[str]] = {}
        """The nodes with rows in a block; most blocks have one, and a set would be 200 bytes."""
        self._sizes: dict[str, int] = {}
        self._bytes: Counter[str] = Counter()
        """Bytes of the blocks of each namespace."""
        self._used: OrderedDict[str, float] = OrderedDict()
        """When each node was last used, by `clock`, the longest ago first."""
        self._order = make_policy()
        self._orders: defaultdict[str, EvictionPolicy] = defaultdict(make_policy)
        """The same order within each namespace, for quotas."""

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._nodes

    def __iter__(self) -> Iterator[Node]:
        """The least recently used node first."""
        return iter([self._nodes[node_id] for node_id in self._used])

    def get(self, node_id: str) -> Node | None:
        """The node, or None."""
        return self._nodes.get(node_id)

    # --- changes -----------------------------------------------------------------------------

    def add(self, node: Node, idle: float = 0.0) -> None:
        """Insert a node that was last used `idle` seconds ago; a known one is only used again."""
        if node.id in self._nodes:
            self.touch(node.id)
            return
        self._nodes[node.id] = node
        self._used[node.id] = self._clock() - idle
        if node.parent is not None:
            self._children[node.parent].add(node.id)
        self._use_blocks(node)
        self._rank(node)

    def rooted(self, node: Node) -> Node:
        """The node, without its parent where that descends from it.

        Ids come from the prompts: one that was evicted and is saved again from what was once its
        own child would else be its own ancestor.
        """
        seen: set[str] = set()
        at = node.parent
        while at is not None and at not in seen:
            if at == node.id:
                return msgspec.structs.replace(node, parent=None, edits=())
            seen.add(at)
            above = self._nodes.get(at)
            at = above.parent if above is not None else None
        return node

    def remove(self, node_id: str) -> tuple[Node, list[str]] | None:
        """Take a node out; returns it and the blocks that nobody uses any more."""
        node = self._nodes.pop(node_id, None)
        if node is None:
            return None
        del self._used[node_id]
        self._unrank(node)
        if node.parent is not None:
            self._children[node.parent].discard(node_id)
            if not self._children[node.parent]:
                del self._children[node.parent]
        return node, self._leave_blocks(node)

    def replace(self, node: Node) -> list[str]:
        """Let a node of the same id, parent and prompt take the place of the one that is here.

        Returns the blocks that nobody uses any more. `KeyError` if no such node is here.
        """
        old = self._nodes[node.id]
        self._nodes[node.id] = node
        self._use_blocks(node)
        unused = self._leave_blocks(old, set(node.blocks))
        if node.pinned:
            self._unrank(old)
        self._rank(node)
        return unused

    def touch(self, node_id: str) -> None:
        """The node was used just now."""
        node = self._nodes.get(node_id)
        if node is not None:
            self._used[node_id] = self._clock()
            self._used.move_to_end(node_id)
            self._touch(node)

    def settle(self) -> None:
        """Put nodes that were added in any order into the order of their last use."""
        if all(earlier <= later for earlier, later in pairwise(self._used.values())):
            return
        for node_id in sorted(self._used, key=self._used.__getitem__):
            self._used.move_to_end(node_id)
            self._touch(self._nodes[node_id])

    def _use_blocks(self, node: Node) -> None:
        shared: set[str] = set()
        """Nodes that have a block for themselves no longer."""
        sizes = node.block_bytes or (0,) * len(node.blocks)
        for name, nbytes in zip(node.blocks, sizes, strict=True):
            users = self._users.get(name)
            if users is None:
                self._users[name] = node.id
                self._sizes[name] = nbytes
                self._bytes[node.namespace] += nbytes
            elif isinstance(users, set):
                users.add(node.id)
            elif users != node.id:
                self._users[name] = {users, node.id}
                shared.add(users)
        self._rank_again(shared)

    def _leave_blocks(self, node: Node, kept: Collection[str] = ()) -> list[str]:
        unused: list[str] = []
        alone: set[str] = set()
        for name in dict.fromkeys(node.blocks):
            users = self._users[name]
            if name in kept:
                continue
            if isinstance(users, set):
                users.discard(node.id)
                if len(users) == 1:
                    self._users[name] = last = users.pop()
                    alone.add(last)
            else:
                del self._users[name]
                self._bytes[node.namespace] -= self._sizes.pop(name)
                unused.append(name)
        self._rank_again(alone)
        return unused

    # --- who goes first ----------------------------------------------------------------------

    def freed(self, node: Node) -> int:
        """Bytes of the blocks that only this node uses."""
        names = dict.fromkeys(node.blocks)
        return sum(self._sizes[name] for name in names if not isinstance(self._users[name], set))

    def _rank(self, node: Node) -> None:
        """What computing its rows again would cost, against the bytes that forgetting it frees."""
        if not node.pinned:
            freed = self.freed(node)
            for order in (self._order, self._orders[node.namespace]):
                order.add(node.id, freed, float(node.length))

    def _rank_again(self, ids: Iterable[str]) -> None:
        for node_id in ids:
            if node_id in self._order:
                self._rank(self._nodes[node_id])

    def _touch(self, node: Node) -> None:
        if not node.pinned:
            self._order.touch(node.id)
            self._orders[node.namespace].touch(node.id)

    def _unrank(self, node: Node) -> None:
        self._order.remove(node.id)
        self._orders[node.namespace].remove(node.id)
        if not len(self._orders[node.namespace]):
            del self._orders[node.namespace]

    def victims(self, namespace: str | None = None) -> Iterator[Node]:
        """Nodes in the order in which they should be forgotten; pinned ones never are."""
        order = self._order if namespace is None else self._orders.get(namespace)
        return (self._nodes[node_id] for node_id in (order.victims() if order is not None else ()))

    def idle(self, seconds: float) -> list[str]:
        """Nodes that nobody used for so long; no pinned ones."""
        before = self._clock() - seconds
        return [i for i, at in self._used.items() if at <= before and not self._nodes[i].pinned]

    def idle_for(self, node_id: str) -> float:
        """Seconds since the node was last used; less than zero if it is not here or pinned."""
        node = self._nodes.get(node_id)
        return -1.0 if node is None or node.pinned else self._clock() - self._used[node_id]

    def used_within(self, seconds: float) -> list[tuple[Node, float]]:
        """Nodes that were used in the last `seconds`, and how long ago."""
        now = self._clock()
        since = now - seconds
        return [(self._nodes[i], now - at) for i, at in self._used.items() if at > since]

    def used_before(self, node_id: str, idle: float) -> None:
        """The node was used `idle` seconds ago, by somebody else."""
        at = self._clock() - idle
        if self._used.get(node_id, at) < at:
            self._used[node_id] = at
            self._used.move_to_end(node_id)
            self._touch(self._nodes[node_id])

    def bytes_of(self, namespace: str) -> int:
        """Bytes of the rows in the blocks of a namespace, each block once."""
        return self._bytes[namespace]

    def size(self, block: str) -> int | None:
        """Bytes of the rows of a block; None if no node uses it."""
        return self._sizes.get(block)

    def namespaces(self) -> list[str]:
        """Digests of the namespaces that have blocks."""
        return [digest for digest, nbytes in self._bytes.items() if nbytes]

    # --- questions ---------------------------------------------------------------------------

    def children(self, node_id: str) -> list[str]:
        """Nodes whose parent this is, also when the parent itself is gone."""
        return sorted(self._children.get(node_id, ()))

    def users(self, block: str) -> set[str]:
        """Nodes with rows in the block."""
        users = self._users.get(block, ())
        return {users} if isinstance(users, str) else set(users)

    def user_count(self, block: str) -> int:
        """How many nodes have rows in the block."""
        users = self._users.get(block, ())
        return 1 if isinstance(users, str) else len(users)

    def uses(self, block: str) -> bool:
        """Whether any node has rows in the block."""
        return block in self._users

    def blocks(self) -> set[str]:
        """Blocks that some node points at."""
        return set(self._users)

    def path(self, node_id: str) -> list[Node]:
        """From the oldest ancestor that is still here down to the node."""
        seen: dict[str, Node] = {}
        at = self._nodes.get(node_id)
        while at is not None and at.id not in seen:
            seen[at.id] = at
            at = self._nodes.get(at.parent) if at.parent is not None else None
        return list(seen.values())[::-1]

    def chain(self, node_id: str) -> int:
        """How many edited nodes in a row end here, up to where rows were last gathered."""
        length = 0
        for node in reversed(self.path(node_id)):
            if node.exact or node.merged:
                break
            length += 1
        return length
