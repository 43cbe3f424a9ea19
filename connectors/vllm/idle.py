"""The worker of an engine whose KV cache KVShare cannot use: it loads and stores nothing."""

from __future__ import annotations

from dataclasses import dataclass

from kvshare_connectors.vllm.metadata import KVShareMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


@dataclass
class Unserved(KVConnectorWorkerMetadata):
    """Tells the scheduler side that this worker loads and stores nothing."""

    reason: str
    """A stable code."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """One such worker is enough."""
        return self


class IdleWorker:
    """Stands in for a `Worker`: fails the loads ordered before the scheduler side knows of it."""

    def __init__(self, reason: str, block_size: int) -> None:
        self.unserved: Unserved | None = Unserved(reason)
        self._block_size = block_size
        self._failed_blocks: set[int] = set()

    def save_answers(self, step: KVShareMetadata) -> None:
        """Nothing is stored."""

    def step_begins(self, step: KVShareMetadata) -> None:
        """Nothing is measured."""

    def load(self, step: KVShareMetadata) -> None:
        """Report each load as failed, from the first block that is the request's own."""
        for spec in step.loads:
            self._failed_blocks.update(spec.own_blocks(self._block_size))

    def after_forward(self, step: KVShareMetadata) -> None:
        """Nothing is stored."""

    def take_failed_blocks(self) -> set[int]:
        """Paged blocks whose load failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_load_seconds(self) -> list[float]:
        """Nothing is loaded."""
        return []

    def close(self) -> None:
        """Nothing is open."""
