"""KVShare: reuse the KV cache of similar, not only identical, prompts.

The names below are the library; they are resolved on first use, so importing one part does not load
the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvshare_store.config import StoreConfig as StoreConfig
    from kvshare_store.config import load_config as load_config
    from kvshare_store.errors import KVShareError as KVShareError
    from kvshare_store.namespace import Namespace as Namespace
    from kvshare_store.plan import Outcome as Outcome
    from kvshare_store.plan import ReusePlan as ReusePlan
    from kvshare_store.store import Store as Store
    from kvshare_store.tensors.layout import KVLayout as KVLayout
    from kvshare_store.tensors.rope import Rope as Rope

_HOMES = {
    "KVLayout": "tensors.layout",
    "KVShareError": "errors",
    "Namespace": "namespace",
    "Outcome": "plan",
    "ReusePlan": "plan",
    "Rope": "tensors.rope",
    "Store": "store",
    "StoreConfig": "config",
    "load_config": "config",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
