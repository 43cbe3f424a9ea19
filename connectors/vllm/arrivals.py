"""A request's arrival: its namespace, its policy, and whether the store serves it at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvshare_connectors.vllm.adapters import Adapters
from kvshare_connectors.vllm.answers import Warnings
from kvshare_connectors.vllm.requests import RequestState, Wish, granted, wish_of

from kvshare_store.config import StoreConfig, policy_names
from kvshare_store.daemon import protocol
from kvshare_store.namespace import UNPROVEN, Namespace, Sources, Tenants

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Arrivals:
    """One per engine; called only from the scheduler's thread."""

    def __init__(
        self, config: StoreConfig, adapters: Adapters, tenants: Tenants, pool: str = ""
    ) -> None:
        """`pool`: the one that this engine fills; empty in every engine that serves requests."""
        self._config = config
        self._pool = pool
        self._pools = config.pool_names
        self._adapters = adapters
        self._tenants = tenants
        self._sources = Sources(config)
        self._warnings = Warnings()

    def state_of(self, request: Request, engine: Namespace, unserved: str = "") -> RequestState:
        """The state of a new request.

        `engine`: the namespace of requests without tenant and adapter. `unserved`: why the engine
        serves no request, if it serves none.
        """
        wish = wish_of(request)
        policy = granted(self._config.policy, wish.policy)
        adapter = self._adapters.of(request.lora_request)
        tenant = self._tenants.of(request.cache_salt or "")
        namespace = engine.for_tenant(tenant or "", adapter.identity)
        if self._pool:
            namespace = namespace.in_pool(self._pool)
        declined = unserved or _decline_reason(request, wish, policy) or adapter.declined
        if tenant is None:
            declined = declined or UNPROVEN
        if not protocol.lookup_fits(namespace, request.num_prompt_tokens):
            declined = declined or "too_long"
        looked_up = bool(declined)
        source = self._sources.of(wish.source, namespace)
        pools = self._pools if wish.pools else ()
        state = RequestState(
            request, namespace, wish, policy, declined, proven=tenant is not None,
            pools=pools, source=source, looked_up=looked_up,
        )  # fmt: skip
        self._warnings.consider(state)
        self._adapters.keep_apart(request, adapter)
        return state


def _decline_reason(request: Request, wish: Wish, policy: str) -> str:
    """Why a request of this kind is served without the store; empty if it is not."""
    sampling = request.sampling_params
    if request.mm_features or request.prompt_embeds is not None:
        return "multimodal"
    if sampling is None or not request.prompt_token_ids:
        return "pooling"
    if sampling.prompt_logprobs is not None or sampling.prompt_logprob_token_ids is not None:
        return "prompt_logprobs"
    if request.resumable:
        return "streaming_input"
    if wish.unknown:
        return "unknown_parameter"
    if wish.policy is not None and wish.policy not in policy_names():
        return "unknown_policy"
    return "policy_off" if policy == "off" else ""
