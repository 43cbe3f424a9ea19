"""Errors in a worker: each is a miss, counted by the daemon and logged once."""

from __future__ import annotations

import logging
from collections import Counter

import torch

from kvshare_store.errors import InternalError, KVShareError, NoSpaceError

log = logging.getLogger("kvshare")

_logged: Counter[str] = Counter()


def contained(error: Exception) -> KVShareError:
    """`error` as a `KVShareError`.

    Out of memory is `NoSpaceError`. Anything unexpected is a bug, `InternalError`; the first of
    each type is logged with its traceback.
    """
    if isinstance(error, KVShareError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return NoSpaceError(
            "no memory is left for rows that are loaded or saved: lower gpu_memory_utilization,"
            " kvshare.device_bytes or kvshare.host_bytes"
        )
    name = type(error).__name__
    _logged[name] += 1
    if _logged[name] == 1:
        log.error("kvshare: %s in a worker", name, exc_info=error)
    return InternalError(f"{name}: {error}")


def log_once(error: KVShareError) -> None:
    """Log each kind of failure once per process; the daemon counts them all."""
    _logged[error.kind] += 1
    if _logged[error.kind] == 1:
        log.warning("kvshare: %s (more such errors are counted, not logged)", error)
