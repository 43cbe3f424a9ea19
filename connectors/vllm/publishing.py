"""Keeps edited rows out of vLLM's prefix cache.

vLLM publishes blocks while it allocates them. So right before it allocates for a request that loads
edited rows, the request's block hashes become private from its first edited block on.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvshare_connectors.vllm.private_hashes import key_of
from kvshare_connectors.vllm.requests import RequestState

from kvshare_store.plan import clip_spans

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.request import Request


class Publishing:
    """One per engine; called only from the scheduler's thread."""

    def __init__(self, states: Mapping[str, RequestState], block: int) -> None:
        """`states`: all requests, by id. `block`: tokens of a paged block."""
        self._states = states
        self._block = block
        self._secret = secrets.token_bytes(32)
        self._manager: KVCacheManager | None = None

    def bind(self, manager: KVCacheManager) -> None:
        """Wrap `allocate_slots` of vLLM's manager of paged blocks."""
        self._manager = manager
        allocate = manager.allocate_slots

        @functools.wraps(allocate)
        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
            hidden = self._hide_hashes(request, kwargs.get("num_external_computed_tokens", 0))
            blocks = allocate(request, *args, **kwargs)
            if blocks is None and hidden is not None:  # no room: nothing is published
                hidden.show_hashes()
            return blocks

        # vLLM has no hook there
        manager.allocate_slots = allocate_slots  # type: ignore[method-assign]

    def withdraw(self, blocks: set[int]) -> None:
        """Remove paged blocks whose contents are wrong from the prefix cache."""
        if self._manager is not None:
            self._manager.block_pool.evict_blocks(blocks)

    def _hide_hashes(self, request: Request, external: int) -> RequestState | None:
        """Make the hashes of a request private if it is about to load edited rows.

        `external`: tokens of the promise that vLLM takes. Returns the state if hashes were hidden.
        """
        state = self._states.get(request.request_id)
        if state is None or state.plan is None or state.loaded or not external:
            return None
        spans = state.promise.spans
        edited = next((span.start for span in spans if not span.exact), None)
        if edited is None or request._block_hasher is None:
            return None
        first = edited // self._block
        made_of = clip_spans(spans, first * self._block, state.length)  # all before it is exact
        key = key_of(self._secret, state.namespace.digest, state.policy, state.plan, made_of)
        state.hide_hashes(key, first)
        return state
