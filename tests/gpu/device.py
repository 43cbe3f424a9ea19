"""Which GPU was used, and what its driver says about host memory."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_HOST_REGISTER_SUPPORTED = 99
_HOST_REGISTER_READ_ONLY_SUPPORTED = 113
"""Values of enum cudaDeviceAttr."""


def describe() -> dict[str, Any]:
    """Names, versions, memory."""
    free, total = torch.cuda.mem_get_info()
    return {
        "ok": True,
        "name": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "free_bytes": free,
        "total_bytes": total,
        "host_register": attribute(_HOST_REGISTER_SUPPORTED),
        "host_register_read_only": attribute(_HOST_REGISTER_READ_ONLY_SUPPORTED),
    }


def attribute(number: int) -> int | str:
    """A device attribute, from the driver's own library; a text with the reason if that fails."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    value = ctypes.c_int()
    status = driver.cuDeviceGetAttribute(ctypes.byref(value), number, 0)
    return value.value if status == 0 else f"cuDeviceGetAttribute: error {status}"
