"""Saving: fresh rows become blocks, and a prompt becomes a node."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvshare_store.blocks.pool import Reserved
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError, LeaseError, LimitError, MissingBlockError, PlanError
from kvshare_store.errors.wording import short
from kvshare_store.lookup.open_plans import OpenPlans
from kvshare_store.lookup.rates import Rates
from kvshare_store.lookup.sources import Sources
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node, node_id, with_sources
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.observability.metrics import Metrics
from kvshare_store.quality.quality import Quality
from kvshare_store.save.answers import Answers, rows_of
from kvshare_store.save.new_node import id_of, new_node
from kvshare_store.save.provenance import Verified, check_provenance, pools_of
from kvshare_store.save.second_looks import SecondLooks
from kvshare_store.save.staging import (
    Reuse,
    RowSource,
    Save,
    Staged,
    check_extends,
    check_reuse,
    new_staged,
    without_blocks,
    without_unused_blocks,
)
from kvshare_store.tensors.frame import Block, block_name


class Saving:
    """Staged saves of one store. Thread-safe under the lock of the nodes."""

    def __init__(
        self,
        config: StoreConfig,
        nodes: NodeStore,
        plans: OpenPlans,
        sources: Sources,
        metrics: Metrics,
        quality: Quality,
    ) -> None:
        self._config = config
        self._nodes = nodes
        self._blocks = nodes.blocks
        self._pool = nodes.blocks.pool
        self._plans = plans
        self._sources = sources
        self._metrics = metrics
        self.answers = Answers(nodes)
        self._rates = Rates()
        self.looks = SecondLooks(config, nodes, self.answers, metrics, quality)
        self._saves: dict[str, Save] = {}
        self._saving: set[str] = set()
        """Ids of the nodes that the staged saves will become."""

    def reload(self, config: StoreConfig) -> None:
        """Go on by other settings."""
        self._config = config
        self.looks.reload(config)

    def stage(
        self,
        tokens: Tokens,
        namespace: Namespace,
        reuse: Reuse,
        owner: str,
        extends: int = 0,
        *,
        greedy: bool = False,
        request: str = "",
        source: bytes = b"",
    ) -> Staged:
        """Which rows of a prompt are missing. Nothing is reserved: a staged save is a record.

        A client (`owner`) saves one prompt at a time: what it began before and never ended is
        abandoned here. `extends` and what follows: see `Store.stage`.
        """
        if owner:
            self.reap({owner})
        try:
            self._check_rate(namespace)
            save = self._checked(tokens, namespace, reuse, owner, extends)
        except KVShareError as error:
            self._metrics.error(error.kind)
            raise
        if save is None:
            return Staged(known=True)
        sources = self._sources.of(namespace, tokens, extends, source)
        return self._kept(
            msgspec.structs.replace(save, greedy=greedy, request=request, sources=sources)
        )

    def _check_rate(self, namespace: Namespace) -> None:
        rate = self._nodes.limits.of(namespace).saves_per_second
        if not self._rates.allow(namespace.digest, rate):
            raise LimitError(
                f"namespace {short(namespace.digest)} saves more prompts than saves_per_second "
                f"({rate:g}) lets it; try again later"
            )

    def _checked(
        self, request: Tokens, namespace: Namespace, reuse: Reuse, owner: str, extends: int
    ) -> Save | None:
        """The checked save; None if rows that it builds on are not here in the form that it
        names."""
        check_reuse(reuse, len(request))
        check_extends(extends, reuse, len(request))
        # an exact prefix, what continues an edited prompt, and a first donor come beside them
        if len(reuse.donors) > self._config.max_donors + 3:
            raise PlanError(f"{len(reuse.donors)} donors are more than any plan has")
        base, verified = None, None
        if not extends:
            reuse = without_unused_blocks(reuse)
            verified = self._verified(reuse, request, namespace)
        elif not self._fits_quota(len(request), namespace):
            return None  # storing the prompt without its answer is better than storing neither
        elif base := self.answers.base(namespace.digest, request[:extends], reuse):
            reuse = rows_of(base, extends)
            verified = check_provenance(reuse, request, [base], namespace)
        if verified is None:
            if not extends:
                self._metrics.error(MissingBlockError.kind)
            return None
        kept = without_blocks(reuse, verified.pooled)
        staged = new_staged(kept.spans, len(request), self._config.block_tokens)
        row_bytes = namespace.layout.row_bytes
        self._pool.check_fits(rows * row_bytes for rows in staged.sizes)
        sizes = tuple(
            verified.sizes.get(name) or self._blocks.size_of(name) for name in kept.blocks
        )
        told = verified.policy
        return Save(namespace, request, reuse, kept, sizes, told, staged, owner, extends, base)

    def _fits_quota(self, rows: int, namespace: Namespace) -> bool:
        quota = self._nodes.limits.of(namespace).namespace_bytes
        return not quota or rows * namespace.layout.row_bytes <= quota

    def _verified(self, reuse: Reuse, request: Tokens, namespace: Namespace) -> Verified | None:
        """Check the claim against the donors; None if a donor is gone or has another form now."""
        with self._nodes.lock:
            named = [self._donors(donor) for donor in reuse.donors]
            donors = [node for nodes in named for node in nodes]
            pools = pools_of(namespace, donors, self._nodes.namespaces)
        try:
            return check_provenance(reuse, request, donors, namespace, pools)
        except PlanError:
            if all(named) and _as_planned(reuse.stamps, named):
                raise
            return None

    def _donors(self, node_id: str) -> list[Node]:
        """All forms of a node that a client may have been planned: those of open plans, and the
        present node or the one that replaced it."""
        here = self.answers.now(node_id)
        found = [node for node in self._plans.donors(node_id) if node is not here]
        return [*found, here] if here is not None else found

    def _kept(self, save: Save) -> Staged:
        name = id_of(save)
        exact = self.answers.base(save.namespace.digest, save.tokens, Reuse())
        with self._nodes.lock:
            here = exact or self.answers.now(name)
            known = here is not None or name in self._saving
            closed = save.namespace.digest in self._nodes.namespaces.closed
            if known or closed or len(save.tokens) < self._config.min_prompt_tokens:
                if here is not None:
                    self._nodes.used(here)
                    if here.length == len(save.tokens):
                        self._sources.confirm(here, save.sources)
                return Staged(known=True)
            self._saving.add(name)
            self._saves[save.staged.id] = save
        return save.staged

    def wanted_bytes(self, staged_id: str, owner: str) -> int:
        """Bytes of the rows that a staged save of `owner` wants; `LeaseError` if there is none."""
        save = self._saves.get(staged_id)
        if save is None or save.owner != owner:
            raise LeaseError("the staged save is unknown or has ended; save again")
        return save.staged.rows * save.namespace.layout.row_bytes

    def abandon(self, staged_id: str) -> None:
        """Forget a staged save; one that has ended already is ignored."""
        with self._nodes.lock:
            save = self._saves.pop(staged_id, None)
            if save is not None:
                self._saving.discard(id_of(save))

    def reap(self, dead_owners: set[str]) -> None:
        """Forget the saves of clients that are gone."""
        with self._nodes.lock:
            for staged_id in [i for i, save in self._saves.items() if save.owner in dead_owners]:
                self.abandon(staged_id)

    def revoke(self, nodes: Sequence[Node]) -> None:
        """Nothing is saved any more on top of these nodes of a namespace, which are about to leave
        the tree, nor on top of what has left it: nobody knows of that any more whether it was one
        of them, in a longer form or before its answer took its place. Hold the lock."""
        gone, namespaces = {node.id for node in nodes}, {node.namespace for node in nodes}

        def ends(donor: str) -> bool:
            return donor in gone or donor not in self._nodes.tree

        forms = [form for form in self._plans.forms() if form.namespace in namespaces]
        self._plans.revoke((*nodes, *(form for form in forms if ends(form.id))))
        for staged_id, save in list(self._saves.items()):
            base = (save.base.id,) if save.base is not None else ()
            if save.namespace.digest in namespaces and any(map(ends, (*save.reuse.donors, *base))):
                self.abandon(staged_id)

    def forget(self, digest: str) -> None:
        """Drop what is remembered of the prompts of a namespace, which have left the tree."""
        self.looks.forget(digest)
        self.answers.forget_gone()

    def in_progress(self, namespace: str) -> int:
        """How many staged saves of a namespace have not ended."""
        with self._nodes.lock:
            return sum(save.namespace.digest == namespace for save in self._saves.values())

    def __len__(self) -> int:
        return len(self._saves)

    # --- commit ------------------------------------------------------------------------------

    def commit(self, staged_id: str, source: RowSource) -> str | None:
        """Copy the rows: the prompt becomes a node. None if a shared block is gone.

        Whatever fails, the save has ended and its slots are free again. `NoSpaceError` when the
        host budget is full of rows in use, `PlanError` when `source` has too few rows.
        """
        save = self._saves.get(staged_id)
        if save is None:
            raise LeaseError("the staged save is unknown or has ended; save again")
        fresh: list[Filled] = []
        with self._metrics.timed("save"):
            try:
                self.copy(save, source, fresh)
                node = new_node(save, [filled.name for filled in fresh], self._parent(save))
                vectors = Vectors(lexical_vector(save.tokens), None)
                with self._nodes.lock:
                    if staged_id not in self._saves:
                        raise LeaseError("the staged save ended while it was committed")
                    self._add(save, node, vectors, fresh)
            except MissingBlockError as error:
                self._metrics.error(error.kind)
                return None
            except KVShareError as error:
                self._metrics.error(error.kind)
                raise
            finally:
                with self._nodes.lock:
                    for filled in fresh:  # those that were not sealed
                        self._pool.cancel(filled.slot)
                    self.abandon(staged_id)
        return node.id

    def copy(self, save: Save, source: RowSource, fresh: list[Filled]) -> None:
        """Copy fresh rows, block by block and without the lock, into slots that only the store can
        write to. Whatever the client writes afterwards has no effect, and a name is computed from
        the very bytes that were copied."""
        layout, at = save.namespace.layout, 0
        for rows in save.staged.sizes:
            nbytes = rows * layout.row_bytes
            slot = self._nodes.reserve(nbytes)
            block = Block(save.namespace.digest, layout, self._pool.reserved(slot))
            filled = Filled(slot, "", block)
            fresh.append(filled)
            source.read_into(at, block.data)
            filled.name = block_name(block)
            at += nbytes

    def _parent(self, save: Save) -> Node | None:
        if save.base is not None:
            return self.answers.parent(save)
        for node in map(self.answers.now, save.reuse.donors):
            if node is None or node.namespace == save.namespace.digest:  # of no pool
                return node
        return None

    def _add(self, save: Save, node: Node, vectors: Vectors, fresh: list[Filled]) -> None:
        """Make the node visible. Runs under the lock: this is the last moment at which a shared
        block could be missing."""
        for name in save.kept.blocks:
            if self._blocks.tier_of(name) is None:
                raise MissingBlockError(f"block {short(name)} left the store before the commit")
        self._nodes.namespaces.register(save.namespace)
        nbytes = sum(len(filled.block.data) for filled in fresh)
        for filled in fresh:
            self._pool.seal(filled.slot, filled.name, filled.block)
        edited = self._edited_twin(node)
        if edited is not None:
            node = with_sources(node, edited.sources)
            told = node.prompt_tokens or edited.prompt_tokens  # a second look does not say
            node = msgspec.structs.replace(node, prompt_tokens=told)
        here = self._nodes.add(node, vectors)
        if here.stamp != node.stamp:  # it was there already
            self._sources.confirm(here, node.sources)
        if edited is not None:
            self._settle(node, edited)
        self.answers.stored(save, node.id)
        if node.id in self._nodes.tree:
            self.looks.stored(node, save)
        if save.extends:
            self._metrics.add("answers_stored")
            self._metrics.add("tokens_answers_stored", node.length - save.extends)
        self._metrics.add("bytes_stored", nbytes)

    def _edited_twin(self, node: Node) -> Node | None:
        """The edited node of the same tokens, where this one is exact."""
        if not node.exact:
            return None
        return self._nodes.tree.get(node_id(node.namespace, node.tokens, False))

    def _settle(self, node: Node, edited: Node) -> None:
        """An exact node takes the place of the edited one of the same tokens. Hold the lock."""
        self.looks.settled(edited, node)
        if not edited.pinned:
            self.answers.replaced(edited.id, node.id)
            self._nodes.remove([edited.id], instead=node.id)


class Filled(msgspec.Struct):
    """A slot of the arena with a block that no node uses yet."""

    slot: Reserved
    name: str
    block: Block


def _as_planned(stamps: Sequence[int], named: Sequence[Sequence[Node]]) -> bool:
    """Whether the store still has the form of each donor that the client was planned."""
    forms = [{node.stamp for node in nodes} for nodes in named]
    return all(stamp in known for stamp, known in zip(stamps, forms, strict=False))
