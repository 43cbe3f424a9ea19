"""Saving: fresh rows become blocks, and a prompt becomes a node."""

from __future__ import annotations

from typing import Any

from kvshare_store.config import StoreConfig
from kvshare_store.errors import (
    KVShareError,
    LeaseError,
    MissingBlockError,
    NamespaceError,
    NoSpaceError,
    PlanError,
)
from kvshare_store.lookup.align import align
from kvshare_store.lookup.embedders import lexical_vector
from kvshare_store.metrics import Metrics
from kvshare_store.namespace import Namespace
from kvshare_store.shelf import Shelf
from kvshare_store.staging import (
    Reuse,
    Save,
    Slot,
    Staged,
    block_sizes,
    check_reuse,
    exact_rows,
    fresh_segments,
    new_staged,
)
from kvshare_store.tensors.frame import Block, block_name
from kvshare_store.tree.catalog import Vectors
from kvshare_store.tree.edits import Tokens, edit_script
from kvshare_store.tree.node import Node, check_segments, new_stamp, node_id


class Saving:
    """Staged saves of one store. Thread-safe under the shelf's lock."""

    def __init__(self, config: StoreConfig, shelf: Shelf, metrics: Metrics) -> None:
        self._config = config
        self._shelf = shelf
        self._blocks = shelf.blocks
        self._metrics = metrics
        self._saves: dict[str, Save] = {}
        self._saving: set[str] = set()
        """Ids of the nodes that the staged saves will become."""

    def stage(self, request: Tokens, namespace: Namespace, reuse: Reuse, owner: str) -> Staged:
        """Reserve slots for the rows of a prompt that are not stored yet.

        A client (`owner`) saves one prompt at a time: what it began before and never ended is
        abandoned here, when it certainly writes to those slots no more.
        """
        if owner:
            self._abandon_all_of({owner})
        check_reuse(reuse, len(request))
        self._shelf.register(namespace)
        tree = self._shelf.tree
        name = node_id(namespace.digest, request, reuse.generation == 0)
        exact = node_id(namespace.digest, request, True)
        with self._shelf.lock:
            known = name in tree or exact in tree or name in self._saving
            closed = namespace.digest in self._shelf.closed
            if known or closed or len(request) < self._config.min_prompt_tokens:
                tree.touch(exact if exact in tree else name)
                return Staged(known=True)
            self._saving.add(name)
        try:
            slots = self._reserve(namespace, reuse, len(request))
        except KVShareError as error:
            self._metrics.error(error.kind)
            with self._shelf.lock:
                self._saving.discard(name)
            raise
        staged = new_staged(slots, reuse.spans, len(request), str(self._blocks.host.arena.path))
        with self._shelf.lock:
            self._saves[staged.id] = Save(namespace, request, reuse, staged, owner)
        return staged

    def _reserve(self, namespace: Namespace, reuse: Reuse, length: int) -> list[Slot]:
        fresh = length - sum(span.length for span in reuse.spans)
        slots: list[Slot] = []
        try:
            for rows in block_sizes(fresh, self._config.block_tokens):
                nbytes = rows * namespace.layout.row_bytes
                slots.append(Slot(self._blocks.reserve(nbytes), rows, nbytes))
        except NoSpaceError:
            for slot in slots:
                self._blocks.cancel(slot.offset)
            raise
        return slots

    def fill(self, staged: Staged, namespace: Namespace, rows: Any) -> None:
        """Copy fresh rows into the slots; `NamespaceError` if their number does not fit."""
        layout = namespace.layout
        if len(memoryview(rows).cast("B")) != staged.rows * layout.row_bytes:
            raise NamespaceError(f"expected {staged.rows} fresh rows of {layout.row_bytes} bytes")
        if not staged.slots:
            return
        source = layout.words(rows, staged.rows)
        at = 0
        for slot in staged.slots:
            target = layout.words(self._blocks.reserved(slot.offset), slot.rows)
            target[:] = source[:, :, at : at + slot.rows]
            at += slot.rows

    def abandon(self, staged_id: str) -> None:
        """Give a staged save's slots back."""
        with self._shelf.lock:
            save = self._saves.pop(staged_id, None)
            if save is not None:
                exact = save.reuse.generation == 0
                self._saving.discard(node_id(save.namespace.digest, save.tokens, exact))
                for slot in save.staged.slots:
                    self._blocks.cancel(slot.offset)

    def reap(self, dead_owners: set[str]) -> None:
        """Abandon saves whose client is gone. Time alone ends none: a client that is merely slow
        would go on writing into a slot that is somebody else's by then."""
        self._abandon_all_of(dead_owners)

    def _abandon_all_of(self, owners: set[str]) -> None:
        with self._shelf.lock:
            for staged_id in [i for i, save in self._saves.items() if save.owner in owners]:
                self.abandon(staged_id)

    def in_progress(self, namespace: str) -> int:
        """How many staged saves of a namespace have not ended."""
        return sum(save.namespace.digest == namespace for save in self._saves.values())

    # --- commit ------------------------------------------------------------------------------

    def commit(self, staged_id: str) -> str | None:
        """The slots are filled: the prompt becomes a node. None if a shared block is gone."""
        save = self._saves.get(staged_id)
        if save is None:
            raise LeaseError("the staged save is unknown or has ended; save again")
        with self._metrics.timed("save"):
            try:
                fresh = [self._sealed(save, slot) for slot in save.staged.slots]
                node = self._node(save, [name for name, _ in fresh])
                vectors = Vectors(lexical_vector(save.tokens), None)
                with self._shelf.lock:
                    if staged_id not in self._saves:
                        raise LeaseError("the staged save ended while it was committed")
                    try:
                        self._add(save, node, vectors, fresh)
                    finally:
                        self.abandon(staged_id)  # before anybody else gets a slot it gave back
            except MissingBlockError as error:
                self._metrics.error(error.kind)
                return None
            finally:
                self.abandon(staged_id)
        return node.id

    def _sealed(self, save: Save, slot: Slot) -> tuple[str, Block]:
        """Name of a filled slot: hashed outside the lock, this is most of what a commit costs."""
        rows = self._blocks.reserved(slot.offset)
        block = Block(save.namespace.digest, save.namespace.layout, rows)
        return block_name(block), block

    def _node(self, save: Save, fresh: list[str]) -> Node:
        reuse, length = save.reuse, len(save.tokens)
        if reuse.generation == 0 and not all(span.exact for span in reuse.spans):
            raise PlanError("edited rows cannot make an exact node")
        sizes = [slot.rows for slot in save.staged.slots]
        segments = [*reuse.spans, *fresh_segments(save.staged.fresh, sizes, len(reuse.blocks))]
        segments.sort(key=lambda segment: segment.start)
        blocks = (*reuse.blocks, *fresh)
        check_segments(segments, length, len(blocks))
        parent = self._shelf.tree.get(reuse.donors[0]) if reuse.donors else None
        matches = align(save.tokens, parent.tokens) if parent else []
        return Node(
            id=node_id(save.namespace.digest, save.tokens, reuse.generation == 0),
            namespace=save.namespace.digest,
            token_bytes=save.tokens.tobytes(),
            parent=parent.id if parent else None,
            edits=edit_script(matches, parent.length, save.tokens) if parent else (),
            segments=tuple(segments),
            blocks=blocks,
            block_bytes=(
                *(self._bytes_of(name) for name in reuse.blocks),
                *(slot.nbytes for slot in save.staged.slots),
            ),
            exact_rows=exact_rows(reuse.spans, length),
            generation=reuse.generation,
            stamp=new_stamp(),
        )

    def _bytes_of(self, name: str) -> int:
        """Of a shared block: a lease may outlive the last node that used it."""
        return self._shelf.tree.size(name) or self._shelf.size_of(name)

    def _add(
        self, save: Save, node: Node, vectors: Vectors, fresh: list[tuple[str, Block]]
    ) -> None:
        """Under the lock: the last moment at which a shared block could be missing."""
        for name in save.reuse.blocks:
            if self._blocks.tier_of(name) is None:
                raise MissingBlockError(f"block {name[:12]} left the store before the commit")
            if any(user.namespace != node.namespace for user in self._shelf.users(name)):
                raise NamespaceError(f"block {name[:12]} belongs to another namespace")
        for (name, block), slot in zip(fresh, save.staged.slots, strict=True):
            self._blocks.seal(slot.offset, name, block)
        self._shelf.add(node, vectors)
        if node.exact:
            self._shelf.remove([node_id(node.namespace, save.tokens, False)])
        self._metrics.add("bytes_stored", sum(slot.nbytes for slot in save.staged.slots))
