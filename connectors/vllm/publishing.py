"""Keeps edited rows apart in vLLM's prefix cache.

vLLM publishes blocks while it allocates them. So right before it allocates for a request that will
hold edited rows, the request's block hashes become private from its first edited block on. And
before it promises stored rows, it looks up under private hashes what its own cache still has of
them.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvshare_connectors.vllm.private_hashes import keys_of
from kvshare_connectors.vllm.requests import RequestState

from kvshare_store.save.staging import Reuse, contexts_of_rows

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.request import Request


class Publishing:
    """One per engine; called only from the scheduler's thread."""

    def __init__(self, states: Mapping[str, RequestState], block: int) -> None:
        """`states`: all requests, by id. `block`: tokens of a paged block."""
        self.states = states
        self._block = block
        self._secret = secrets.token_bytes(32)
        self._manager: KVCacheManager | None = None

    def bind(self, manager: KVCacheManager) -> None:
        """Wrap `get_computed_blocks` and `allocate_slots` of vLLM's manager of paged blocks."""
        self._manager = manager
        find, allocate = manager.get_computed_blocks, manager.allocate_slots

        @functools.wraps(find)
        def get_computed_blocks(request: Request) -> tuple[KVCacheBlocks, int, int]:
            found = find(request)
            state = self._plans_to_reuse(request)
            if state is None:
                return found
            state.in_engine = 0
            if not self._hide_hashes(state, state.planned):
                return found
            private = find(request)
            state.show_hashes()
            if private[1] <= found[1]:
                return found
            state.in_engine = private[1]
            return private

        @functools.wraps(allocate)
        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
            state = self._plans_to_reuse(request)
            if state is not None:
                external = kwargs.get("num_external_computed_tokens", 0)
                self._hide_hashes(state, state.holding(external))
            blocks = allocate(request, *args, **kwargs)
            if blocks is None and state is not None:  # no room: nothing is published
                state.show_hashes()
            return blocks

        # vLLM has no hooks there
        manager.get_computed_blocks = get_computed_blocks  # type: ignore[method-assign]
        manager.allocate_slots = allocate_slots  # type: ignore[method-assign]

    def withdraw(self, blocks: set[int]) -> None:
        """Remove paged blocks whose contents are wrong from the prefix cache."""
        if self._manager is not None:
            self._manager.block_pool.evict_blocks(blocks)

    def _plans_to_reuse(self, request: Request) -> RequestState | None:
        """The state of a request with a plan that is neither loaded nor given up."""
        state = self.states.get(request.request_id)
        waits = state is not None and state.plan is not None and not state.loaded
        # without a hasher vLLM caches no prefixes
        return state if waits and request._block_hasher is not None else None

    def _hide_hashes(self, state: RequestState, reuse: Reuse) -> bool:
        """Make the hashes of a request private if what it reuses is not all exact.

        Returns whether they are.
        """
        contexts = contexts_of_rows(reuse, state.length)
        if contexts:
            keys = keys_of(self._secret, state.namespace.digest, contexts, self._block)
            state.hide_hashes(keys)
        return bool(contexts)
