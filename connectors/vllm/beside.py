"""KVShare beside other connectors, under vLLM's MultiConnector."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvshare_connectors.vllm.connector import NEEDS_RECOMPUTE, KVShareConnector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from kvshare_store.errors import ConfigError

if TYPE_CHECKING:
    from kvshare_connectors.vllm.planning import Planning

log = logging.getLogger("kvshare")


def all_of(connector: KVConnectorBase_V1 | None) -> list[KVConnectorBase_V1]:
    """The connector itself, or those that vLLM's MultiConnector holds."""
    if isinstance(connector, MultiConnector):
        return list(connector.sub_connectors)
    return [] if connector is None else [connector]


def ours(connector: KVConnectorBase_V1 | None) -> KVShareConnector | None:
    """KVShare's connector, if it is there."""
    found = (child for child in all_of(connector) if isinstance(child, KVShareConnector))
    return next(found, None)


def check_failure_policy(planning: Planning, *, recompute: bool) -> None:
    """`ConfigError` unless failed loads are recomputed.

    Under MultiConnector its own policy counts, not that of its children.
    """
    if not recompute:
        planning.close()
        raise ConfigError(f"the outer {NEEDS_RECOMPUTE}")


def keeps_rows_by_tokens(connector: KVConnectorBase_V1 | None) -> bool:
    """Whether there is another connector, which may store or send rows by their tokens.

    It cannot tell edited rows, and its readers would take them for exact.
    """
    others = [c for c in all_of(connector) if not isinstance(c, KVShareConnector)]
    if others:
        names = ", ".join(sorted(type(other).__name__ for other in others))
        log.warning(
            "kvshare: beside %s only exact rows are reused: other connectors cannot tell edited "
            "ones from exact ones", names,
        )  # fmt: skip
    return bool(others)
