"""What KVShare would plan for each prompt, given the prompts before it: the real planner over nodes
without rows, in the memory of one process."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import count

from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.planner import Planned, Planner
from kvshare_store.lookup.policy import configured_policy
from kvshare_store.lookup.text import delimiter_ids
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.nodes.state import NodeState
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.plan.spans import Reused, reused_of
from kvshare_store.save.new_node import id_of, new_node, stored_as
from kvshare_store.save.provenance import check_provenance
from kvshare_store.save.staging import (
    Reuse,
    Save,
    new_staged,
    reuse_of,
    without_scrap,
    without_unused_blocks,
)
from kvshare_store.simulate.prompts import Prompt
from kvshare_store.tensors.layout import KVLayout

_ROW_UNIT = 4
"""Bytes of one number of K and one of V in half precision; a row is a multiple of it."""


class PlannedReuse:
    """One store under one policy. Its answers depend on the prompts alone: alignment is bounded by
    work and not by time, and costs are the defaults of a store that has measured nothing."""

    def __init__(
        self,
        config: StoreConfig,
        row_bytes: int,
        *,
        budget: float = math.inf,
        settle: float | None = None,
        tokenizer: str = "",
    ) -> None:
        """`budget`: bytes of rows. `settle`: seconds after which the rows of an edited prompt count
        as computed in full (None: never). `tokenizer`: a folder, for policies with delimiters."""
        if row_bytes % _ROW_UNIT:
            raise ConfigError(f"--row-bytes must be a multiple of {_ROW_UNIT}, got {row_bytes}")
        self._config = config
        self._policy = configured_policy(config)
        self._planner = Planner(config, lambda: Effort(seconds=math.inf))
        self._cost = CostModel()
        self._state = NodeState(config.block_tokens)
        layout = KVLayout(1, 1, row_bytes // _ROW_UNIT, "float16")
        self._namespace = Namespace("simulated", layout, tokenizer=tokenizer)
        self._budget, self._settle = budget, settle
        self._unsettled: deque[tuple[float, str, Save]] = deque()
        self._blocks = count()

    def serve(self, prompt: Prompt) -> Reused:
        """Plan and store a prompt with its answer; returns how much of it is reused."""
        self._settle_until(prompt.at)
        namespace = self._namespace.for_tenant(prompt.tenant)
        planned = self._plan(prompt.tokens, namespace)
        for donor in planned.used(self._policy, answers=self._config.store_answers):
            self._state.tree.touch(donor.id)
        if len(prompt.tokens) >= self._config.min_prompt_tokens:
            self._keep(prompt, namespace, planned)
        return reused_of(planned.plan.spans)

    def _plan(self, tokens: Tokens, namespace: Namespace) -> Planned:
        state = self._state
        return self._planner.plan(
            tokens,
            Nominator(state.tree, state.index(namespace.digest), state.lock),
            self._policy,
            self._cost,
            tier_of=lambda _: "host",
            row_bytes=namespace.layout.row_bytes,
            delimiters=delimiter_ids(namespace.tokenizer) if self._policy.delimiters else (),
        )

    # --- what is stored ----------------------------------------------------------------------

    def _keep(self, prompt: Prompt, namespace: Namespace, planned: Planned) -> None:
        # as if the client had used the whole plan
        reuse = reuse_of(planned.plan)
        reuse = without_unused_blocks(without_scrap(reuse, self._rows(planned)))
        save = self._save(prompt.computed, namespace, reuse, planned.donors)
        stored = stored_as(self._state.tree, save)
        if stored is not None:
            self._state.tree.touch(stored)
            return
        self._add(save)
        if save.reuse.generation and self._settle is not None and prompt.at is not None:
            self._unsettled.append((prompt.at + self._settle, id_of(save), save))

    def _rows(self, planned: Planned) -> list[int]:
        """How many rows each block of a plan has."""
        nbytes = {
            name: size
            for donor in planned.donors
            for name, size in zip(donor.blocks, donor.block_bytes, strict=True)
        }
        row_bytes = self._namespace.layout.row_bytes
        return [nbytes[name] // row_bytes for name in planned.plan.block_names]

    def _save(
        self, tokens: Tokens, namespace: Namespace, reuse: Reuse, donors: Sequence[Node] = ()
    ) -> Save:
        verified = check_provenance(reuse, tokens, donors, namespace)
        sizes = tuple(verified.sizes[name] for name in reuse.blocks)
        staged = new_staged(reuse.spans, len(tokens), self._config.block_tokens)
        return Save(namespace, tokens, reuse, reuse, sizes, verified.policy, staged, owner="")

    def _add(self, save: Save) -> None:
        state, donors = self._state, save.reuse.donors
        fresh = [f"{next(self._blocks):064x}" for _ in save.staged.sizes]
        node = new_node(save, fresh, state.tree.get(donors[0]) if donors else None)
        state.insert(node, Vectors(lexical_vector(save.tokens), None))
        if node.exact:
            state.remove([node_id(node.namespace, save.tokens, False)])
        self._make_room()

    def _make_room(self) -> None:
        tree, least = self._state.tree, self._config.min_prompt_tokens
        while (held := sum(map(tree.bytes_of, tree.namespaces()))) > self._budget:
            self._state.shorten(next(tree.victims()), math.ceil(held - self._budget), least)

    def _settle_until(self, now: float | None) -> None:
        """Store edited prompts as exact ones when they are due, unless they were evicted."""
        while self._unsettled and now is not None and self._unsettled[0][0] <= now:
            _, edited, save = self._unsettled.popleft()
            if edited in self._state.tree:
                self._add(self._save(save.tokens, save.namespace, Reuse()))
