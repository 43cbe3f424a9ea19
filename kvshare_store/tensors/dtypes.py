"""How torch calls the dtypes of rows. The daemon, which never loads torch, does not load this."""

from __future__ import annotations

import torch

from kvshare_store.tensors.layout import DTypeName

DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
NAMES: dict[torch.dtype, DTypeName] = {dtype: name for name, dtype in DTYPES.items()}
