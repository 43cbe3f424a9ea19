"""KVShare in stock vLLM: a KV connector and a scheduler class, named on the command line.

Names are resolved on first use: vLLM imports this package in processes that need only one of them.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "KVShareConnector": "connector",
    "KVShareScheduler": "scheduler",
    "KVShareAsyncScheduler": "scheduler",
}

__all__ = ["KVShareAsyncScheduler", "KVShareConnector", "KVShareScheduler"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
