"""Exports nodes into an archive, and imports them into another store."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec

from kvshare_store.bounded import pieces
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.commit.repository import Repository
from kvshare_store.errors import (
    ConfigError,
    KVShareError,
    MissError,
    MissingBlockError,
    NoSpaceError,
    StorageError,
)
from kvshare_store.errors.wording import short
from kvshare_store.maintenance.archive import (
    BLOCK,
    NAMESPACE,
    NODE,
    Contents,
    Writer,
    block_at,
    verified,
)
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node, encode_node, new_stamp, node_id
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.save.saving import Filled
from kvshare_store.tensors.frame import Block, encode_frame

_AT_ONCE = 32
"""Nodes that are made durable in one go."""
_ASKED = 512
"""Nodes that the catalogue is asked for in one go."""


class Exported(msgspec.Struct, frozen=True):
    """What is in a new archive."""

    nodes: int
    blocks: int
    nbytes: int
    skipped: tuple[str, ...]
    """Nodes of which a block could not be read."""


class Imported(msgspec.Struct, frozen=True):
    """What became of an archive."""

    nodes: tuple[str, ...]
    known: int
    """Nodes that the store had already."""
    skipped: tuple[str, ...]
    """Nodes for which there was no room."""
    purged: tuple[str, ...] = ()
    """Nodes whose namespace was purged meanwhile."""


def export_nodes(
    repository: Repository, nodes: Sequence[Node], path: Path, *, plain: bool
) -> Exported:
    """Write an archive of some nodes, readable by its owner only. An existing file is replaced when
    the new one is complete.

    `plain`: also of an encrypted store; `ConfigError` for one otherwise, because an archive is not
    encrypted, and for a path where no archive may be. `StorageError` if the file cannot be written.
    """
    if repository.encrypted and not plain:
        raise ConfigError(
            "this store is encrypted and archives are not: pass --plain to write one all the same"
        )
    # not by the process id: in a container every daemon has the same one, and one that was killed
    # would keep the next from writing; nor by the archive's name, which may be as long as names get
    beside = path.with_name(f"kvshare-export-{secrets.token_hex(4)}.part")
    try:
        _refuse_others(path, repository.home)
        try:
            with _new_file(beside) as file:
                found = _export(repository, nodes, file)
                file.flush()
                os.fsync(file.fileno())
                found = msgspec.structs.replace(found, nbytes=file.tell())
                _give_name(file, beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, KVShareError):
            raise
        raise StorageError(f"archive {path} cannot be written: {error.strerror}") from error
    return found


def _new_file(beside: Path) -> BinaryIO:
    """A file without a name, of which nothing is left when the process is killed. Where the file
    system has none, it has its name from the start."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        descriptor = os.open(beside.parent, flags | os.O_TMPFILE, 0o600)
    except OSError:  # one that has another reason comes again
        descriptor = os.open(beside, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    return os.fdopen(descriptor, "wb")


def _give_name(file: BinaryIO, name: Path) -> None:
    """Name a file that has no name yet. Python follows the link to it only where a folder's
    descriptor is given too, which nobody looks at since the path is absolute."""
    number = file.fileno()
    if not os.fstat(number).st_nlink:
        os.link(f"/proc/self/fd/{number}", name, src_dir_fd=number, follow_symlinks=True)


def _refuse_others(path: Path, home: Path) -> None:
    """`ConfigError` for what an archive must not replace: a device, a pipe, a link (behind
    /dev/stdout is the daemon's own output), and any file of the home, there already or not."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it")
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise ConfigError(f"{path} is no regular file and is not replaced: name another file")
    folder = Path(os.path.realpath(path.parent))
    if folder.is_relative_to(os.path.realpath(home)):
        raise ConfigError(f"{path} is in the home of this store: name a file elsewhere")


def _export(repository: Repository, nodes: Sequence[Node], file: BinaryIO) -> Exported:
    writer, written, count = Writer(file), set[str](), 0
    skipped: list[str] = []
    for digest in sorted({node.namespace for node in nodes}):
        namespace = repository.nodes.namespaces.get(digest)
        if namespace is not None:
            writer.put(NAMESPACE, msgspec.msgpack.encode(namespace))
    for node in nodes:
        try:
            for name in node.blocks:
                if name not in written:
                    block = repository.blocks.read(name)
                    if block.lossy:
                        raise MissingBlockError(f"of block {short(name)} there are only lossy rows")
                    head, payload = encode_frame(name, block)
                    writer.put(BLOCK, head, memoryview(payload).cast("B"))
                    written.add(name)
        except MissError:
            skipped.append(node.id)
            continue
        writer.put(NODE, encode_node(node))
        count += 1
    writer.end()
    return Exported(count, len(written), 0, tuple(skipped))


def import_nodes(repository: Repository, path: Path) -> Imported:
    """Take the nodes of an archive into a store.

    `ConfigError` for a file that is no archive or cannot be read, `ShortBlockError` for one that is
    cut off, `CorruptBlockError` for one that is damaged; then nothing has changed. `StorageError`
    if storage refuses nodes; those that it took before stay. What was taken is durable.
    """
    with _opened(path) as (file, contents):
        return _import(repository, file, contents)


def check_archive(path: Path) -> None:
    """Read and verify a whole archive; errors as of `import_nodes`."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Contents]]:
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder: name an archive in it")
        if path.exists() and not path.is_file():  # a pipe would block
            raise ConfigError(f"archive {path} is no ordinary file")
        with path.open("rb") as file:
            yield file, verified(file, path)
    except KVShareError:
        raise
    except OSError as error:
        raise ConfigError(f"archive {path} cannot be read: {error.strerror}") from error


def _import(repository: Repository, file: BinaryIO, contents: Contents) -> Imported:
    with _purges(repository.nodes) as purged:
        added: list[Node] = []
        skipped: list[Node] = []
        known, refusals = 0, repository.queue.failures
        for node in contents.nodes:
            tree = repository.nodes.tree
            exact_one = node_id(node.namespace, node.tokens, True)
            if node.id in tree or exact_one in tree:
                known += 1
                continue
            namespace = contents.namespaces[node.namespace]
            if len(added) % _AT_ONCE == _AT_ONCE - 1:
                repository.queue.flush(refusals)
            here = _add(repository, node, namespace, partial(block_at, file, contents), purged)
            (added if here else skipped).append(node)
        repository.queue.flush(refusals)
        stored = _stored(repository, [each.id for each in added])
        skipped += [each for each in added if each.id not in stored]  # others took their room
        return Imported(
            tuple(each.id for each in added if each.id in stored),
            known,
            tuple(each.id for each in skipped if each.namespace not in purged),
            tuple(each.id for each in skipped if each.namespace in purged),
        )


def _stored(repository: Repository, ids: Sequence[str]) -> set[str]:
    """Those of the nodes that are stored: where a catalogue is shared, also those that this machine
    has no room for in its memory."""
    found = {node_id for node_id in ids if node_id in repository.nodes.tree}
    if repository.shared and repository.catalog is not None:
        for some in pieces(ids, _ASKED):
            found |= repository.catalog.stamps(ids=some).keys()
    return found


@contextmanager
def _purges(nodes: NodeStore) -> Iterator[set[str]]:
    """Namespaces that are being purged, or were while this lasts: nothing of them may come back."""
    with nodes.lock:
        purged = nodes.namespaces.watch()
    try:
        yield purged
    finally:
        with nodes.lock:
            nodes.namespaces.unwatch(purged)


def _add(
    repository: Repository,
    node: Node,
    namespace: Namespace,
    block_of: Callable[[str], Block],
    purged: Collection[str],
) -> bool:
    """Add a node, with those of its blocks that the store lacks; False if there is no room, or its
    namespace is one of the `purged`."""
    nodes, pool = repository.nodes, repository.blocks.pool
    filled: dict[str, Filled] = {}
    try:
        for name in node.blocks:
            if name in filled or repository.blocks.tier_of(name) is not None:
                continue
            block = block_of(name)
            filled[name] = Filled(nodes.reserve(len(block.data)), name, block)
            pool.reserved(filled[name].slot)[:] = block.data
        with nodes.lock:
            here = all(n in filled or repository.blocks.tier_of(n) for n in node.blocks)
            if not here or namespace.digest in purged:
                return False
            nodes.namespaces.register(namespace)
            for one in filled.values():
                if repository.blocks.tier_of(one.name) is None:
                    pool.seal(one.slot, one.name, one.block)
            vectors = Vectors(lexical_vector(node.tokens), None)
            nodes.add(msgspec.structs.replace(node, stamp=new_stamp()), vectors)
            return node.id in nodes.tree
    except NoSpaceError:
        return False
    finally:
        for one in filled.values():
            pool.cancel(one.slot)  # those that were not sealed
