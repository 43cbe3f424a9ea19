"""Names of the dtypes that rows may have."""

from __future__ import annotations

import torch

from kvshare_store.blocks.tiers.device import DTYPES
from kvshare_store.tensors.layout import DTypeName

NAMES: dict[torch.dtype, DTypeName] = {dtype: name for name, dtype in DTYPES.items()}
