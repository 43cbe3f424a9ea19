"""KVShareConnector, the class that `--kv-transfer-config` names: scheduler side and worker side."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from kvshare_connectors.vllm.capability import decline_reason
from kvshare_connectors.vllm.metadata import KVShareMetadata
from kvshare_connectors.vllm.metrics import Counted, Tally, loads
from kvshare_connectors.vllm.settings import pool_of, settings_of, sourced_settings
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvshare_store.errors import ConfigError, UnsupportedError
from kvshare_store.observability.logs import log_as_json

if TYPE_CHECKING:
    import torch
    from kvshare_connectors.vllm.events import Announcer
    from kvshare_connectors.vllm.idle import IdleWorker
    from kvshare_connectors.vllm.planning import Planning
    from kvshare_connectors.vllm.worker import Worker
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvshare_store.daemon.protocol import Role


log = logging.getLogger("kvshare")

NEEDS_RECOMPUTE = (
    'kv_transfer_config needs "kv_load_failure_policy": "recompute", so that a failed load is a '
    "miss and not a failed request"
)
_open: WeakSet[KVShareConnector] = WeakSet()
"""The connectors of this process: one for each engine and role."""


class KVShareConnector(Counted, KVConnectorBase_V1, SupportsHMA):
    """Loads reused KV before the forward and saves fresh KV after it.

    For a model that KVShare does not serve the connector stays idle and logs one line: every
    request is computed in full. The same happens if a worker cannot use the KV cache that was
    built. An invalid setting stops the engine. `SupportsHMA`: vLLM goes on managing the memory of
    hybrid models, for which KVShare is idle.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _refuse_a_second(vllm_config, role)
        self._vllm = vllm_config
        self._kv_cache = kv_cache_config
        self.config = settings_of(vllm_config)
        self._pool = pool_of(vllm_config)
        if self.config.log_format == "json":
            log_as_json()
        self._unserved = self._reason()
        self.planning: Planning | None = None
        self._tally = Tally()
        self._worker: Worker | IdleWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._open_scheduler_side()
        _open.add(self)

    def _reason(self) -> str | None:
        reason = decline_reason(self._vllm)
        if reason is None and len(self._kv_cache.kv_cache_groups) != 1:
            reason = "mamba_or_hybrid"
        return reason

    def _open_scheduler_side(self) -> None:
        from kvshare_connectors.vllm.banner import introduce, look_for_own_prompts  # noqa: PLC0415 - one role only
        from kvshare_connectors.vllm.identity import namespace_of  # noqa: PLC0415
        from kvshare_connectors.vllm.planning import Planning  # noqa: PLC0415

        from kvshare_store.daemon.link import open_link  # noqa: PLC0415
        from kvshare_store.namespace import Tenants  # noqa: PLC0415

        if self._unserved is not None:
            log.warning("kvshare: this model is served without reuse: %s", self._unserved)
            return
        transfer = self._vllm.kv_transfer_config
        if transfer is None or transfer.kv_load_failure_policy != "recompute":
            raise ConfigError(NEEDS_RECOMPUTE)
        tenants = Tenants(self.config)  # first, so that a missing key stops the engine at once
        namespace = namespace_of(self._vllm, self._kv_cache)
        size = self._vllm.cache_config.block_size
        given = sourced_settings(self._vllm)
        link = open_link(given.config)
        introduce(link, given)
        look_for_own_prompts(link, namespace)
        announcer = self._announcer(size)
        self.planning = Planning(self.config, namespace, link, size, tenants, announcer, self._pool)
        self._tally = self.planning.tally
        if self._vllm.observability_config.otlp_traces_endpoint is not None:
            from kvshare_connectors.vllm.tracing import Trace  # noqa: PLC0415 - an extra of vLLM

            self.planning.trace_of = Trace

    def _announcer(self, block: int) -> Announcer | None:
        from kvshare_connectors.vllm.events import Announcer  # noqa: PLC0415 - one role only

        events = self._vllm.kv_events_config
        wanted = events is not None and events.enable_kv_cache_events
        return Announcer(self.config, block) if wanted else None

    @property
    def worker(self) -> Worker | IdleWorker | None:
        """The worker side, once vLLM has made its KV cache."""
        return self._worker

    # --- worker side ----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from kvshare_connectors.vllm.containment import contained  # noqa: PLC0415 - one role only
        from kvshare_connectors.vllm.idle import IdleWorker  # noqa: PLC0415

        if self._unserved is not None:
            return
        size = self._kv_cache.kv_cache_groups[0].kv_cache_spec.block_size
        try:
            self._worker = self._open_worker(kv_caches, size)
        except ConfigError:
            raise
        except Exception as found:  # noqa: BLE001 - the engine runs without reuse
            error = contained(found)
            log.warning("kvshare: this model is served without reuse: %s", error)
            self._worker = IdleWorker(f"worker_{error.kind}", size)

    def _open_worker(self, kv_caches: dict[str, torch.Tensor], block_size: int) -> Worker:
        from kvshare_connectors.vllm.capability import model_rope  # noqa: PLC0415 - one role only
        from kvshare_connectors.vllm.paged_cache import PagedCache  # noqa: PLC0415
        from kvshare_connectors.vllm.worker import Worker  # noqa: PLC0415

        cache = PagedCache.from_context(
            self._vllm.compilation_config.static_forward_context,
            kv_caches,
            block_size=block_size,
            blocks=self._kv_cache.num_blocks,
        )
        role: Role = "admin" if self._pool else "engine"
        return Worker(self.config, cache, model_rope(self._vllm), role)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """vLLM calls this first in each step, before blocks that were given away are written."""
        if self._worker is not None and isinstance(kv_connector_metadata, KVShareMetadata):
            self._worker.save_answers(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.step_begins(self._step())

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.load(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete before the forward begins."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Rows are taken once a prompt is complete, in `wait_for_save`."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.after_forward(self._step())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        finished = set(self._step().finished_loads) if self._worker is not None else set()
        return None, finished or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.unserved if self._worker is not None else None

    def _step(self) -> KVShareMetadata:
        step = self._get_connector_metadata()
        if not isinstance(step, KVShareMetadata):
            raise UnsupportedError(f"unexpected connector metadata {type(step).__name__}")
        return step

    def shutdown(self) -> None:
        _open.discard(self)
        if self._worker is not None:
            self._worker.close()
        if self.planning is not None:
            self.planning.close()

    # --- scheduler side -------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        if self.planning is not None:
            self.planning.publishing.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        if self.planning is not None:
            self.planning.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self.planning is None:
            return 0, False
        return self.planning.matched(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if self.planning is not None:
            self.planning.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self.planning is None:
            return KVShareMetadata()
        return self.planning.build_metadata(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self.planning is not None:
            self.planning.worker_output(connector_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.planning is None:
            self._tally.unserved(self._unserved or "")
            return False, {"kvshare.reused": 0, "kvshare.reason": self._unserved}
        return False, self.planning.finished(request, block_ids[0])

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def take_events(self) -> Iterable[KVCacheEvent]:
        if self.planning is None or self.planning.announcer is None:
            return ()
        return self.planning.announcer.take()

    # --- both: what is counted -----------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._worker is not None:
            return loads(self._worker.take_load_seconds())
        return self._tally.take()

    def reset_cache(self) -> bool:
        return self.planning is None or self.planning.reset()

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a request never fails because cached KV is lost."""
        return False


def _refuse_a_second(vllm_config: VllmConfig, role: KVConnectorRole) -> None:
    """`ConfigError` if this engine has a KVShare connector already.

    Each would store rows that the other edited as exact. MultiConnector gives every child its own
    copy of the engine's configuration. The copies share their parts, so the same
    `scheduler_config` means the same engine.
    """
    parts = vllm_config.scheduler_config
    for other in list(_open):
        if other.role == role and other._vllm.scheduler_config is parts:
            other.shutdown()
            raise ConfigError(
                "kv_transfer_config names KVShareConnector more than once: name it once in "
                '"connectors"; engines share a store by its home'
            )
