"""KVShare on a Hugging Face model: the same plans as in vLLM, one readable forward, exact masks.

    from kvshare_connectors.transformers import KVShareModel

    with KVShareModel.load("model-folder", home="store-folder") as model:
        print(model.generate("First prompt").text)
        print(model.generate("A similar prompt").reused)

The reference engine: for tests, for methods that need deviations or attention scores, and for
machines without vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvshare_connectors.transformers.engine import RowEngine as RowEngine
    from kvshare_connectors.transformers.model import KVShareModel as KVShareModel

_HOMES = {"KVShareModel": "model", "RowEngine": "engine"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
