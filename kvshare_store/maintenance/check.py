"""`kvshare check`: whether tree, catalogue and blocks agree.

Every block is read from every tier of this machine that has it, and its name is computed again. A
tier moves a bad block into quarantine when it reads it. The nodes that use it leave lookup at that
moment, with `repair` or without: rows that cannot be served are never offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from kvshare_store.commit.queue import Removal
from kvshare_store.commit.repository import Repository
from kvshare_store.errors import KVShareError, PlanError
from kvshare_store.errors.wording import short
from kvshare_store.nodes.node import Node, check_segments
from kvshare_store.tensors.frame import Block, block_name


class Problem(msgspec.Struct, frozen=True):
    """A single problem."""

    kind: str
    """`missing`, `corrupt`, `namespace`, `segments`, `cycle`, `row`, or the kind of an error."""
    about: str
    """Id of the node, or name of the block."""
    text: str
    repaired: bool = False


class TreeReport(msgspec.Struct, frozen=True):
    """What is wrong with the metadata, and which blocks there are to read."""

    problems: tuple[Problem, ...]
    nodes: int
    blocks: tuple[str, ...]
    """Blocks that nodes use and that some tier has."""
    garbage: int
    """Blocks that no node uses and no lease holds. They are no problem."""


class BlocksReport(msgspec.Struct, frozen=True):
    """What is wrong with some blocks."""

    problems: tuple[Problem, ...]
    read: int
    """Bytes of rows that were read and verified."""


def check_tree(repository: Repository, *, repair: bool) -> TreeReport:
    """Compare nodes with each other, with the tiers and with the catalogue.

    `repair`: nodes with a problem are removed, and so are rows without a node.
    """
    repository.queue.settle()
    with repository.nodes.lock:
        nodes = list(repository.nodes.tree)
    found = [problem for node in nodes for problem in _node_problems(repository, node)]
    found += _cycles(nodes)
    if repair:
        repository.nodes.remove([problem.about for problem in found])
    faults = _catalogue_faults(repository, repair)
    found += _row_problems(repository, repair, {fault.about for fault in faults})
    if repair:
        found = [msgspec.structs.replace(problem, repaired=True) for problem in found]
    found = [*faults, *found]
    names = repository.blocks.names()
    used = repository.nodes.tree.blocks()
    held = {name for name in names - used if repository.blocks.leases.pinned(name)}
    return TreeReport(
        tuple(found), len(nodes), tuple(sorted(names & used)), len(names - used - held)
    )


def _node_problems(repository: Repository, node: Node) -> Iterable[Problem]:
    if repository.nodes.namespaces.get(node.namespace) is None:
        yield Problem("namespace", node.id, f"nobody knows its namespace {short(node.namespace)}")
    try:
        check_segments(node.segments, node.length, len(node.blocks))
    except PlanError as error:
        yield Problem("segments", node.id, str(error))
    missing = [name for name in node.blocks if repository.blocks.tier_of(name) is None]
    if missing and repository.nodes.tree.get(node.id) is node:  # it may have been removed meanwhile
        named = ", ".join(short(name) for name in missing[:3])
        yield Problem("missing", node.id, f"{len(missing)} of its blocks are in no tier: {named}")


def _cycles(nodes: Sequence[Node]) -> list[Problem]:
    """Nodes that are their own ancestors."""
    parents = {node.id: node.parent for node in nodes}
    sound: set[str] = set()
    found = []
    for node in nodes:
        path: dict[str, None] = {}
        at: str | None = node.id
        while at is not None and at not in sound and at not in path:
            path[at] = None
            at = parents.get(at)
        if at is not None and at in path:
            found.append(Problem("cycle", at, "it is its own ancestor"))
        sound.update(path)
    return found


def _catalogue_faults(repository: Repository, repair: bool) -> list[Problem]:
    """Rows that do not verify; lookups never see them."""
    catalog = repository.catalog
    if catalog is None:
        return []
    faults = repository.queue.run(lambda: catalog.verify(repair=repair))
    return [Problem(str(at.error.kind), at.about, str(at.error), at.repaired) for at in faults]


def _row_problems(repository: Repository, repair: bool, known: set[str]) -> list[Problem]:
    """Compare the catalogue with the tree while no change is on its way. Problems with the rows of
    the nodes in `known` were reported already."""
    if repository.catalog is None:
        return []
    repository.queue.settle()
    with repository.nodes.lock:
        ours = {node.id: node.namespace for node in repository.nodes.tree}
    rows = repository.queue.run(repository.catalog.ids)
    count = Counter(node_id for node_id, _ in rows)
    theirs = dict(rows)
    found = [Problem("row", i, f"{n} rows of one node") for i, n in count.items() if n > 1]
    found += [
        Problem("row", node_id, "it is not in the catalogue")
        for node_id in ours.keys() - theirs.keys()
        if node_id in repository.nodes.tree
    ]
    wrong = [i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]]
    found += [Problem("namespace", i, "its row is of another namespace") for i in wrong]
    unknown = [i for i in theirs.keys() - ours.keys() - known if i not in repository.nodes.tree]
    if not repository.shared:  # what other machines commit, or this one let go, is no problem
        found += [Problem("row", i, "a row of a node that is not here") for i in unknown]
    if repair and found:
        repository.nodes.remove([problem.about for problem in found])
        repository.queue.put(Removal(tuple(problem.about for problem in found), ()))
        repository.queue.settle()
    return found


def check_blocks(repository: Repository, names: Sequence[str], *, repair: bool) -> BlocksReport:
    """Read blocks from every tier of this machine that has them. Do not hold the lock.

    `repair`: a block with at least one good copy is written again; otherwise the nodes that use it
    are removed.
    """
    problems: list[Problem] = []
    read = 0
    for name in names:
        good, bad = _copies(repository, name)
        read += sum(len(block.data) for block in good)
        problems += _namespace_problems(repository, name, good)
        if bad:
            repaired = _mended(repository, name, repair, bool(good))
            problems += [msgspec.structs.replace(p, repaired=repaired) for p in bad]
    if repair:
        wrong = [problem.about for problem in problems if problem.kind == "namespace"]
        repository.nodes.remove_lost(wrong)
    return BlocksReport(tuple(problems), read)


def _copies(repository: Repository, name: str) -> tuple[list[Block], list[Problem]]:
    """The good copies of a block, and what is wrong with the others."""
    good: list[Block] = []
    bad: list[Problem] = []
    host = _host_copy(repository, name)
    if host is not None and block_name(host) == name:
        good.append(host)
    elif host is not None:
        bad.append(Problem("corrupt", name, "its bytes in shared memory are others"))
    for tier, found in repository.blocks.copies_below(name):
        if not isinstance(found, KVShareError):
            good.append(found)
        elif repository.nodes.tree.uses(name):  # one that nobody uses any more may be gone by now
            bad.append(Problem(str(found.kind), name, f"{tier}: {found}"))
    return good, bad


def _host_copy(repository: Repository, name: str) -> Block | None:
    with repository.nodes.lock:
        if repository.blocks.host.size(name) is None:
            return None
        block = repository.blocks.host.peek(name)
        return Block(block.namespace, block.layout, bytes(block.data))


def _mended(repository: Repository, name: str, repair: bool, good: bool) -> bool:
    """Repair a block with a bad copy: True if it is good again or the nodes that used it are
    gone."""
    with repository.nodes.lock:
        host = repository.blocks.host.ref(name)
        rotten = host is not None and block_name(repository.blocks.host.peek(name)) != name
        if rotten:
            repository.blocks.host.drop(name)
    if not good:
        # the tier that refused may still have it, so a block is given up only on request
        if repair or repository.blocks.tier_of(name) is None:
            repository.nodes.remove_lost([name])
        return not repository.nodes.tree.uses(name)
    if not repair:
        return False
    try:
        repository.queue.run(lambda: repository.blocks.persist([name]))
    except KVShareError:
        return False
    copies = repository.blocks.copies_below(name)
    return not any(isinstance(found, KVShareError) for _, found in copies)


def _namespace_problems(
    repository: Repository, name: str, copies: Sequence[Block]
) -> Iterable[Problem]:
    with repository.nodes.lock:
        users = repository.nodes.state.users(name)
    for node in users:
        if any(block.namespace != node.namespace for block in copies):
            yield Problem("namespace", name, f"node {short(node.id)} is of another namespace")
