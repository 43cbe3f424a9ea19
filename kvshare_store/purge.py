"""Purging a namespace: no byte of it stays, in any tier, in LanceDB or in shared memory.

Blocks go before the rows that name them, so that a purge that was cut short can be made again;
docs/design/ordering.md says what a crash leaves.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from kvshare_store.errors import KVShareError, NamespaceError
from kvshare_store.namespace import Namespace
from kvshare_store.saving import Saving
from kvshare_store.shelf import Shelf
from kvshare_store.tree.catalog import Catalog
from kvshare_store.tree.ledger import Fact

log = logging.getLogger("kvshare")

_POLL_S = 0.05
_CHUNK = 512
_KEPT_S = 90 * 86_400.0
"""How long a purge is kept for machines that are off."""
_BEGUN = "begun "
"""Before the id of a purge while rows of it may be in the catalogue."""
_WIPED_AT_ONCE = 1 << 26
"""Bytes of the arena that are wiped while the lock is held."""


class Purged(msgspec.Struct, frozen=True):
    """What became of one namespace."""

    namespace: str
    model: str
    nodes: int
    blocks: int
    remaining: tuple[str, ...] = ()
    """What could not be removed, and why; empty: nothing is left."""


def matching(shelf: Shelf, beginning: str, tenant: str | None) -> list[Namespace]:
    """The namespace whose digest begins so, or all of a tenant; `NamespaceError` if there is none
    or the beginning fits several."""
    with shelf.lock:
        known = shelf.namespaces()
    if tenant is not None:
        found = [namespace for namespace in known if namespace.tenant == tenant]
        if not found:
            raise NamespaceError("no namespace is of that tenant")
        return found
    found = [namespace for namespace in known if namespace.digest.startswith(beginning)]
    if len(found) != 1 or not beginning:
        raise NamespaceError(f"{len(found)} namespaces begin with {beginning!r}; name exactly one")
    return found


class Purge:
    """One purge of one namespace. Do not hold the lock."""

    def __init__(
        self,
        shelf: Shelf,
        saving: Saving,
        namespace: Namespace,
        reap: Callable[[], None],
        given_up: Callable[[], bool],
    ) -> None:
        """`given_up`: whether whoever asked for it waits no more."""
        self._shelf = shelf
        self._saving = saving
        self._namespace = namespace
        self._digest = namespace.digest
        self._reap = reap
        self._given_up = given_up
        self._nodes: set[str] = set()
        self._names: set[str] = set()

    def preview(self) -> Purged:
        """What there is to purge."""
        with self._shelf.lock:
            nodes = [node for node in self._shelf.tree if node.namespace == self._digest]
        self._nodes = {node.id for node in nodes}
        self._names = {name for node in nodes for name in node.blocks}
        return self._result()

    def run(self, patience: float) -> Purged:
        """Take the namespace out of lookup now, wait for leases and saves for at most `patience`
        seconds, then remove everything. Nothing new is stored in the namespace meanwhile."""
        deadline = time.monotonic() + patience
        with self._shelf.lock:
            self._shelf.closed.add(self._digest)
        try:
            remaining = self._wait(deadline)
            return self._result(remaining or [*self._remove(), *self._wipe(deadline)])
        finally:
            with self._shelf.lock:
                self._shelf.closed.discard(self._digest)

    def _result(self, remaining: Sequence[str] = ()) -> Purged:
        nodes, blocks = len(self._nodes), len(self._names)
        return Purged(self._digest, self._namespace.model, nodes, blocks, tuple(remaining))

    def _wait(self, deadline: float) -> list[str]:
        """For whoever reads or writes rows of the namespace; says who is left."""
        while True:
            self._reap()
            for node in self._shelf.withdraw(self._digest):  # a save may have ended just now
                self._nodes.add(node.id)
                self._names.update(node.blocks)
            with self._shelf.lock:
                leased = sum(map(self._shelf.blocks.leases.pinned, self._names))
                saves = self._saving.in_progress(self._digest)
            remaining = [f"{leased:,} blocks are leased"] if leased else []
            remaining += [f"{saves:,} saves are in progress"] if saves else []
            if not remaining or self._over(deadline):
                return remaining
            time.sleep(_POLL_S)

    def _over(self, deadline: float) -> bool:
        return time.monotonic() > deadline or self._given_up()

    def _remove(self) -> list[str]:
        """Blocks, then rows, then what the namespace is. In the committer's thread, after all that
        was ordered before."""
        return self._shelf.committer.run(self._remove_now)

    def _remove_now(self) -> list[str]:
        shelf, digest = self._shelf, self._digest
        if shelf.catalog is not None:
            for node, _ in shelf.catalog.load(digest):  # also those of other machines
                self._nodes.add(node.id)
                self._names.update(node.blocks)
        refused = shelf.blocks.purge(digest, sorted(self._names))
        remaining = [f"tier {tier}: {error}" for tier, error in refused.items()]
        if remaining and not shelf.encrypted:
            return remaining  # the rows say what is left to be removed the next time
        try:
            if shelf.catalog is not None:
                event = uuid.uuid4().hex
                self._write_down(shelf.catalog, _BEGUN + event)
                shelf.catalog.purge(digest)
                self._write_down(shelf.catalog, event)
        except KVShareError as error:
            return [*remaining, f"catalogue: {error}"]
        shelf.forget_namespace(digest)
        return [f"{what} (unreadable: the key is destroyed)" for what in remaining]

    def _write_down(self, catalog: Catalog, event: str) -> None:
        """Before rows are removed, or a crash would leave other machines' copies; and after that,
        because from then on rows of the namespace are new ones."""
        if self._shelf.shared:
            key, now = f"purged/{self._digest}", time.time()
            catalog.facts.overwrite(Fact(key, now, self._shelf.machine, event))

    def _wipe(self, deadline: float) -> list[str]:
        """Zero what is free of the arena. Slots that are being filled may have held rows of the
        namespace: once they are filled or given back they hold none."""
        blocks = self._shelf.blocks
        with self._shelf.lock:
            filling = blocks.filling()
        _wipe_free(self._shelf)
        while filling := filling & blocks.filling():
            if self._over(deadline):
                return [f"{len(filling):,} slots in shared memory are being filled"]
            self._reap()
            time.sleep(_POLL_S)
        return []


def _wipe_free(shelf: Shelf) -> None:
    """Zero what is free of the arena."""
    at: int | None = 0
    while at is not None:
        with shelf.lock:
            at = shelf.blocks.host.wipe(at, _WIPED_AT_ONCE)


class OthersPurges:
    """Purges are facts of a shared catalogue: each machine removes its own copies when it next
    looks, also one that was not running; the home remembers which purges it has carried out.

    A purge is known by its id, never by a time: clocks differ."""

    def __init__(self, shelf: Shelf, saving: Saving, home: Path) -> None:
        self._shelf = shelf
        self._saving = saving
        self._file = home / "purges.json"
        self._done = self._remembered()
        self._version = -1

    def _remembered(self) -> dict[str, str]:
        """Of each namespace the purge that was carried out last. Homes of a release before have
        numbers: the times of purges that had no id."""
        try:
            done = msgspec.json.decode(self._file.read_bytes(), type=dict[str, str | float])
        except (FileNotFoundError, msgspec.DecodeError):  # then they are carried out once more
            return {}
        return {digest: str(event) for digest, event in done.items()}

    def look(self) -> None:
        """Carry out what is new. What is leased or being saved now is left for the next look."""
        catalog = self._shelf.catalog
        if catalog is None or (version := catalog.facts.refresh()) == self._version:
            return
        waiting = False
        purges = _purges(catalog)
        for digest, fact in purges.items():
            event = fact.state or str(fact.at)
            if self._done.get(digest) == event:
                continue
            if fact.by == self._shelf.machine or self._carried_out(catalog, digest, event):
                self._remember(digest, event, purges)
            else:
                waiting = True
        self._version = -1 if waiting else version

    def _remember(self, digest: str, event: str, known: Collection[str]) -> None:
        self._done = {at: done for at, done in self._done.items() if at in known}
        self._done[digest] = event
        written = self._file.with_suffix(".new")
        written.write_bytes(msgspec.json.encode(self._done))
        written.replace(self._file)

    def _carried_out(self, catalog: Catalog, digest: str, event: str) -> bool:
        with self._shelf.lock:
            nodes = [node for node in self._shelf.tree if node.namespace == digest]
        here = {node.id: node.stamp for node in nodes}
        begun = event.startswith(_BEGUN)
        remove = self._remove_copies
        return self._shelf.committer.run(lambda: remove(catalog, digest, here, begun))

    def _remove_copies(
        self, catalog: Catalog, digest: str, here: Mapping[str, int], begun: bool
    ) -> bool:
        """In the committer's thread: what was `here` (stamps by id) is committed by now, so what
        the catalogue does not have has been purged, and what it has was saved anew, unless the
        purge has only `begun`. Then rows of it may still be there: False."""
        shelf, blocks = self._shelf, self._shelf.blocks
        catalog.refresh()
        if not begun:
            _remove_without_record(shelf, catalog, digest)
            catalog.drop_unreadable(digest)
        shelf.unlearn(_absent(catalog, here))
        shelf.keep_registered(catalog.digests())
        with shelf.lock:
            kept = [node for node in shelf.tree if node.namespace == digest]
            if (begun and kept) or self._saving.in_progress(digest):
                return False
            if not kept:
                shelf.forget_namespace(digest)
                catalog.forget_key(digest)
        refused = blocks.purge_copies(digest, {name for node in kept for name in node.blocks})
        blocks.doubt_shared(None)
        _wipe_free(shelf)
        return refused is not None and not refused


def _remove_without_record(shelf: Shelf, catalog: Catalog, digest: str) -> None:
    """Rows that were committed by who had not heard of the purge: it took their namespace's record,
    so nobody can read them, nor name them to purge them again. In the committer's thread."""
    if digest in catalog.digests() or all(digest != namespace for _, namespace in catalog.ids()):
        return
    with shelf.lock:
        nodes = [node for node in shelf.tree if node.namespace == digest]
    refused = shelf.blocks.purge(digest, sorted({name for node in nodes for name in node.blocks}))
    for tier, error in refused.items():  # the janitor removes what no row names
        log.warning("kvshare: a purge left blocks in tier %s: %s", tier, error)
    catalog.purge(digest)


def _purges(catalog: Catalog) -> dict[str, Fact]:
    """The last purge of each namespace, but for those of long ago: by then a machine that was off
    has forgotten the nodes, and removes their blocks as nobody's."""
    facts = catalog.facts.facts("key LIKE 'purged/%'")
    long_ago = time.time() - _KEPT_S
    if any(fact.at < long_ago for fact in facts):
        catalog.facts.remove(f"key LIKE 'purged/%' AND at < {long_ago}")
    return {fact.key.rpartition("/")[2]: fact for fact in facts if fact.at >= long_ago}


def _absent(catalog: Catalog, here: Mapping[str, int]) -> dict[str, int]:
    """Those whose rows are gone, or have another stamp."""
    ids, rows = list(here), dict[str, int]()
    for start in range(0, len(ids), _CHUNK):
        rows |= catalog.stamps(ids=ids[start : start + _CHUNK])
    return {node_id: stamp for node_id, stamp in here.items() if rows.get(node_id) != stamp}
